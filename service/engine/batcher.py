"""Continuous batching across streams: one owner task per model.

Jobs wait in one queue. Whenever fewer batches are in flight than allowed, the owner forms the
next one from whatever waits (no timer: small batches at low load, full ones at high load) and
runs it as a task of its own, so that loading, computing and committing of neighbouring
batches overlap. A stream never has two jobs in flight. Jobs whose caller left are dropped
while forming; a batch that fails fails its own jobs only. Each job's future is resolved once.

Use from one event loop: `start` once, `submit` from any task, `drain` once at the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog

from service.engine.policy import BatchLimits, form
from service.errors import CarryError, InternalError, Overloaded, ShuttingDown

P = TypeVar("P")
R = TypeVar("R")

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Job(Generic[P, R]):
    """One caller's work and where its result goes."""

    payload: P
    key: Hashable | None
    steps: int
    future: asyncio.Future[R]
    submitted_s: float = field(default_factory=time.monotonic)

    def resolve(self, result: R) -> None:
        """Give the caller its result, unless it left."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Give the caller its error, unless it left."""
        if not self.future.done():
            self.future.set_exception(error)


class Batcher(Generic[P, R]):
    """The queue and the owner task of one model.

    Args:
        run: resolves or fails every job it is given; called with disjoint streams.
        limits: how large a batch may grow.
        max_queue: waiting jobs beyond which `submit` is refused.
        max_in_flight: batches that may be under way at once.
        on_depth: told the queue's length whenever it changed.
    """

    def __init__(
        self,
        run: Callable[[list[Job[P, R]]], Awaitable[None]],
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
        self._busy: set[Hashable] = set()
        self._long = 0
        self._batches: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._stopping = False
        self._owner: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the owner task; once, inside the event loop."""
        self._owner = asyncio.get_running_loop().create_task(self._own())

    async def submit(self, payload: P, key: Hashable | None, steps: int) -> R:
        """Queue one job and wait for its result.

        Raises:
            Overloaded: the queue is full.
            ShuttingDown: the service is stopping.
            CarryError: whatever the job failed with.
        """
        if self._stopping:
            raise ShuttingDown("the service is stopping and takes no further work")
        if len(self._queue) >= self._max_queue:
            raise Overloaded(
                f"{len(self._queue)} chunks are waiting, which is the limit", retry_after_s=1
            )
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._on_depth(len(self._queue) + 1)
        self._queue.append(Job(payload, key, steps, future))
        self._wake.set()
        return await future

    async def drain(self, timeout_s: float) -> None:
        """Take no new jobs, finish the accepted ones, stop the owner; once.

        Jobs that are not done after `timeout_s` fail with ShuttingDown.
        """
        self._stopping = True
        self._wake.set()
        if self._owner is None:
            return
        _, late = await asyncio.wait({self._owner}, timeout=timeout_s)
        if late:
            self._owner.cancel()
            for batch in self._batches:
                batch.cancel()
            for job in self._queue:
                job.fail(ShuttingDown("the service stopped before the chunk was processed"))
            await asyncio.wait({self._owner, *self._batches})

    async def _own(self) -> None:
        while not (self._stopping and not self._queue and not self._batches):
            await self._wake.wait()
            self._wake.clear()
            try:
                self._form()
            except Exception as error:
                log.exception("forming_failed", jobs=len(self._queue))
                for job in self._queue:
                    job.fail(InternalError(f"no batch could be formed: {type(error).__name__}"))
                self._queue = []

    def _form(self) -> None:
        """Start as many batches as may be under way."""
        self._queue = [job for job in self._queue if not job.future.done()]
        while len(self._batches) < self._max_in_flight and self._start_batch():
            pass
        self._on_depth(len(self._queue))

    def _start_batch(self) -> bool:
        # Long jobs hold their slot for many calls: they never take the last one.
        long_ones = self._long < max(1, self._max_in_flight - 1)
        chosen = form(self._queue, self._busy, self._limits, long_ones=long_ones)
        if not chosen:
            return False
        jobs = [self._queue[index] for index in chosen]
        taken = set(chosen)
        self._queue = [job for index, job in enumerate(self._queue) if index not in taken]
        self._busy.update(job.key for job in jobs if job.key is not None)
        task = asyncio.get_running_loop().create_task(self._run_batch(jobs))
        self._batches.add(task)
        if any(job.steps > self._limits.long_steps for job in jobs):
            self._long += 1
            task.add_done_callback(self._long_done)
        task.add_done_callback(self._batch_done)
        return True

    def _long_done(self, _: asyncio.Task[None]) -> None:
        self._long -= 1

    def _batch_done(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._wake.set()

    async def _run_batch(self, jobs: list[Job[P, R]]) -> None:
        try:
            await self._run(jobs)
            for job in jobs:
                job.fail(InternalError("the batch ended without an answer for this chunk"))
        except CarryError as error:
            for job in jobs:
                job.fail(error)
        except asyncio.CancelledError:
            for job in jobs:
                job.fail(ShuttingDown("the service stopped while the chunk was processed"))
            raise
        except Exception as error:
            log.exception("batch_failed", jobs=len(jobs))
            for job in jobs:
                job.fail(InternalError(f"the batch failed: {type(error).__name__}"))
        finally:
            self._busy.difference_update(job.key for job in jobs if job.key is not None)
