"""Continuous (dynamic) batching across streams: one batcher with one queue per model.

Jobs wait in a fair queue (`fair_queue`): FIFO within a stream, round robin between requests.
Whenever fewer batches are in flight than allowed, the next one is formed from the jobs that are
ready: small batches at low load, full ones at high load. A batch that would be smaller than the
last one is delayed briefly (batching delay, `policy`). Each batch runs as a task of its own, so
that consecutive batches overlap in loading, computing and committing. A stream has at most one job
in flight until its batch releases the stream; a job that has to be retried returns to its old place
in the queue. Jobs whose caller cancelled, or whose deadline passed, are dropped while a batch is
formed. A failing batch fails only its own jobs. Each job is resolved exactly once.

Jobs that would wait too long are rejected at once (`policy`). One timer, set to the earliest
deadline, enforces all deadlines.

Use from one event loop: `submit` from any task, `drain` once at the end.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable, Container, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, count
from typing import Any, Final, Generic

import structlog

from service.core.errors import (
    CarryError,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    ShuttingDown,
)
from service.engine.fair_queue import (
    BatchLimits,
    DrainRate,
    FairQueue,
    Job,
    JobSpec,
    OnResult,
    P,
    R,
    Run,
    RunningBatch,
    Work,
)
from service.engine.policy import LINGER_TICKS, Admission, BatchDelay, batching_delay, shared_error
from service.engine.ticket import Ticket

DEADLINE_GRACE_S: Final = 0.05
"""How long after its deadline a job in a batch fails. The store call that its batch waits for ends
at the deadline too, and gives a more specific error."""

DEADLINE_TICK_S: Final = 0.01
"""Shortest interval of the deadline timer."""

LINGER_TICK_S: Final = 0.001
"""Resolution of the event loop's timers."""

ITEMS_PER_PART: Final = 128
"""A request of more items is queued in parts of this size, two at a time: one for the running batch
and one for the next."""

_EAGER_START: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
"""Where Python supports it, the task of a batch runs at once, until it first waits."""

log = structlog.get_logger(__name__)


