"""Continuous batching across streams: one queue and one owner per model.

Jobs wait in a fair queue (`fair_queue`): in order within a stream, round robin between requests.
Whenever fewer batches are under way than allowed, the next one is formed from whatever is ready:
small batches at low load, full ones at high load. One that would be smaller than the last is
delayed for a moment. It runs as a task of its own, so that loading, computing and committing of
neighbouring batches overlap. A stream has at most one job in a batch, until the batch releases it;
a job that has to be retried returns to its old place in the queue. Jobs whose caller disconnected,
or whose deadline passed, are dropped while forming; a batch that fails fails its own jobs only.
Each job is settled once.

Jobs that would have to wait for too long are rejected at once (`admission`). A single timer, set to
the earliest deadline, enforces all of them.

Use from one event loop: `submit` from any task, `drain` once at the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain, count
from typing import Final, Generic

import structlog

from service.core.errors import (
    CarryError,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    ShuttingDown,
)
from service.engine.admission import Admission, shared_error
from service.engine.drain_rate import DrainRate
from service.engine.fair_queue import FairQueue
from service.engine.jobs import BatchControl, Job, JobRequest, P, R, Results, Run, Ticket, Work
from service.engine.policy import LINGER_TICKS, BatchDelay, BatchLimits, batching_delay

DEADLINE_GRACE_S: Final = 0.05
"""How much later than its deadline a job in a batch is given up: what its batch waits for ends at
the deadline too, and can say more."""

DEADLINE_TICK_S: Final = 0.01
"""Least time between two looks of the timer at deadlines."""

LINGER_TICK_S: Final = 0.001
"""What the loop's timers count in."""

ITEMS_PER_PART: Final = 128
"""A request with more items is queued in parts of this size, two at a time: one for the batch that
is running and one for the next."""

log = structlog.get_logger(__name__)


