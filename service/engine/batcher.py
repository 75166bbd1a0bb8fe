"""Continuous batching across streams: one queue and one owner per model.

Jobs wait in one queue, in the order in which they came. Whenever fewer batches are under way
than allowed, the next one is formed from whatever waits (no timer: small batches at low load,
full ones at high load) and runs as a task of its own, so that loading, computing and
committing of neighbouring batches overlap. A stream has at most one job in the hands of a
batch, until the batch releases it; a job that has to be done again takes its old place in the
queue. Jobs whose caller left are dropped while forming; a batch that fails fails its own jobs
only. Each job is settled once.

Use from one event loop: `submit` from any task, `drain` once at the end.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

import structlog

from service.engine.policy import BatchLimits, form
from service.errors import CarryError, InternalError, Overloaded, ShuttingDown

P = TypeVar("P")
R = TypeVar("R")

Release = Callable[[Hashable], None]

log = structlog.get_logger(__name__)


class Request(NamedTuple, Generic[P]):
    """What a caller wants done.

    Attributes:
        key: the stream, or None for work that continues no stream.
        steps: steps it needs.
    """

    payload: P
    key: Hashable | None
    steps: int


Results = asyncio.Future[list[R | CarryError]]


class Ticket(Generic[R]):
    """One caller, who waits for all of its jobs."""

    __slots__ = ("_left", "_results", "future")

    def __init__(self, jobs: int):
        self.future: Results[R] = asyncio.get_running_loop().create_future()
        self._results: list[R | CarryError | None] = [None] * jobs
        self._left = jobs

    def settle(self, index: int, result: R | CarryError) -> None:
        """Give the caller one result, unless it left; the last one wakes it."""
        self._results[index] = result
        self._left -= 1
        if not self._left and not self.future.done():
            self.future.set_result([found for found in self._results if found is not None])


@dataclass(slots=True, eq=False)
class Job(Generic[P, R]):
    """One request on its way.

    Attributes:
        number: its place in the order of all jobs.
        attempts: how often it was in a batch before.
        submitted_s: when it came, of the monotonic clock.
    """

    payload: P
    key: Hashable | None
    steps: int
    number: int
    submitted_s: float
    ticket: Ticket[R]
    index: int
    attempts: int = 0
    settled: bool = False

    def settle(self, result: R | CarryError) -> None:
        """Give the caller its result or its error, once."""
        if not self.settled:
            self.settled = True
            self.ticket.settle(self.index, result)


Run = Callable[[list[Job[P, R]], Release], Awaitable[list[Job[P, R]]]]
"""Settles the jobs of a batch, which are of different streams. May release a stream's next job
before that, once it can go on from what this one left. Returns the jobs to be done again."""


class Batcher(Generic[P, R]):
    """The queue of one model.

    Args:
        limits: how large a batch may grow.
        max_queue: waiting jobs beyond which `submit` refuses.
        max_in_flight: batches that may be under way at once.
        on_depth: told the queue's length whenever a batch was formed.
    """

    def __init__(
        self,
        run: Run[P, R],
        limits: BatchLimits,
        *,
        max_queue: int,
        max_in_flight: int,
        on_depth: Callable[[int], None],
    ):
        self._run = run
        self._limits = limits
        self._max_queue = max_queue
        self._max_in_flight = max_in_flight
        self._on_depth = on_depth
        self._queue: list[Job[P, R]] = []
        self._numbers = count()
        self._busy: set[Hashable] = set()
        self._long = 0
        self._batches: set[asyncio.Task[None]] = set()
        self._forming = False
        self._has_leavers = False
        self._stopping = False
        self._drained = asyncio.Event()

    def enqueue(self, requests: Sequence[Request[P]]) -> Results[R]:
        """Queue jobs; at least one.

        Returns:
            A future of all their results, in the order of the requests. A request is answered
            Overloaded where the queue is full and ShuttingDown where the service is stopping;
            else with whatever its job was settled with.
        """
        ticket: Ticket[R] = Ticket(len(requests))
        now_s = time.monotonic()
        for index, (payload, key, steps) in enumerate(requests):
            if self._stopping:
                ticket.settle(index, ShuttingDown("the service is stopping, no work is taken"))
            elif len(self._queue) >= self._max_queue:
                ticket.settle(index, self._overloaded())
            else:
                number = next(self._numbers)
                self._queue.append(Job(payload, key, steps, number, now_s, ticket, index))
        self._wake()
        return ticket.future

    def leave(self, results: Results[R]) -> None:
        """Their caller is gone: what of them still waits is dropped."""
        results.cancel()
        self._has_leavers = True

    async def submit(self, requests: Sequence[Request[P]]) -> list[R | CarryError]:
        """Queue jobs and wait for all their results; see `enqueue`."""
        if not requests:
            return []
        results = self.enqueue(requests)
        try:
            return await results
        except asyncio.CancelledError:
            self.leave(results)
            raise

    def _overloaded(self) -> Overloaded:
        waiting = len(self._queue)
        return Overloaded(f"{waiting} chunks are waiting, which is the limit", retry_after_s=1)

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

    async def _abandon(self) -> None:
        for job in self._queue:
            job.settle(ShuttingDown("the service stopped before the chunk was processed"))
        self._queue = []
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
        """Start as many batches as may be under way."""
        self._forming = False
        try:
            if self._has_leavers:
                self._has_leavers = False
                self._queue = [job for job in self._queue if not job.ticket.future.cancelled()]
            while len(self._batches) < self._max_in_flight and self._start_batch():
                pass
            self._on_depth(len(self._queue))
        except Exception as error:
            log.exception("forming_failed", jobs=len(self._queue))
            for job in self._queue:
                job.settle(InternalError(f"no batch could be formed: {type(error).__name__}"))
            self._queue = []
        if self._stopping and not self._queue and not self._batches:
            self._drained.set()

    def _start_batch(self) -> bool:
        # Long jobs hold their slot for many calls: they never take the last one.
        long_ones = self._long < max(1, self._max_in_flight - 1)
        chosen = form(self._queue, self._busy, self._limits, long_ones=long_ones)
        if not chosen:
            return False
        jobs = [self._queue[index] for index in chosen]
        if chosen[-1] == len(chosen) - 1:
            del self._queue[: len(chosen)]
        else:
            taken = set(chosen)
            self._queue = [job for index, job in enumerate(self._queue) if index not in taken]
        self._busy.update(job.key for job in jobs if job.key is not None)
        is_long = any(job.steps > self._limits.long_steps for job in jobs)
        self._long += is_long
        task = asyncio.get_running_loop().create_task(self._run_batch(jobs, is_long))
        self._batches.add(task)
        task.add_done_callback(self._batch_done)
        return True

    def _batch_done(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._wake()

    async def _run_batch(self, jobs: list[Job[P, R]], is_long: bool) -> None:
        held = {job.key for job in jobs if job.key is not None}

        def release(key: Hashable) -> None:
            if key in held:
                held.discard(key)
                self._busy.discard(key)
                self._wake()

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
            for job in jobs:
                if job in waiting:
                    job.attempts += 1
                    insort(self._queue, job, key=attrgetter("number"))
                else:
                    job.settle(failure)
