"""Detached jobs: they hold their streams, but no slot of a batch."""

from __future__ import annotations

import asyncio

import pytest

from service.core.errors import DeadlineExceeded, InternalError, ShuttingDown
from service.engine.fair_queue import RunningBatch
from tests.service.engine.batching import Jobs, Runs, batching, start, submit, turns
from tests.support.clock import ManualClock


class Detaching(Runs):
    """Detaches jobs named `late...` at their first attempt, until the gate opens.

    Attributes:
        fails: the exception that their work ends with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fails: Exception | None = None

    async def __call__(self, jobs: Jobs, batch: RunningBatch) -> Jobs:
        await self.record(jobs)
        late = [job for job in jobs if job.payload.startswith("late") and not job.attempts]
        if self.releasing:
            batch.release_streams([job.key for job in jobs])
        if late:
            batch.detach(late, self._wait(late))
        for job in jobs:
            if job not in late:
                if job.payload in self.gates:
                    await self.gates[job.payload].wait()
                job.resolve(job.payload.upper())
        return []

    async def _wait(self, late: Jobs) -> Jobs:
        await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        return late


async def test_detached_jobs_hold_no_slot_and_keep_their_order() -> None:
    runs = Detaching()
    async with batching(runs) as batcher, asyncio.timeout(60):
        late = [start(batcher, f"late{n}", "s") for n in range(2)]
        assert await submit(batcher, "a") == "A"
        assert await submit(batcher, "b") == "B"
        await turns()
        assert runs.batches == [["a", "late0"], ["b"]], "its stream waits for it"
        runs.gate.set()
        assert await asyncio.gather(*late) == ["LATE0", "LATE1"]
    assert runs.batches[2][0] == "late0"


async def test_detached_jobs_fail_independently(clock: ManualClock) -> None:
    """At their deadlines, or with an error of their work."""
    runs = Detaching()
    async with batching(runs) as batcher, asyncio.timeout(60):
        expiring = start(batcher, "late", deadline_s=clock.soon())
        await runs.wait_for_batches(1)
        clock.expire()
        with pytest.raises(DeadlineExceeded, match="before it was done"):
            await expiring
        runs.fails = RuntimeError("unforeseen")
        runs.gate.set()
        late = start(batcher, "late2", "s")
        assert await submit(batcher, "a") == "A"
        with pytest.raises(InternalError):
            await late
        assert await submit(batcher, "b", "s") == "B"


@pytest.mark.parametrize("timeout_s", [5, 0.01])
async def test_drain_waits_for_detached_jobs_within_its_timeout(timeout_s: float) -> None:
    runs = Detaching()
    async with batching(runs) as batcher:
        late = start(batcher, "late", "s")
        await turns()
        draining = asyncio.create_task(batcher.drain(timeout_s))
        await turns()
        assert not draining.done()
        if timeout_s < 1:
            await draining
            with pytest.raises(ShuttingDown):
                await late
            return
        runs.gate.set()
        await draining
        assert await late == "LATE"


async def test_job_after_a_retried_detached_job_is_out_of_order() -> None:
    """Its stream was released before it was detached, as it is while its commit is awaited."""
    runs = Detaching()
    runs.releasing = True
    runs.gates["next"] = asyncio.Event()
    async with batching(runs, in_flight=2) as batcher, asyncio.timeout(60):
        first = start(batcher, "late", "s")
        await turns()
        behind = start(batcher, "next", "s")
        await turns()
        runs.gate.set()
        await turns()
        assert runs.seen["next"].is_out_of_order
        runs.gates["next"].set()
        assert await asyncio.gather(first, behind) == ["LATE", "NEXT"]