class Batcher(Generic[P, R]):
    """The batcher of one model.

    Args:
        run: runs a batch.
        limits: how large a batch may grow.
        max_queue: most waiting jobs; further ones are rejected.
        max_in_flight: most batches in flight.
        max_wait_s: longest expected wait in the queue; jobs with a longer one are rejected.
        on_shedding: called with True when load shedding starts, and with False once the queue is
            drained.
        map_error: maps the batcher's own error for a job, which may be committing, to the error
            that the caller gets.
        job_type: the type of its jobs, with the further fields that `run` needs.
    """

    def __init__(
        self,
        run: Run[P, R],
        limits: BatchLimits,
        *,
        max_queue: int,
        max_in_flight: int,
        max_wait_s: float = math.inf,
        on_shedding: Callable[[bool], None] = lambda _: None,
        map_error: Callable[[Any, CarryError], CarryError] = lambda _, error: error,
        job_type: type[Job[P, R]] = Job,
    ):
        self._run = run
        self._limits = limits
        self._max_in_flight = max_in_flight
        # a long job occupies a slot for many calls, so never the last
        self._max_long = max(1, max_in_flight - 1)
        self._map_error = map_error
        self._job_type = job_type
        self._queue: FairQueue[P, R] = FairQueue(limits)
        self._numbers = count()
        self._long = 0
        self._batches: set[RunningBatch] = set()
        self._detached: set[RunningBatch] = set()
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
        self._has_expired = False
        self._turns = 0
        self._last_rows = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._drained = asyncio.Event()

    def enqueue(self, specs: Sequence[JobSpec[P]], deadline_s: float = math.inf) -> Ticket[P, R]:
        """Queue one or more jobs without waiting for them.

        Args:
            deadline_s: time until which the caller waits, on the monotonic clock.

        Returns:
            A ticket for their results. A result is Overloaded if the queue is too long,
            DeadlineExceeded if the deadline passed, ShuttingDown if the service is stopping;
            otherwise whatever the batch resolved the job with.
        """
        ticket: Ticket[P, R] = Ticket(len(specs))
        request = ticket if len(specs) > 1 else None
        jobs, now_s = ticket.jobs, time.monotonic()
        left_s, keys = deadline_s - now_s, [spec.key for spec in specs]
        all_admitted = self._stopping or self._admission.admits_all(keys, left_s)
        for index, spec in enumerate(specs):
            payload, key, steps = spec.payload, spec.key, spec.steps
            if not all_admitted:
                rejection = self._admission.check_admission(key, left_s, index, len(jobs))
                if rejection is not None:
                    ticket.resolve(index, rejection.error())
                    continue
            on_result = partial(ticket.resolve, index)
            number = next(self._numbers)
            job = self._job_type(payload, key, steps, number, now_s, deadline_s, on_result, request)
            jobs.append(job)
        self._push(jobs, deadline_s, now_s)
        return ticket

    def enqueue_admitted(
        self,
        payload: P,
        key: Hashable | None,
        steps: int,
        deadline_s: float,
        on_result: OnResult[R],
    ) -> Job[P, R]:
        """Queue one job that `check_admission` admitted, with nothing queued in between.

        Args:
            payload, key, steps: as those of `JobSpec`.
            on_result: called with the result, as `enqueue` describes it, but never Overloaded.
        """
        now_s = time.monotonic()
        number = next(self._numbers)
        job = self._job_type(payload, key, steps, number, now_s, deadline_s, on_result)
        self._push([job], deadline_s, now_s)
        return job

    def _push(self, jobs: list[Job[P, R]], deadline_s: float, now_s: float) -> None:
        """Queue the jobs of a request, unless the service is stopping."""
        if self._stopping:
            error = ShuttingDown("the service is stopping and accepts no work")
            for job in jobs:
                asyncio.get_running_loop().call_soon(job.resolve, error)
        elif jobs:
            if self._queue.push(*jobs, long_ones=self._long < self._max_long):
                self._wake()
            if deadline_s < self._next_deadline_s:
                self._set_timer(deadline_s, now_s)

    def check_admission(self, key: Hashable | None, left_s: float) -> Overloaded | None:
        """Return the error that admission control would reject a request with now; None if it would
        be admitted. Lets a caller reject a request before it is parsed. The error is shared between
        calls, so it must not be raised.

        Args:
            left_s: time until the request's deadline.
        """
        rejection = self._admission.check_admission(key, left_s)
        return None if rejection is None else shared_error(rejection)

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a batch."""
        return len(self._queue)

    def count_jobs(self) -> int:
        """Count the jobs that wait or run."""
        return len(self._queue) + sum(len(batch.jobs) for batch in self._batches)

    def cancel(self, *jobs: Job[P, R]) -> None:
        """Cancel jobs whose caller disconnected; those that are queued are dropped."""
        for job in jobs:
            job.is_cancelled = True
        now_s = time.monotonic()
        if now_s < self._next_deadline_s:
            self._set_timer(now_s, now_s)

    async def submit(
        self, specs: Sequence[JobSpec[P]], deadline_s: float = math.inf
    ) -> list[R | CarryError]:
        """Queue jobs as `enqueue` does, and wait for all results.

        More than `ITEMS_PER_PART` jobs are queued in parts, so that one caller cannot fill the
        queue.
        """
        if len(specs) <= ITEMS_PER_PART:
            return await self._submit(specs, deadline_s)
        parts = [specs[at : at + ITEMS_PER_PART] for at in range(0, len(specs), ITEMS_PER_PART)]
        two_parts = asyncio.Semaphore(2)

        async def submit(part: Sequence[JobSpec[P]]) -> list[R | CarryError]:
            async with two_parts:
                return await self._submit(part, deadline_s)

        return list(chain.from_iterable(await asyncio.gather(*map(submit, parts))))

    async def _submit(self, specs: Sequence[JobSpec[P]], deadline_s: float) -> list[R | CarryError]:
        if not specs:
            return []
        ticket = self.enqueue(specs, deadline_s)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            self.cancel(*ticket.jobs)
            # the jobs refer to the ticket, and no last result will clear them
            ticket.jobs.clear()
            raise

    async def drain(self, timeout_s: float) -> None:
        """Drain the queue: reject new jobs, finish the accepted ones; once.

        Jobs that are not finished after `timeout_s` fail with ShuttingDown.
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
        tasks = [batch.task for batch in chain(self._batches, self._detached) if batch.task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _wake(self) -> None:
        """Form a batch in the next turn of the event loop, after the callbacks already ready."""
        if not self._forming and len(self._batches) < self._max_in_flight:
            self._forming = True
            asyncio.get_running_loop().call_soon(self._form)

    def _continue(self) -> None:
        """Form the next batch after one has ended, if jobs are queued.

        Also if jobs have expired: `_start` then resets the drain rate, and load shedding ends.
        """
        if self._queue or self._has_expired:
            self._wake()
        elif self._stopping:
            self._complete_drain()

    def _form(self) -> None:
        """Start a batch, unless the batching delay applies."""
        # a batch of long jobs takes many calls, so it does not end soon
        ending_soon = len(self._batches) - self._long
        ready = self._queue.ready(long_ones=self._long < self._max_long)
        delay = batching_delay(ready, self._last_rows, ending_soon, self._turns)
        if delay is BatchDelay.LOOP_TURN:
            self._turns += 1
            asyncio.get_running_loop().call_soon(self._form)
            return
        self._forming, self._turns = False, 0
        if delay is BatchDelay.NONE:
            self._start()
        elif self._linger_timer is None:
            self._linger()

    def _linger(self, ticks: int = LINGER_TICKS) -> None:
        """Start a batch after some timer ticks; a batch that blocks the loop may swallow one."""
        if ticks:
            self._linger_timer = asyncio.get_running_loop().call_later(
                LINGER_TICK_S, self._linger, ticks - 1
            )
        else:
            self._start()

    def _start(self) -> None:
        """Start a batch, if the limit of batches in flight allows it, and schedule the next one."""
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        try:
            now_s = time.monotonic()
            started = len(self._batches) < self._max_in_flight and self._start_batch(now_s)
            ready = self._queue.ready()
            self._rate.note(now_s, ready)
            if not ready:
                self._admission.stop_shedding()
            elif started and self._queue.ready(long_ones=self._long < self._max_long):
                self._wake()
            self._has_expired = False
        except Exception as error:
            log.exception("forming_failed", jobs=len(self._queue))
            for job in self._queue.clear():
                job.resolve(InternalError(f"no batch could be formed: {type(error).__name__}"))
        if self._stopping:
            self._complete_drain()

    def _complete_drain(self) -> None:
        """Let `drain` return if nothing is left to do."""
        if self._is_idle:
            self._drained.set()

    def _expire_jobs(self, now_s: float) -> None:
        """Drop the jobs that were cancelled, and fail those whose deadline passed."""
        expired = self._queue.remove(lambda job: job.is_cancelled or job.deadline_s <= now_s)
        running = [job for job in self._running_jobs() if not job.is_resolved]
        ends_s = [job.deadline_s + DEADLINE_GRACE_S for job in running]
        deadlines_s = [job.deadline_s for job in self._queue.jobs()]
        deadlines_s += [end_s for end_s in ends_s if end_s > now_s]
        self._set_timer(min(deadlines_s, default=math.inf), now_s)
        self._has_expired |= bool(expired)
        for job in expired:
            self._fail_expired(job, "before it started", now_s)
        for job, end_s in zip(running, ends_s, strict=True):
            if end_s <= now_s:
                self._fail_expired(job, "before it was done", now_s)

    def _expire(self, now_s: float, job: Job[P, R]) -> bool:
        """Fail a queued job whose deadline passed; returns whether nobody waits for it."""
        if job.is_cancelled:
            return True
        if job.deadline_s <= now_s:
            self._fail_expired(job, "before it started", now_s)
            return True
        return False

    def _fail_expired(self, job: Job[P, R], when: str, now_s: float) -> None:
        waited_s = now_s - job.submitted_s
        error = DeadlineExceeded(f"the deadline expired {when}, after {waited_s:.3f} s")
        job.resolve(self._map_error(job, error))

    def _set_timer(self, next_deadline_s: float, now_s: float) -> None:
        """Set the timer to the earliest deadline."""
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
        if self._stopping:
            self._complete_drain()

    def _mark_out_of_order(self, retried: Job[P, R]) -> None:
        """Mark the running jobs that were started after an earlier one, which is retried."""
        retried.is_out_of_order = False
        for job in self._running_jobs():
            if job.key == retried.key and job.number > retried.number:
                job.is_out_of_order = True

    def _start_batch(self, now_s: float) -> bool:
        """Start one batch of ready jobs, if there are any; returns whether it was started."""
        expire = None
        if now_s >= self._next_deadline_s:
            # a caller cancelled, or a deadline passed
            expire = partial(self._expire, now_s)
        jobs = self._queue.take(expire, long_ones=self._long < self._max_long)
        if not jobs:
            return False
        self._last_rows = len(jobs)
        held = {job.key for job in jobs if job.key is not None}
        is_long = jobs[0].steps > self._limits.long_steps
        batch = RunningBatch(jobs, held, self._release_streams, self._detach, is_long=is_long)
        self._long += is_long
        self._start_task(batch, self._run(jobs, batch), self._batches)
        return True

    def _start_task(
        self,
        batch: RunningBatch,
        work: Awaitable[Sequence[Job[P, R]]],
        running: set[RunningBatch],
    ) -> None:
        """Start the task of a batch, which is in the set `running` until the task ends."""
        running.add(batch)
        loop = asyncio.get_running_loop()
        batch.task = asyncio.Task(self._finish(batch, work, running), loop=loop, **_EAGER_START)

    def _release_streams(
        self, keys: Iterable[Hashable], first: Container[Hashable] = frozenset()
    ) -> None:
        for backlog in self._queue.release(*keys, first=first):
            backlog.note_release(time.monotonic())
            self._wake()

    def _detach(self, batch: RunningBatch, jobs: Sequence[Job[P, R]], work: Work) -> None:
        """Remove jobs from their batch, with the streams that it holds for them."""
        held = {job.key for job in jobs} & batch.held
        batch.held -= held
        removed = set(jobs)
        batch.jobs[:] = [job for job in batch.jobs if job not in removed]
        detached = RunningBatch(list(jobs), held, self._release_streams, self._detach)
        self._start_task(detached, work, self._detached)

    async def _finish(
        self,
        batch: RunningBatch,
        work: Awaitable[Sequence[Job[P, R]]],
        running: set[RunningBatch],
    ) -> None:
        """Await the work on a batch, then resolve or requeue its jobs and release its streams."""
        failure: CarryError | None = None
        to_retry: Sequence[Job[P, R]] = []
        try:
            to_retry = await work
        except CarryError as error:
            failure = error
        except asyncio.CancelledError:
            failure = ShuttingDown("the service stopped while the chunk was processed")
            raise
        except Exception as error:
            log.exception("batch_failed", jobs=len(batch.jobs))
            failure = InternalError(f"the batch failed: {type(error).__name__}")
        finally:
            running.remove(batch)
            self._long -= batch.is_long
            retried = set(to_retry)
            self._rate.done += len(batch.jobs) - len(retried)
            for job in batch.jobs:
                if job in retried:
                    job.attempts += 1
                    self._mark_out_of_order(job)
                    self._queue.put_back(job)
                    if job.deadline_s < self._next_deadline_s:
                        self._set_timer(job.deadline_s, time.monotonic())
                elif not job.is_resolved:
                    failure = failure or InternalError("the batch ended without its result")
                    job.resolve(self._map_error(job, failure))
            if batch.held:
                self._release_streams(batch.held, first={job.key for job in to_retry})
            self._continue()

    def _running_jobs(self) -> Iterator[Job[P, R]]:
        """The jobs of all batches, and the detached ones."""
        return chain.from_iterable(batch.jobs for batch in chain(self._batches, self._detached))
