"""Continuous (dynamic) batching across streams: one batcher with one queue per model.

Jobs wait in a fair queue (`fair_queue`): FIFO within a stream, round robin between requests.
Whenever fewer batches are in flight than allowed, the next one is formed from the jobs that are
ready: small batches at low load, full ones at high load. A batch that would be smaller than the
last one is delayed briefly (batching delay, `policy`). Each batch runs as a task of its own, so
that consecutive batches overlap in loading, computing and committing; many jobs that are ready at
once are split into two batches, so that one is computed while the other commits. A stream has at
most one job in flight until its batch releases the stream; a job that has to be retried returns to
its old place in the queue. Jobs whose caller cancelled, or whose deadline passed, are dropped while
a batch is formed. A failing batch fails only its own jobs. Each job is resolved exactly once.

Jobs that would wait too long are rejected at once (`policy`). One timer, set to the earliest
deadline, enforces all deadlines.

Use from one event loop: `submit` from any task, `drain` once at the end.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Container, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, Generic

import structlog

from service.core.errors import (
    CarryError,
    DeadlineExceeded,
    InternalError,
    ShuttingDown,
)
from service.engine.fair_queue import (
    BatchLimits,
    FairQueue,
    Job,
    JobSpec,
    OnResult,
    P,
    R,
    RunningBatch,
    Work,
)
from service.engine.policy import MIN_SPLIT_REQUESTS, Admission, BatchingDelay

DEADLINE_GRACE_S: Final = 0.05
"""How long after its deadline a job in a batch fails. The store call that its batch waits for ends
at the deadline too, and gives a more specific error."""

DEADLINE_TICK_S: Final = 0.01
"""Shortest interval of the deadline timer."""

ITEMS_PER_PART: Final = 128
"""A request of more items is queued in parts of this size, two at a time: one for the running batch
and one for the next."""

_EAGER_START: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
"""Where Python supports it, the task of a batch runs at once, until it first waits."""

log = structlog.get_logger(__name__)


class BatchRunner(ABC, Generic[P, R]):
    """Runs the batches of one model.

    Attributes:
        job_type: the type of its jobs, with the fields that it needs besides those of `Job`.
        may_split: whether two batches of half the size compute at about the cost of one, and one
            of them may compute while the other waits for the store; may change with each batch.
    """

    job_type: type[Job[P, R]] = Job
    may_split: bool = False

    @abstractmethod
    async def __call__(self, jobs: list[Any], batch: RunningBatch) -> Sequence[Job[P, R]]:
        """Run a batch: resolve its jobs, each of another stream, and return those to be retried.

        May release a stream before the batch ends, once the stream's next job can be computed.
        """

    def map_error(self, job: Any, error: CarryError) -> CarryError:
        """Map the batcher's own error for a job, which may be committing, to its caller's."""
        return error


class Batcher(Generic[P, R]):
    """The batcher of one model.

    Args:
        runner: runs the batches.
        limits: how large a batch may grow.
        max_queue: most waiting jobs; further ones are rejected.
        max_in_flight: most batches in flight.
        max_wait_s: longest expected wait in the queue; jobs with a longer one are rejected.
        on_shedding: called with True when load shedding starts, and with False once the queue is
            drained.

    Attributes:
        admission: its admission control; `submit` asks it, the callers of `enqueue_admitted` do.
    """

    def __init__(
        self,
        runner: BatchRunner[P, R],
        limits: BatchLimits,
        *,
        max_queue: int,
        max_in_flight: int,
        max_wait_s: float = math.inf,
        on_shedding: Callable[[bool], None] = lambda _: None,
    ):
        self._runner = runner
        self._max_in_flight = max_in_flight
        # a long job occupies a slot for many calls, so never the last
        self._queue: FairQueue[P, R] = FairQueue(limits, max_long=max(1, max_in_flight - 1))
        self.admission = Admission(
            self._queue, max_queue=max_queue, max_wait_s=max_wait_s, on_shedding=on_shedding
        )
        self._delay = BatchingDelay()
        self._next_batch = _Timer(self._form)
        self._next_deadline_s = math.inf
        self._deadline = _Timer(self._expire_jobs)
        self._running: set[RunningBatch] = set()
        self._in_flight = 0
        self._drained: asyncio.Event | None = None

    async def submit(
        self, specs: Sequence[JobSpec[P]], deadline_s: float = math.inf
    ) -> list[R | CarryError]:
        """Queue jobs, and wait for all results.

        More than `ITEMS_PER_PART` jobs are queued in parts, so that one caller cannot fill the
        queue.

        Args:
            deadline_s: time until which the caller waits, on the monotonic clock.

        Returns:
            The results in the order of the jobs: Overloaded if the queue is too long,
            DeadlineExceeded if the deadline passed, ShuttingDown if the service is stopping;
            otherwise whatever the batch resolved the job with.
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
        results: list[Any] = [None] * len(specs)
        unresolved = len(specs)
        is_done = asyncio.get_running_loop().create_future()

        def resolve(index: int, result: R | CarryError) -> None:
            nonlocal unresolved
            results[index] = result
            unresolved -= 1
            if not unresolved and not is_done.done():
                is_done.set_result(None)

        request = is_done if len(specs) > 1 else None
        jobs: list[Job[P, R]] = []
        now_s = time.monotonic()
        left_s, keys = deadline_s - now_s, [spec.key for spec in specs]
        all_admitted = self._drained is not None or self.admission.admits_all(keys, left_s)
        job_type = self._runner.job_type
        for index, spec in enumerate(specs):
            if not all_admitted:
                rejection = self.admission.check_admission(spec.key, left_s, index, len(jobs))
                if rejection is not None:
                    resolve(index, rejection.error())
                    continue
            on_result = partial(resolve, index)
            jobs.append(
                job_type(spec.payload, spec.key, spec.steps, now_s, deadline_s, on_result, request)
            )
        self._push(jobs, deadline_s, now_s)
        try:
            await is_done
        except asyncio.CancelledError:
            self.cancel(*jobs)
            raise
        return results

    def enqueue_admitted(
        self,
        payload: P,
        key: Hashable | None,
        steps: int,
        deadline_s: float,
        on_result: OnResult[R],
    ) -> Job[P, R]:
        """Queue one job that `admission` admitted, with nothing queued in between.

        Args:
            payload, key, steps: as those of `JobSpec`.
            on_result: called with the result, as `submit` describes it, but never Overloaded.
        """
        now_s = time.monotonic()
        job = self._runner.job_type(payload, key, steps, now_s, deadline_s, on_result)
        self._push([job], deadline_s, now_s)
        return job

    def _push(self, jobs: list[Job[P, R]], deadline_s: float, now_s: float) -> None:
        """Queue the jobs of a request, unless the service is stopping."""
        if self._drained is not None:
            error = ShuttingDown("the service is stopping and accepts no work")
            for job in jobs:
                asyncio.get_running_loop().call_soon(job.resolve, error)
        elif jobs:
            self._queue.push(*jobs)
            self._wake()
            if deadline_s < self._next_deadline_s:
                self._set_deadline(deadline_s, now_s)

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a batch."""
        return self._queue.waiting

    def count_jobs(self) -> int:
        """Count the jobs that wait or run."""
        return self._queue.waiting + sum(len(batch.jobs) for batch in self._running)

    def cancel(self, *jobs: Job[P, R]) -> None:
        """Cancel jobs whose caller disconnected; those that are queued are dropped."""
        for job in jobs:
            job.is_cancelled = True
        now_s = time.monotonic()
        if now_s < self._next_deadline_s:
            self._set_deadline(now_s, now_s)

    async def drain(self, timeout_s: float) -> None:
        """Drain the queue: reject new jobs, finish the accepted ones; once.

        Jobs that are not finished after `timeout_s` fail with ShuttingDown.
        """
        self._drained = asyncio.Event()
        self._continue()
        try:
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()
        except TimeoutError:
            await self._cancel_all()
        self.admission.note_ready(0.0, 0)
        self._next_batch.cancel()
        self._deadline.cancel()

    async def _cancel_all(self) -> None:
        for job in self._queue.clear():
            job.resolve(ShuttingDown("the service stopped before the chunk was processed"))
        tasks = [batch.task for batch in self._running if batch.task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _wake(self) -> None:
        """Form a batch in the next turn of the event loop, if one may start with as many jobs as
        the batching delay waits for."""
        awaited, has_slot = self._delay.awaited, self._in_flight < self._max_in_flight
        if awaited and has_slot and self._queue.startable >= awaited:
            self._delay.awaited = 0
            self._next_batch.set(0)

    def _form(self) -> None:
        """Start the next batch, unless the batching delay applies."""
        queue = self._queue
        # a batch of long jobs takes many calls, so it does not end soon
        ending_soon = self._in_flight - queue.long_batches
        delay_s = self._delay.decide(queue.startable, ending_soon)
        if delay_s is not None:
            self._next_batch.set(delay_s)
            return
        try:
            now_s = time.monotonic()
            self._start_batch(now_s)
            self.admission.note_ready(now_s, queue.ready)
        except Exception as error:
            log.exception("forming_failed", jobs=queue.waiting)
            for job in queue.clear():
                job.resolve(InternalError(f"no batch could be formed: {type(error).__name__}"))
        if queue.waiting or self._drained is not None:
            self._continue()

    def _continue(self) -> None:
        """Form the next batch if jobs wait, or let `drain` return once nothing is left to do."""
        if self._queue.waiting:
            self._wake()
        elif self._drained is not None and not self._running:
            self._drained.set()

    def _expire_jobs(self) -> None:
        """Drop the jobs that were cancelled, and fail those whose deadline passed."""
        now_s = time.monotonic()
        expired = self._queue.remove_expired(now_s)
        late: list[Job[P, R]] = []
        next_s = min((job.deadline_s for job in self._queue.jobs()), default=math.inf)
        for job in self._running_jobs():
            end_s = job.deadline_s + DEADLINE_GRACE_S
            if end_s <= now_s:
                late.append(job)
            elif not job.is_resolved:
                next_s = min(next_s, end_s)
        self._set_deadline(next_s, now_s)
        self._fail_expired(expired, "before it started", now_s)
        self._fail_expired(late, "before it was done", now_s)
        self._continue()

    def _set_deadline(self, deadline_s: float, now_s: float) -> None:
        """Set the timer to the earliest deadline."""
        self._next_deadline_s = deadline_s
        self._deadline.set(max(DEADLINE_TICK_S, deadline_s - now_s))

    def _fail_expired(self, jobs: Iterable[Job[P, R]], when: str, now_s: float) -> None:
        for job in jobs:
            if not job.is_resolved:
                waited_s = now_s - job.submitted_s
                error = DeadlineExceeded(f"the deadline expired {when}, after {waited_s:.3f} s")
                job.resolve(self._runner.map_error(job, error))

    def _mark_out_of_order(self, retried: Job[P, R]) -> None:
        """Mark the running jobs that were started after an earlier one, which is retried."""
        retried.is_out_of_order = False
        for job in self._running_jobs():
            if job.key == retried.key and job.number > retried.number:
                job.is_out_of_order = True

    def _start_batch(self, now_s: float) -> None:
        """Start one batch of ready jobs, if there are any."""
        queue = self._queue
        before, most_rows = queue.long_batches, queue.ready
        has_slots = self._max_in_flight > 1 and not self._in_flight
        is_split = has_slots and self._runner.may_split and queue.requests >= MIN_SPLIT_REQUESTS
        jobs, expired = queue.take(now_s, most_rows // 2 if is_split else most_rows)
        if jobs:
            self._delay.note_start(len(jobs), now_s)
            held = {job.key for job in jobs if job.key is not None}
            is_long = queue.long_batches > before
            batch = RunningBatch(
                jobs, held, self._release_streams, self._detach, has_slot=True, is_long=is_long
            )
            self._in_flight += 1
            self._start_task(batch, self._runner(jobs, batch))
        if expired:
            self._fail_expired(expired, "before it started", now_s)

    def _start_task(self, batch: RunningBatch, work: Awaitable[Sequence[Job[P, R]]]) -> None:
        self._running.add(batch)
        loop = asyncio.get_running_loop()
        batch.task = asyncio.Task(self._finish(batch, work), loop=loop, **_EAGER_START)

    def _release_streams(
        self, keys: Iterable[Hashable], first: Container[Hashable] = frozenset()
    ) -> None:
        if self._queue.release(keys, time.monotonic(), first):
            self._wake()

    def _detach(self, batch: RunningBatch, jobs: Sequence[Job[P, R]], work: Work) -> None:
        """Remove jobs from their batch, with the streams that it holds for them."""
        held = {job.key for job in jobs} & batch.held
        batch.held -= held
        removed = set(jobs)
        batch.jobs[:] = [job for job in batch.jobs if job not in removed]
        detached = RunningBatch(list(jobs), held, self._release_streams, self._detach)
        self._start_task(detached, work)

    async def _finish(self, batch: RunningBatch, work: Awaitable[Sequence[Job[P, R]]]) -> None:
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
            self._running.remove(batch)
            self._in_flight -= batch.has_slot
            queue = self._queue
            queue.long_batches -= batch.is_long
            retried = set(to_retry)
            self.admission.rate.done += len(batch.jobs) - len(retried)
            for job in batch.jobs:
                if job in retried:
                    job.attempts += 1
                    self._mark_out_of_order(job)
                    queue.put_back(job)
                elif not job.is_resolved:
                    failure = failure or InternalError("the batch ended without its result")
                    job.resolve(self._runner.map_error(job, failure))
            if batch.held:
                self._release_streams(batch.held, first={job.key for job in to_retry})
            if queue.waiting:
                self._delay.note_batch_end()
            else:
                self.admission.note_ready(0.0, 0)
            self._continue()

    def _running_jobs(self) -> Iterator[Job[P, R]]:
        """The jobs of all batches, and the detached ones."""
        return chain.from_iterable(batch.jobs for batch in self._running)


class _Timer:
    """One scheduled call of a function.

    Args:
        call: the function.
    """

    __slots__ = ("_call", "_handle")

    def __init__(self, call: Callable[[], None]):
        self._call = call
        self._handle: asyncio.Handle | None = None

    def set(self, delay_s: float) -> None:
        """Call after a delay instead of when it was set to; 0: in the next turn of the loop, after
        the callbacks already ready."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._call)

    def cancel(self) -> None:
        """Cancel the scheduled call."""
        if self._handle is not None:
            self._handle.cancel()
