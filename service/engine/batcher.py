"""Continuous batching across streams: one queue and one owner per model.

Jobs wait in one queue, in the order in which they came. Whenever fewer batches are under way
than allowed, the next one is formed from whatever waits: small batches at low load, full ones at
high load. One that would be smaller than the last is put off for a moment. It runs as a task of
its own, so that loading, computing and committing of neighbouring batches overlap. A stream has at
most one job in the hands of a batch, until the batch releases it; a job that has to be done again
takes its old place in the queue. Jobs whose caller left, or whose deadline passed, are dropped
while forming; a batch that fails fails its own jobs only. Each job is settled once.

The queue is bounded in jobs and, while more comes than is done, in time: at the rate at which
it drains, a new job must be begun before its deadline and within `max_wait_s`. Otherwise it is
refused at once, and told how long the queue will take. One timer watches over all deadlines; it
is set to the earliest.

Use from one event loop: `submit` from any task, `drain` once at the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from operator import attrgetter
from typing import Final, Generic

import structlog

from service.engine.drain_rate import DrainRate
from service.engine.jobs import Job, P, R, Release, Request, Results, Run, Ticket
from service.engine.policy import PATIENCE_TICKS, BatchLimits, PutOff, form, put_off
from service.errors import (
    CarryError,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    ShuttingDown,
)

GRACE_S: Final = 0.05
"""How much later than its deadline a job in a batch is given up: what its batch waits for ends at
the deadline too, and can say more."""

TICK_S: Final = 0.01
"""Least time between two looks of the timer at deadlines."""

PATIENCE_TICK_S: Final = 0.001
"""What the loop's timers count in."""

MAX_RETRY_AFTER_S: Final = 60.0

