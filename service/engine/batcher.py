"""Continuous batching across streams: one queue and one owner per model.

Jobs wait in a fair queue (`fair_queue`): in order within a stream, in rotation between requests.
Whenever fewer batches are under way than allowed, the next one is formed from whatever is ready:
small batches at low load, full ones at high load. One that would be smaller than the last is put
off for a moment. It runs as a task of its own, so that loading, computing and committing of
neighbouring batches overlap. A stream has at most one job in the hands of a batch, until the batch
releases it; a job that has to be done again takes its old place in the queue. Jobs whose caller
left, or whose deadline passed, are dropped while forming; a batch that fails fails its own jobs
only. Each job is settled once.

Admission control. The queue is bounded in jobs and, while more comes than is done, in time: at the
rate at which it drains, a new job must be begun before its deadline and within `max_wait_s`.
Otherwise it is refused at once, and told how long the queue will take. What counts is what is begun
before the new job: one job of each request that is ready, and the backlog of its own stream, at the
rate of that stream. Of the room that is left in the queue, one stream's backlog gets a share only
(a dynamic threshold), and one request no more than it leaves to others. So a stream's backlog is
met by its own callers.

One timer watches over all deadlines; it is set to the earliest.

Use from one event loop: `submit` from any task, `drain` once at the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import count
from typing import Final, Generic, NamedTuple

import structlog

from service.engine.drain_rate import DrainRate
from service.engine.fair_queue import Backlog, FairQueue
from service.engine.jobs import Job, P, R, Release, Request, Results, Run, Ticket
from service.engine.policy import PATIENCE_TICKS, BatchLimits, PutOff, put_off
from service.errors import (
    CarryError,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    ShuttingDown,
    StreamOverloaded,
)

GRACE_S: Final = 0.05
"""How much later than its deadline a job in a batch is given up: what its batch waits for ends at
the deadline too, and can say more."""

TICK_S: Final = 0.01
"""Least time between two looks of the timer at deadlines."""

PATIENCE_TICK_S: Final = 0.001
"""What the loop's timers count in."""

MAX_RETRY_AFTER_S: Final = 60.0

STREAM_SHARE: Final = 4
"""A stream's backlog may be this part of the room that is left in the queue."""

log = structlog.get_logger(__name__)


class Refusal(NamedTuple):
    """Why a job is not admitted.

    Attributes:
        waiting: jobs that are begun before it.
        per_s: how many are begun in a second, where that is known.
        of_stream: they are the backlog of its own stream.
    """

    waiting: int
    per_s: float | None
    of_stream: bool

    def error(self) -> Overloaded:
        """What the caller is answered."""
        kind, what = (
            (StreamOverloaded, "chunks of this stream")
            if self.of_stream
            else (Overloaded, "chunks")
        )
        if self.per_s is None:
            return kind(f"{self.waiting} {what} are waiting, which is the limit", retry_after_s=1)
        drained_s = min(MAX_RETRY_AFTER_S, max(1.0, round(self.waiting / self.per_s, 1)))
        return kind(
            f"{self.waiting} {what} are waiting, and {self.per_s:.0f} are done in a second",
            retry_after_s=drained_s,
        )


_shared_error = lru_cache(maxsize=64)(Refusal.error)
"""The same object for as long as it says the same."""


