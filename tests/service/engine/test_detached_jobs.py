"""Detached jobs: they hold their streams, but no slot of a batch."""

from __future__ import annotations

import asyncio

import pytest

from service.core.errors import DeadlineExceeded, InternalError, ShuttingDown
from service.engine.fair_queue import RunningBatch
from tests.service.engine.batching import Jobs, Running, Runs, batching, start, submit
from tests.service.engine.test_batcher import turns
from tests.service.engine.test_batcher_deadlines import soon


class Detaching(Runs):
    """Detaches jobs named `late...` at their first attempt, until the gate opens.

    Attributes:
        fails: the exception that their work ends with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fails: Exception | None = None

    async def __call__(self, jobs: Jobs, batch: RunningBatch) -> Jobs:
        self.batches.append([job.payload for job in jobs])
        late = [job for job in jobs if job.payload.startswith("late") and not job.attempts]
        if late:
            batch.detach(late, self._wait(late))
        for job in jobs:
            if job not in late:
                job.resolve(job.payload.upper())
        return []

    async def _wait(self, late: Jobs) -> Jobs:
        await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        return late


async def test_detached_jobs_hold_no_slot_and_keep_their_order() -> None:
    runs = Detaching()
    async with batching(runs) as batcher, asyncio.timeout(5):
        late = [start(batcher, f"late{n}", "s") for n in range(2)]
        assert await submit(batcher, "a") == "A"
        assert await submit(batcher, "b") == "B"
        await turns()
        assert runs.batches == [["a", "late0"], ["b"]], "its stream waits for it"
        runs.gate.set()
        assert await asyncio.gather(*late) == ["LATE0", "LATE1"]
    assert runs.batches[2][0] == "late0"


async def test_detached_jobs_fail_at_their_deadlines() -> None:
    runs = Detaching()
    async with batching(runs) as batcher, asyncio.timeout(5):
        with pytest.raises(DeadlineExceeded, match="before it was done"):
            await submit(batcher, "late", deadline_s=soon())
        assert await submit(batcher, "a") == "A"


async def test_detached_jobs_fail_independently() -> None:
    runs = Detaching()
    runs.fails = RuntimeError("unforeseen")
    runs.gate.set()
    async with batching(runs) as batcher, asyncio.timeout(5):
        late = start(batcher, "late", "s")
        assert await submit(batcher, "a") == "A"
        with pytest.raises(InternalError):
            await late
        assert await submit(batcher, "b", "s") == "B"


async def test_drain_waits_for_detached_jobs_within_its_timeout() -> None:
    runs = Detaching()
    async with batching(runs) as batcher:
        late = start(batcher, "late", "s")
        await turns()
        draining = asyncio.create_task(batcher.drain(5))
        await turns()
        assert not draining.done()
        runs.gate.set()
        await draining
        assert await late == "LATE"
    runs = Detaching()
    async with batching(runs) as batcher:
        late = start(batcher, "late", "s")
        await turns()
        await batcher.drain(0.01)
        with pytest.raises(ShuttingDown):
            await late


async def test_job_after_a_retried_detached_job_is_out_of_order() -> None:
    """Its stream was released before it was detached, as it is while its commit is awaited."""
    runs, seen = Detaching(), {}
    hold = asyncio.Event()

    async def run(jobs: Jobs, batch: RunningBatch) -> Jobs:
        (job,) = jobs
        seen[job.payload] = job
        batch.release_streams([job.key])
        if job.payload == "next":
            await hold.wait()
        return await runs(jobs, batch)

    async with batching(runs, in_flight=2) as batcher, asyncio.timeout(5):
        batcher._runner = Running(run)
        first = start(batcher, "late", "s")
        await turns()
        behind = start(batcher, "next", "s")
        await turns()
        runs.gate.set()
        await turns()
        assert seen["next"].is_out_of_order
        hold.set()
        assert await asyncio.gather(first, behind) == ["LATE", "NEXT"]
