"""The batcher's deadlines: of queued, running, retried and detached jobs."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.core.errors import CarryError, DeadlineExceeded, Overloaded, StoreRefused
from service.engine.batcher import DEADLINE_GRACE_S
from tests.service.engine.batching import (
    Runs,
    batching,
    start,
    start_each,
    submit,
    wait_for_capacity,
)
from tests.support.clock import ManualClock

SHORT_S = 0.02


async def test_expired_queued_jobs_never_start() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        stays = start(batcher, "b", deadline_s=time.monotonic() + 3600)
        now_s = time.monotonic()
        late = [start(batcher, f"late{n}", deadline_s=now_s + n * SHORT_S) for n in (1, 3)]
        async with asyncio.timeout(60):
            for waiting in late:
                with pytest.raises(DeadlineExceeded, match="before it started"):
                    await waiting
        runs.gate.set()
        assert await asyncio.gather(first, stays) == ["A", "B"]
    assert runs.batches == [["a"], ["b"]]


async def test_running_job_fails_at_its_deadline(clock: ManualClock) -> None:
    """After a grace. The batch continues; the late result is discarded, other jobs get theirs."""

    class Mapping(Runs):
        def map_error(self, job: object, error: CarryError) -> CarryError:
            return StoreRefused(error.detail)

    runs = Mapping()
    async with batching(runs) as batcher:
        deadline_s = clock.soon()
        got: list[str | CarryError] = []
        late = start(batcher, "late", deadline_s=deadline_s)
        stays = start(batcher, "b", deadline_s=deadline_s + DEADLINE_GRACE_S)
        batcher.enqueue_admitted("c", "c", 1, deadline_s, got.append)
        await runs.wait_for_batches(1)
        clock.now_s = deadline_s + DEADLINE_GRACE_S
        with pytest.raises(StoreRefused, match="before it was done"):
            await late
        assert not stays.done()
        runs.gate.set()
        assert await stays == "B"
        assert list(map(type, got)) == [StoreRefused]
        with pytest.raises(StoreRefused, match="RuntimeError"):
            await submit(batcher, "poison")
    assert set(runs.batches[0]) == {"late", "b", "c"}


async def test_endlessly_retried_job_fails_at_its_deadline(clock: ManualClock) -> None:
    runs = Runs()
    runs.retries = {"late": 10**9}
    runs.gate.set()
    async with batching(runs) as batcher, asyncio.timeout(60):
        late = start(batcher, "late", deadline_s=clock.soon())
        await runs.wait_for_batches(3)
        clock.expire()
        with pytest.raises(DeadlineExceeded, match="before it started"):
            await late
        assert await submit(batcher, "a") == "A"


async def test_cancelled_jobs_free_the_queue_while_all_batches_hang() -> None:
    runs = Runs()
    async with batching(runs, queue=2) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        leavers = start_each(batcher, "bc")
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(batcher, "d")
        for leaver in leavers:
            leaver.cancel()
        await wait_for_capacity(batcher)
        runs.gate.set()
        assert await asyncio.gather(first, submit(batcher, "e")) == ["A", "E"]
    assert runs.batches == [["a"], ["e"]]