class Batcher(Generic[P, R]):
    """The queue of one model.

    Args:
        limits: how large a batch may grow.
        max_queue: waiting jobs beyond which `submit` refuses.
        max_in_flight: batches that may be under way at once.
        on_depth: told the queue's length whenever a batch was formed.
        max_wait_s: longest that a job may be expected to wait in the queue.
        on_refusing: told when it begins to refuse, and when the queue was empty again.
        told: what becomes of an error of the batcher's own for a job, which may be committing.
    """

    def __init__(
        self,
        run: Run[P, R],
        limits: BatchLimits,
        *,
        max_queue: int,
        max_in_flight: int,
        on_depth: Callable[[int], None],
        max_wait_s: float = math.inf,
        on_refusing: Callable[[bool], None] = lambda _: None,
        told: Callable[[Job[P, R], CarryError], CarryError] = lambda _, error: error,
    ):
        self._run = run
        self._limits = limits
        self._max_queue = max_queue
        self._max_in_flight = max_in_flight
        self._on_depth = on_depth
        self._max_wait_s = max_wait_s
        self._on_refusing = on_refusing
        self._told = told
        self._queue: FairQueue[P, R] = FairQueue(limits)
        self._numbers = count()
        self._long = 0
        self._batches: dict[asyncio.Task[None], list[Job[P, R]]] = {}
        self._rate = DrainRate()
        self._refusing = False
        self._soonest_s = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._forming = False
        self._turns = 0
        self._last_rows = 0
        self._patience: asyncio.TimerHandle | None = None
        self._stopping = False
        self._drained = asyncio.Event()

    def enqueue(self, requests: Sequence[Request[P]], deadline_s: float = math.inf) -> Results[R]:
        """Queue jobs; at least one.

        Args:
            deadline_s: until when the caller waits, of the monotonic clock.

        Returns:
            A future of all their results, in the order of the requests. A request is answered
            Overloaded where the queue is too long, DeadlineExceeded where its time was up
            before it was done, and ShuttingDown where the service is stopping; else with
            whatever its job was settled with.
        """
        ticket: Ticket[R] = Ticket(len(requests), deadline_s)
        may_run = False
        now_s = time.monotonic()
        left_s = deadline_s - now_s
        for index, (payload, key, steps) in enumerate(requests):
            if self._stopping:
                ticket.settle(index, ShuttingDown("the service is stopping, no work is taken"))
            elif (refusal := self._refusal(key, left_s, index)) is not None:
                ticket.settle(index, refusal.error())
            else:
                job = Job(payload, key, steps, next(self._numbers), now_s, ticket, index)
                is_ready = self._queue.push(job)
                may_run |= is_ready and (steps <= self._limits.long_steps or self._takes_long)
        if deadline_s < self._soonest_s:
            self._watch(deadline_s, now_s)
        if may_run:
            self._wake()
        return ticket.future

    def refusal(self, key: Hashable | None, left_s: float) -> Overloaded | None:
        """What a request of a stream would be answered now that can wait so long, where that is
        Overloaded; it saves to look into the request. The same object for as long as it says the
        same, so not one to raise."""
        refusal = self._refusal(key, left_s)
        return None if refusal is None else _shared_error(refusal)

    def _refusal(self, key: Hashable | None, left_s: float, index: int = 0) -> Refusal | None:
        """Why a job that can wait so long is not admitted, where it is not.

        Args:
            index: how many jobs its request has before it.
        """
        queue = self._queue
        room = self._max_queue - len(queue)
        # Of each request that is ready, one job is begun before its first, two before its second.
        before = min(queue.ready(), queue.requests * (index + 1))
        if room <= index or before >= self._room(left_s, self._rate.per_s):
            self._note_refusing(before)
            return Refusal(len(queue) if room <= index else before, self._rate.per_s, False)
        backlog = queue.backlog(key)
        if backlog is None or not backlog.jobs:
            return None
        waiting = len(backlog.jobs)
        if waiting >= max(1, room // STREAM_SHARE) or waiting >= self._room(left_s, backlog.per_s):
            self._note_refusing_stream(backlog)
            return Refusal(waiting, backlog.per_s, True)
        return None

    def _room(self, left_s: float, per_s: float | None) -> float:
        """How many jobs may be begun at that rate before one that can wait so long."""
        wait_s = min(self._max_wait_s, left_s)
        if per_s is None or wait_s == math.inf:
            return math.inf
        # One may always wait: an empty queue takes no time.
        return max(1, int(wait_s * per_s))

    def leave(self, results: Results[R]) -> None:
        """Their caller is gone: what of them still waits is dropped, at the next look at least."""
        results.cancel()
        now_s = time.monotonic()
        if now_s < self._soonest_s:
            self._watch(now_s, now_s)

    async def submit(
        self, requests: Sequence[Request[P]], deadline_s: float = math.inf
    ) -> list[R | CarryError]:
        """Queue jobs and wait for all their results; see `enqueue`."""
        if not requests:
            return []
        results = self.enqueue(requests, deadline_s)
        try:
            return await results
        except asyncio.CancelledError:
            self.leave(results)
            raise

    def _note_refusing(self, waiting: int) -> None:
        """Once until nothing was ready again: every refusal is counted by its code."""
        if not self._refusing:
            self._refusing = True
            self._on_refusing(True)
            rate = self._rate.per_s
            log.warning("overloaded", waiting=waiting, done_per_s=rate and round(rate, 1))

    def _note_refusing_stream(self, backlog: Backlog[P, R]) -> None:
        """Once until the stream was idle again."""
        if not backlog.is_refusing:
            backlog.is_refusing = True
            rate = backlog.per_s
            log.warning(
                "stream_overloaded",
                stream=str(backlog.key),
                waiting=len(backlog.jobs),
                done_per_s=rate and round(rate, 1),
            )

    async def drain(self, timeout_s: float) -> None:
        """Take no new jobs and finish the accepted ones; once.

        Jobs that are not done after `timeout_s` fail with ShuttingDown.
        """
        self._stopping = True
        if self._queue or self._batches:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
            except TimeoutError:
                await self._abandon()
        self._cease_refusing()
        for timer in (self._timer, self._patience):
            if timer is not None:
                timer.cancel()

    def _cease_refusing(self) -> None:
        if self._refusing:
            self._refusing = False
            self._on_refusing(False)

    async def _abandon(self) -> None:
        for job in self._queue.clear():
            job.settle(ShuttingDown("the service stopped before the chunk was processed"))
        for batch in self._batches:
            batch.cancel()
        if self._batches:
            await asyncio.wait(self._batches)

    def _wake(self) -> None:
        """Form batches once whatever else is ready now has had its turn."""
        if not self._forming and len(self._batches) < self._max_in_flight:
            self._forming = True
            asyncio.get_running_loop().call_soon(self._form)

    def _form(self) -> None:
        """Start a batch, unless it is put off."""
        # a long job is not about to be answered
        about_to_end = len(self._batches) - self._long
        ready = self._queue.ready(long_ones=self._takes_long)
        wait = put_off(ready, self._last_rows, about_to_end, self._turns)
        if wait is PutOff.A_TURN:
            self._turns += 1
            asyncio.get_running_loop().call_soon(self._form)
            return
        self._forming, self._turns = False, 0
        if wait is PutOff.NOT:
            self._start()
        elif self._patience is None:
            self._wait_for_answers()

    def _wait_for_answers(self, ticks: int = PATIENCE_TICKS) -> None:
        """Start after some ticks at the latest; a batch that keeps the loop may swallow one."""
        if ticks:
            self._patience = asyncio.get_running_loop().call_later(
                PATIENCE_TICK_S, self._wait_for_answers, ticks - 1
            )
        else:
            self._start()

    def _start(self) -> None:
        """Start a batch, if one may be under way, and see to the next one."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        try:
            now_s = time.monotonic()
            if len(self._batches) < self._max_in_flight and self._start_batch(now_s):
                self._wake()
            ready = self._queue.ready()
            self._rate.note(now_s, ready)
            if not ready:
                self._cease_refusing()
            self._on_depth(len(self._queue))
        except Exception as error:
            log.exception("forming_failed", jobs=len(self._queue))
            for job in self._queue.clear():
                job.settle(InternalError(f"no batch could be formed: {type(error).__name__}"))
        if self._stopping and not self._queue and not self._batches:
            self._drained.set()

    def _drop(self, now_s: float) -> None:
        """Drop the jobs that nobody waits for any more, and tell those whose time is up."""
        soonest_s = math.inf

        def is_live(job: Job[P, R]) -> bool:
            nonlocal soonest_s
            if not self._is_live(job, now_s):
                return False
            soonest_s = min(soonest_s, job.ticket.deadline_s)
            return True

        self._queue.sweep(is_live)
        for jobs in self._batches.values():
            for job in jobs:
                if job.settled:
                    continue
                if job.ticket.deadline_s + GRACE_S <= now_s:
                    self._give_up(job, "before it was done", now_s)
                else:
                    soonest_s = min(soonest_s, job.ticket.deadline_s + GRACE_S)
        self._watch(soonest_s, now_s)

    def _is_live(self, job: Job[P, R], now_s: float) -> bool:
        """Whether somebody waits for a job that was not begun; one whose time is up is told."""
        ticket = job.ticket
        if ticket.future.cancelled():
            return False
        if ticket.deadline_s <= now_s:
            self._give_up(job, "before it was begun", now_s)
            return False
        return True

    def _give_up(self, job: Job[P, R], when: str, now_s: float) -> None:
        waited_s = now_s - job.submitted_s
        error = DeadlineExceeded(f"the time for the chunk was up {when}, after {waited_s:.3f} s")
        job.settle(self._told(job, error))

    def _watch(self, soonest_s: float, now_s: float) -> None:
        """Look at the deadlines again at the earliest of them."""
        self._soonest_s = soonest_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if soonest_s < math.inf:
            pause_s = max(TICK_S, soonest_s - now_s)
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._look)

    def _look(self) -> None:
        self._timer = None
        self._drop(time.monotonic())
        if self._stopping and not self._queue and not self._batches:
            self._drained.set()

    def _note_overtaking(self, again: Job[P, R]) -> None:
        """Tell those that were begun behind a job that it is done again."""
        again.overtakes = False
        for jobs in self._batches.values():
            for job in jobs:
                if job.key == again.key and job.number > again.number:
                    job.overtakes = True

    def _start_batch(self, now_s: float) -> bool:
        """Start a batch of what may run; whether anything more may."""
        long_ones = self._takes_long
        if not self._queue.ready(long_ones=long_ones):
            return False
        jobs = self._queue.take(lambda job: self._is_live(job, now_s), long_ones=long_ones)
        if not jobs:
            return False
        self._last_rows = len(jobs)
        is_long = jobs[0].steps > self._limits.long_steps
        self._long += is_long
        task = asyncio.get_running_loop().create_task(self._run_batch(jobs, is_long))
        self._batches[task] = jobs
        task.add_done_callback(self._batch_done)
        return bool(self._queue.ready(long_ones=self._takes_long))

    @property
    def _takes_long(self) -> bool:
        """Whether a long job may run. They hold their slot for many calls, and never the last."""
        return self._long < max(1, self._max_in_flight - 1)

    def _batch_done(self, task: asyncio.Task[None]) -> None:
        del self._batches[task]
        self._wake()

    def _let_go(self, key: Hashable, *, first: bool = False) -> None:
        backlog = self._queue.release(key, first=first)
        if backlog is not None:
            backlog.note_turn(time.monotonic())
            self._wake()

    async def _run_batch(self, jobs: list[Job[P, R]], is_long: bool) -> None:
        held = {job.key for job in jobs if job.key is not None}
        release = Release(held, self._let_go, lambda: not self._queue and len(self._batches) == 1)
        failure: CarryError = InternalError("the batch ended without an answer for this chunk")
        again: list[Job[P, R]] = []
        try:
            again = await self._run(jobs, release)
        except CarryError as error:
            failure = error
        except asyncio.CancelledError:
            failure = ShuttingDown("the service stopped while the chunk was processed")
            raise
        except Exception as error:
            log.exception("batch_failed", jobs=len(jobs))
            failure = InternalError(f"the batch failed: {type(error).__name__}")
        finally:
            self._long -= is_long
            waiting = set(again)
            self._rate.done += len(jobs) - len(waiting)
            for job in jobs:
                if job in waiting:
                    job.attempts += 1
                    self._note_overtaking(job)
                    self._queue.put_back(job)
                    if job.deadline_s < self._soonest_s:
                        self._watch(job.deadline_s, time.monotonic())
                elif not job.settled:
                    job.settle(self._told(job, failure))
            returned = {job.key for job in again}
            for key in held:
                self._let_go(key, first=key in returned)