log = structlog.get_logger(__name__)


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
        self._queue: list[Job[P, R]] = []
        self._numbers = count()
        self._busy: set[Hashable] = set()
        self._long = 0
        self._short_waiting = 0
        self._batches: dict[asyncio.Task[None], list[Job[P, R]]] = {}
        self._rate = DrainRate()
        self._refusing = False
        self._refusal: Overloaded | None = None
        self._refused_at: tuple[int, float | None] = 0, None
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
        room = self._room(deadline_s - now_s)
        for index, (payload, key, steps) in enumerate(requests):
            if self._stopping:
                ticket.settle(index, ShuttingDown("the service is stopping, no work is taken"))
            elif len(self._queue) >= room:
                ticket.settle(index, self._overloaded())
            else:
                number = next(self._numbers)
                self._queue.append(Job(payload, key, steps, number, now_s, ticket, index))
                is_short = steps <= self._limits.long_steps
                self._short_waiting += is_short
                may_run |= key not in self._busy and (is_short or self._takes_long)
        if deadline_s < self._soonest_s:
            self._watch(deadline_s, now_s)
        if may_run:
            self._wake()
        return ticket.future

    def refusal(self, left_s: float) -> Overloaded | None:
        """What a request would be answered now that can wait so long, where that is Overloaded;
        it saves to look into the request. The same object for as long as it says the same, so not
        one to raise."""
        if len(self._queue) < self._room(left_s):
            return None
        standing = len(self._queue), self._rate.per_s
        if self._refusal is None or standing != self._refused_at or not self._refusing:
            self._refusal, self._refused_at = self._overloaded(), standing
        return self._refusal

    def _room(self, left_s: float) -> int:
        """How many jobs may wait before one that can wait so long."""
        rate = self._rate.per_s
        if rate is None:
            return self._max_queue
        # One may always wait: an empty queue takes no time.
        wait_s = min(self._max_wait_s, left_s)
        return (
            self._max_queue
            if wait_s == math.inf
            else max(1, min(self._max_queue, int(wait_s * rate)))
        )

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

    def _overloaded(self) -> Overloaded:
        waiting, rate = len(self._queue), self._rate.per_s
        if not self._refusing:
            # Once until the queue was empty again: every refusal is counted by its code.
            self._refusing = True
            self._on_refusing(True)
            log.warning("overloaded", waiting=waiting, done_per_s=rate and round(rate, 1))
        if rate is None:
            return Overloaded(f"{waiting} chunks are waiting, which is the limit", retry_after_s=1)
        drained_s = min(MAX_RETRY_AFTER_S, max(1.0, round(waiting / rate, 1)))
        return Overloaded(
            f"{waiting} chunks are waiting, and {rate:.0f} are done in a second",
            retry_after_s=drained_s,
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
        for job in self._queue:
            job.settle(ShuttingDown("the service stopped before the chunk was processed"))
        self._queue, self._short_waiting = [], 0
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
        wait = put_off(len(self._queue), self._last_rows, about_to_end, self._turns)
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
            if now_s >= self._soonest_s:
                self._drop(now_s)
            if len(self._batches) < self._max_in_flight and self._start_batch() and self._queue:
                self._wake()
            waiting = len(self._queue)
            self._rate.note(now_s, waiting)
            if not waiting:
                self._cease_refusing()
            self._on_depth(waiting)
        except Exception as error:
            log.exception("forming_failed", jobs=len(self._queue))
            for job in self._queue:
                job.settle(InternalError(f"no batch could be formed: {type(error).__name__}"))
            self._queue, self._short_waiting = [], 0
        if self._stopping and not self._queue and not self._batches:
            self._drained.set()

    def _drop(self, now_s: float) -> None:
        """Drop the jobs that nobody waits for any more, and tell those whose time is up."""
        waiting: list[Job[P, R]] = []
        soonest_s = math.inf
        for job in self._queue:
            ticket = job.ticket
            if ticket.future.cancelled():
                continue
            if ticket.deadline_s <= now_s:
                self._give_up(job, "before it was begun", now_s)
                continue
            soonest_s = min(soonest_s, ticket.deadline_s)
            waiting.append(job)
        self._queue, self._short_waiting = waiting, self._short_ones(waiting)
        for jobs in self._batches.values():
            for job in jobs:
                if job.settled:
                    continue
                if job.ticket.deadline_s + GRACE_S <= now_s:
                    self._give_up(job, "before it was done", now_s)
                else:
                    soonest_s = min(soonest_s, job.ticket.deadline_s + GRACE_S)
        self._watch(soonest_s, now_s)

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

    def _start_batch(self) -> bool:
        if not self._short_waiting and not self._takes_long:
            return False
        chosen = form(self._queue, self._busy, self._limits, long_ones=self._takes_long)
        if not chosen:
            return False
        jobs = [self._queue[index] for index in chosen]
        self._short_waiting -= self._short_ones(jobs)
        if chosen[-1] == len(chosen) - 1:
            del self._queue[: len(chosen)]
        else:
            taken = set(chosen)
            self._queue = [job for index, job in enumerate(self._queue) if index not in taken]
        self._busy.update(job.key for job in jobs if job.key is not None)
        self._last_rows = len(jobs)
        is_long = any(job.steps > self._limits.long_steps for job in jobs)
        self._long += is_long
        task = asyncio.get_running_loop().create_task(self._run_batch(jobs, is_long))
        self._batches[task] = jobs
        task.add_done_callback(self._batch_done)
        return True

    @property
    def _takes_long(self) -> bool:
        """Whether a long job may run. They hold their slot for many calls, and never the last."""
        return self._long < max(1, self._max_in_flight - 1)

    def _short_ones(self, jobs: list[Job[P, R]]) -> int:
        return sum(job.steps <= self._limits.long_steps for job in jobs)

    def _batch_done(self, task: asyncio.Task[None]) -> None:
        del self._batches[task]
        self._wake()

    def _let_go(self, key: Hashable) -> None:
        self._busy.discard(key)
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
            self._busy -= held
            waiting = set(again)
            self._rate.done += len(jobs) - len(waiting)
            for job in jobs:
                if job in waiting:
                    job.attempts += 1
                    self._note_overtaking(job)
                    insort(self._queue, job, key=attrgetter("number"))
                    self._short_waiting += self._short_ones([job])
                    if job.deadline_s < self._soonest_s:
                        self._watch(job.deadline_s, time.monotonic())
                elif not job.settled:
                    job.settle(self._told(job, failure))