class Batcher(Generic[P, R]):
    """The queue of one model.

    Args:
        limits: how large a batch may grow.
        max_queue: waiting jobs beyond which `submit` refuses.
        max_in_flight: batches that may be under way at once.
        on_depth: told the queue's length whenever a batch was formed.
        max_wait_s: longest that a job may be expected to wait in the queue.
        on_shedding: told when it begins to refuse, and when the queue was empty again.
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
        on_shedding: Callable[[bool], None] = lambda _: None,
        map_error: Callable[[Job[P, R], CarryError], CarryError] = lambda _, error: error,
    ):
        self._run = run
        self._limits = limits
        self._max_in_flight = max_in_flight
        self._on_depth = on_depth
        self._map_error = map_error
        self._queue: FairQueue[P, R] = FairQueue(limits)
        self._numbers = count()
        self._long = 0
        self._batches: dict[asyncio.Task[None], list[Job[P, R]]] = {}
        self._detached: dict[asyncio.Task[None], list[Job[P, R]]] = {}
        self._rate = DrainRate()
        self._admission = Admission(
            self._queue,
            self._rate,
            max_queue=max_queue,
            max_wait_s=max_wait_s,
            on_shedding=on_shedding,
        )
        self._next_deadline_s = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._forming = False
        self._turns = 0
        self._last_rows = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._drained = asyncio.Event()

    def enqueue(
        self, requests: Sequence[JobRequest[P]], deadline_s: float = math.inf
    ) -> Results[R]:
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
                ticket.resolve(index, ShuttingDown("the service is stopping, no work is taken"))
            elif (rejection := self._admission.check_admission(key, left_s, index)) is not None:
                ticket.resolve(index, rejection.error())
            else:
                job = Job(payload, key, steps, next(self._numbers), now_s, ticket, index)
                is_ready = self._queue.push(job)
                may_run |= is_ready and (steps <= self._limits.long_steps or self._may_start_long)
        if deadline_s < self._next_deadline_s:
            self._set_timer(deadline_s, now_s)
        if may_run:
            self._wake()
        return ticket.future

    def check_admission(self, key: Hashable | None, left_s: float) -> Overloaded | None:
        """The error that admission control would answer a request with now; None if it would be
        admitted. Lets a caller reject a request without parsing it. The object is shared between
        calls, so it must not be raised.

        Args:
            left_s: time until the request's deadline.
        """
        rejection = self._admission.check_admission(key, left_s)
        return None if rejection is None else shared_error(rejection)

    def cancel(self, results: Results[R]) -> None:
        """Their caller is gone: what of them still waits is dropped, at the next look at least."""
        results.cancel()
        now_s = time.monotonic()
        if now_s < self._next_deadline_s:
            self._set_timer(now_s, now_s)

    async def submit(
        self, requests: Sequence[JobRequest[P]], deadline_s: float = math.inf
    ) -> list[R | CarryError]:
        """Queue jobs and wait for all their results; see `enqueue`.

        More than `ITEMS_PER_PART` jobs are queued in parts, so that one caller cannot fill the
        queue.
        """
        if len(requests) <= ITEMS_PER_PART:
            return await self._submit(requests, deadline_s)
        parts = [
            requests[at : at + ITEMS_PER_PART] for at in range(0, len(requests), ITEMS_PER_PART)
        ]
        two_parts = asyncio.Semaphore(2)

        async def submit(part: Sequence[JobRequest[P]]) -> list[R | CarryError]:
            async with two_parts:
                return await self._submit(part, deadline_s)

        return list(chain.from_iterable(await asyncio.gather(*map(submit, parts))))

    async def _submit(
        self, requests: Sequence[JobRequest[P]], deadline_s: float
    ) -> list[R | CarryError]:
        if not requests:
            return []
        results = self.enqueue(requests, deadline_s)
        try:
            return await results
        except asyncio.CancelledError:
            self.cancel(results)
            raise

    async def drain(self, timeout_s: float) -> None:
        """Take no new jobs and finish the accepted ones; once.

        Jobs that are not done after `timeout_s` fail with ShuttingDown.
        """
        self._stopping = True
        if not self._is_idle:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
            except TimeoutError:
                await self._cancel_all()
        self._admission.stop_shedding()
        for timer in (self._timer, self._linger_timer):
            if timer is not None:
                timer.cancel()

    @property
    def _is_idle(self) -> bool:
        return not (self._queue or self._batches or self._detached)

    async def _cancel_all(self) -> None:
        for job in self._queue.clear():
            job.resolve(ShuttingDown("the service stopped before the chunk was processed"))
        tasks = [*self._batches, *self._detached]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _wake(self) -> None:
        """Form batches once whatever else is ready now has had its turn."""
        if not self._forming and len(self._batches) < self._max_in_flight:
            self._forming = True
            asyncio.get_running_loop().call_soon(self._form)

    def _form(self) -> None:
        """Start a batch, unless it is put off."""
        # a long job is not about to be answered
        ending_soon = len(self._batches) - self._long
        ready = self._queue.ready(long_ones=self._may_start_long)
        wait = batching_delay(ready, self._last_rows, ending_soon, self._turns)
        if wait is BatchDelay.LOOP_TURN:
            self._turns += 1
            asyncio.get_running_loop().call_soon(self._form)
            return
        self._forming, self._turns = False, 0
        if wait is BatchDelay.NONE:
            self._start()
        elif self._linger_timer is None:
            self._linger()

    def _linger(self, ticks: int = LINGER_TICKS) -> None:
        """Start after some ticks at the latest; a batch that keeps the loop may swallow one."""
        if ticks:
            self._linger_timer = asyncio.get_running_loop().call_later(
                LINGER_TICK_S, self._linger, ticks - 1
            )
        else:
            self._start()

    def _start(self) -> None:
        """Start a batch, if one may be under way, and see to the next one."""
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        try:
            now_s = time.monotonic()
            if len(self._batches) < self._max_in_flight and self._start_batch(now_s):
                self._wake()
            ready = self._queue.ready()
            self._rate.note(now_s, ready)
            if not ready:
                self._admission.stop_shedding()
            self._on_depth(len(self._queue))
        except Exception as error:
            log.exception("forming_failed", jobs=len(self._queue))
            for job in self._queue.clear():
                job.resolve(InternalError(f"no batch could be formed: {type(error).__name__}"))
        if self._stopping and self._is_idle:
            self._drained.set()

    def _expire_jobs(self, now_s: float) -> None:
        """Drop the jobs that nobody waits for any more, and tell those whose time is up."""
        next_deadline_s = math.inf

        def is_live(job: Job[P, R]) -> bool:
            nonlocal next_deadline_s
            if not self._is_live(now_s, job):
                return False
            next_deadline_s = min(next_deadline_s, job.ticket.deadline_s)
            return True

        self._queue.remove_dead(is_live)
        for job in self._running_jobs():
            if job.is_resolved:
                continue
            if job.ticket.deadline_s + DEADLINE_GRACE_S <= now_s:
                self._fail_expired(job, "before it was done", now_s)
            else:
                next_deadline_s = min(next_deadline_s, job.ticket.deadline_s + DEADLINE_GRACE_S)
        self._set_timer(next_deadline_s, now_s)

    def _is_live(self, now_s: float, job: Job[P, R]) -> bool:
        """Whether a queued job is still wanted. A job whose deadline passed is failed here."""
        ticket = job.ticket
        if ticket.future.cancelled():
            return False
        if ticket.deadline_s <= now_s:
            self._fail_expired(job, "before it was begun", now_s)
            return False
        return True

    def _fail_expired(self, job: Job[P, R], when: str, now_s: float) -> None:
        waited_s = now_s - job.submitted_s
        error = DeadlineExceeded(f"the time for the chunk was up {when}, after {waited_s:.3f} s")
        job.resolve(self._map_error(job, error))

    def _set_timer(self, next_deadline_s: float, now_s: float) -> None:
        """Look at the deadlines again at the earliest of them."""
        self._next_deadline_s = next_deadline_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if next_deadline_s < math.inf:
            pause_s = max(DEADLINE_TICK_S, next_deadline_s - now_s)
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._expire_jobs(time.monotonic())
        if self._stopping and self._is_idle:
            self._drained.set()

    def _mark_out_of_order(self, again: Job[P, R]) -> None:
        """Tell those that were begun behind a job that it is done again."""
        again.is_out_of_order = False
        for job in self._running_jobs():
            if job.key == again.key and job.number > again.number:
                job.is_out_of_order = True

    def _start_batch(self, now_s: float) -> bool:
        """Start a batch of ready jobs; returns whether more jobs are ready."""
        long_ones = self._may_start_long
        if not self._queue.ready(long_ones=long_ones):
            return False
        is_live = None
        if now_s >= self._next_deadline_s:
            # A caller disconnected or a deadline passed.
            is_live = partial(self._is_live, now_s)
        jobs = self._queue.take(is_live, long_ones=long_ones)
        if not jobs:
            return False
        self._last_rows = len(jobs)
        is_long = jobs[0].steps > self._limits.long_steps
        self._long += is_long
        held = {job.key for job in jobs if job.key is not None}
        control = BatchControl(
            held, self._release_stream, self._is_alone, partial(self._detach, jobs, held)
        )
        work = self._finish(jobs, held, self._run(jobs, control), is_long=is_long)
        task = asyncio.get_running_loop().create_task(work)
        self._batches[task] = jobs
        task.add_done_callback(self._batch_done)
        return bool(self._queue.ready(long_ones=self._may_start_long))

    @property
    def _may_start_long(self) -> bool:
        """Whether a long job may run. They hold their slot for many calls, and never the last."""
        return self._long < max(1, self._max_in_flight - 1)

    def _batch_done(self, task: asyncio.Task[None]) -> None:
        del self._batches[task]
        self._wake()

    def _release_stream(self, key: Hashable, *, first: bool = False) -> None:
        backlog = self._queue.release(key, first=first)
        if backlog is not None:
            backlog.note_release(time.monotonic())
            self._wake()

    def _is_alone(self) -> bool:
        return not self._queue and len(self._batches) == 1

    def _detach(
        self, jobs: list[Job[P, R]], held: set[Hashable], detached: list[Job[P, R]], work: Work
    ) -> asyncio.Task[None]:
        """Remove jobs from their batch, and their streams from those that it holds."""
        keys = {job.key for job in detached} & held
        held -= keys
        removed = set(detached)
        jobs[:] = [job for job in jobs if job not in removed]
        task = asyncio.get_running_loop().create_task(self._finish(detached, keys, work))
        self._detached[task] = detached
        task.add_done_callback(self._detached_done)
        return task

    async def _finish(
        self,
        jobs: list[Job[P, R]],
        held: set[Hashable],
        work: Awaitable[list[Job[P, R]]],
        *,
        is_long: bool = False,
    ) -> None:
        """Await the work on some jobs, then settle or requeue them and release their streams.

        Args:
            held: streams that are not released yet; the work may release some.
            is_long: whether the work occupies the slot of a long job.
        """
        failure: CarryError = InternalError("the batch ended without an answer for this chunk")
        again: list[Job[P, R]] = []
        try:
            again = await work
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
                    self._mark_out_of_order(job)
                    self._queue.put_back(job)
                    if job.deadline_s < self._next_deadline_s:
                        self._set_timer(job.deadline_s, time.monotonic())
                elif not job.is_resolved:
                    job.resolve(self._map_error(job, failure))
            returned = {job.key for job in again}
            for key in held:
                self._release_stream(key, first=key in returned)

    def _detached_done(self, task: asyncio.Task[None]) -> None:
        del self._detached[task]
        self._wake()

    def _running_jobs(self) -> Iterator[Job[P, R]]:
        """The jobs of all batches, and the detached ones."""
        return chain.from_iterable(chain(self._batches.values(), self._detached.values()))
