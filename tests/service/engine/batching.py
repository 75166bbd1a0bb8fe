"""A batcher under test, whose batches wait for a gate."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.core.errors import CarryError, Overloaded
from service.engine.batcher import Batcher, BatchRunner
from service.engine.fair_queue import BatchLimits, Job, JobSpec, RunningBatch
from service.engine.policy import MAX_DELAY_TURNS, Admission, Rejection, shared_error
from tests.support.servers import becomes

Jobs = list[Job[str, str]]
UP_TO_8 = BatchLimits(8, 1000)


class Runs(BatchRunner[str, str]):
    """Records the batches; each waits for the gate.

    Attributes:
        releasing: whether a batch releases its streams before it ends.
        retries: how often the batch of a job returns it to be retried, by payload.
        gates: opened instead of `gate` for the batches of some jobs, by payload.
        seen: the jobs that were in a batch, by payload.
    """

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.releasing = False
        self.retries: dict[str, int] = {}
        self.gate = asyncio.Event()
        self.gates: dict[str, asyncio.Event] = {}
        self.seen: dict[str, Job[str, str]] = {}
        self._began = asyncio.Condition()

    async def record(self, jobs: Jobs) -> None:
        """Add a batch to those that `wait_for_batches` counts."""
        async with self._began:
            self.batches.append([job.payload for job in jobs])
            self._began.notify_all()
        self.seen |= {job.payload: job for job in jobs}

    async def __call__(self, jobs: Jobs, batch: RunningBatch) -> Jobs:
        """One batch."""
        await self.record(jobs)
        if self.releasing:
            await asyncio.sleep(0)
            for job in jobs:
                batch.release_streams([job.key])
        await self.gates.get(jobs[0].payload, self.gate).wait()
        to_retry = [job for job in jobs if job.attempts < self.retries.get(job.payload, 0)]
        for job in jobs:
            if job.payload.startswith("poison"):
                raise RuntimeError("poisoned")
            if job not in to_retry:
                job.resolve(job.payload.upper())
        return to_retry

    async def wait_for_batches(self, count: int) -> None:
        """Wait until this many batches have started."""
        async with asyncio.timeout(60), self._began:
            await self._began.wait_for(lambda: len(self.batches) >= count)


class Paced(Runs):
    """Each batch of 8 takes 0.4 s of a simulated clock; the last ones wait for the gate."""

    def __init__(self, patched: pytest.MonkeyPatch, batches: int = 3) -> None:
        super().__init__()
        self.now_s = 1000.0
        self._free = batches
        patched.setattr("service.engine.batcher.time", self)

    def monotonic(self) -> float:
        return self.now_s

    async def __call__(self, jobs: Jobs, batch: RunningBatch) -> Jobs:
        self.now_s += 0.4
        if not self._free:
            return await super().__call__(jobs, batch)
        self._free -= 1
        self.batches.append([job.payload for job in jobs])
        for job in jobs:
            job.resolve(job.payload.upper())
        return []


def no_room(admission: Admission, *_: object) -> Rejection:
    """Replacement of `Admission.check_admission` that admits nothing."""
    return Rejection(0, admission.rate.per_s, of_stream=False)


def patch_admission(
    patched: pytest.MonkeyPatch, check_admission: Callable[..., Rejection | None] = no_room
) -> None:
    """Let a function decide about each job, also where all of a request would be admitted."""
    patched.setattr(Admission, "admits_all", lambda *_: False)
    patched.setattr(Admission, "check_admission", check_admission)


def check_admission(batcher: Batcher[str, str], key: str, left_s: float) -> Overloaded | None:
    """The error that a job would be rejected with now."""
    rejection = batcher.admission.check_admission(key, left_s)
    return None if rejection is None else shared_error(rejection)


async def wait_for_capacity(batcher: Batcher[str, str]) -> None:
    """Wait until admission control accepts one more job."""
    await becomes(lambda: check_admission(batcher, "new", 60) is None, "capacity")


async def submit(
    batcher: Batcher[str, str],
    payload: str,
    key: str | None = None,
    *,
    steps: int = 1,
    deadline_s: float = math.inf,
) -> str:
    """Submit one job, by default of the stream that is named as the payload; raises its error."""
    [result] = await batcher.submit([JobSpec(payload, key or payload, steps)], deadline_s)
    if isinstance(result, CarryError):
        raise result
    return result


def start(*arguments: Any, **options: Any) -> asyncio.Task[str]:
    """`submit` as a task."""
    return asyncio.create_task(submit(*arguments, **options))


def start_each(
    batcher: Batcher[str, str], payloads: Iterable[str], *rest: Any, **options: Any
) -> list[asyncio.Task[str]]:
    """`submit` each of some payloads as a task."""
    return [start(batcher, payload, *rest, **options) for payload in payloads]


async def turns() -> None:
    """Run the event loop until every batch that may start has started."""
    for _ in range(MAX_DELAY_TURNS + 4):
        await asyncio.sleep(0)


@asynccontextmanager
async def batching(
    runs: Runs,
    *,
    in_flight: int = 1,
    queue: int = 100,
    limits: BatchLimits = UP_TO_8,
    **options: Any,
) -> AsyncIterator[Batcher[str, str]]:
    """A batcher with batches of 8 by default, drained at the end."""
    batcher = Batcher(runs, limits, max_queue=queue, max_in_flight=in_flight, **options)
    try:
        yield batcher
    finally:
        runs.gate.set()
        await batcher.drain(5)
