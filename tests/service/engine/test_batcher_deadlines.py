"""The batcher's deadlines, and load shedding by expected waiting time."""

from __future__ import annotations

import asyncio
import time

import pytest
import structlog

from service.core.errors import CarryError, DeadlineExceeded, Overloaded, StoreRefused
from service.engine.batcher import DEADLINE_GRACE_S, Batcher
from service.engine.fair_queue import Job, RunningBatch
from tests.service.engine.batching import (
    Jobs,
    Runs,
    batching,
    check_admission,
    start,
    start_each,
    submit,
)
from tests.support.servers import until_async

SHORT_S = 0.02


def soon() -> float:
    return time.monotonic() + SHORT_S


async def wait_for_capacity(batcher: Batcher[str, str]) -> None:
    """Wait until admission control accepts one more job."""

    async def has_capacity() -> bool:
        return check_admission(batcher, "new", 60) is None

    await until_async(has_capacity, "capacity")


async def test_expired_queued_jobs_never_start() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        stays = start(batcher, "b")
        with pytest.raises(DeadlineExceeded, match="before it started"):
            await submit(batcher, "late", deadline_s=soon())
        runs.gate.set()
        assert await asyncio.gather(first, stays) == ["A", "B"]
    assert runs.batches == [["a"], ["b"]]


async def test_idle_batcher_does_not_start_an_expired_job() -> None:
    runs = Runs()
    runs.gate.set()
    async with batching(runs) as batcher:
        with pytest.raises(DeadlineExceeded):
            await submit(batcher, "late", deadline_s=time.monotonic() - 1)
        assert await submit(batcher, "a", deadline_s=time.monotonic() + 60) == "A"
    assert runs.batches == [["a"]]


async def test_earliest_deadline_sets_the_timer() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        patient = start(batcher, "b", deadline_s=time.monotonic() + 3600)
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            for name in ("c", "d"):
                with pytest.raises(DeadlineExceeded):
                    await submit(batcher, name, deadline_s=soon())
        runs.gate.set()
        assert await asyncio.gather(first, patient) == ["A", "B"]


async def test_running_job_fails_at_its_deadline() -> None:
    """The batch continues; the late result is discarded, other jobs get theirs."""
    runs, told = Runs(), []

    def tell(job: Job[str, str], error: CarryError) -> CarryError:
        told.append((job.payload, type(error)))
        return StoreRefused(error.detail)

    runs.map_error = tell  # type: ignore[method-assign]
    async with batching(runs) as batcher:
        deadline_s = soon()
        late = start(batcher, "late", deadline_s=deadline_s)
        stays = start(batcher, "b")
        await runs.wait_for_batches(1)
        with pytest.raises(StoreRefused, match="before it was done"):
            await late
        assert time.monotonic() >= deadline_s + DEADLINE_GRACE_S
        assert not stays.done()
        runs.gate.set()
        assert await stays == "B"
    assert runs.batches == [["late", "b"]]
    assert told == [("late", DeadlineExceeded)]


async def test_endlessly_retried_job_fails_at_its_deadline() -> None:
    runs = Runs()
    runs.retries = {"late": 10**9}
    runs.gate.set()
    async with batching(runs) as batcher, asyncio.timeout(30):
        with pytest.raises(DeadlineExceeded, match="before it started"):
            await submit(batcher, "late", deadline_s=time.monotonic() + 0.5)
        assert await submit(batcher, "a") == "A"
    assert len(runs.batches) > 2


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


class Paced(Runs):
    """Each batch of 8 takes 0.4 s of a simulated clock; the last ones wait for the gate."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.now_s = 1000.0
        self._free = batches

    def monotonic(self) -> float:
        return self.now_s

    async def __call__(self, jobs: Jobs, batch: RunningBatch) -> Jobs:
        self.now_s += 0.4
        if self._free:
            self._free -= 1
            self.batches.append([job.payload for job in jobs])
            for job in jobs:
                job.resolve(job.payload.upper())
            return []
        return await super().__call__(jobs, batch)


async def fill(batcher: Batcher[str, str], runs: Runs, jobs: int, batches: int) -> list[object]:
    """Submit jobs, and wait until `batches` batches have started."""
    tasks = [start(batcher, f"j{i}") for i in range(jobs)]
    await runs.wait_for_batches(batches)
    return tasks


async def test_queue_length_is_limited_by_the_drain_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 20 jobs/s and at most 2 s, 40 may wait; 20 are too many for a deadline in 1 s."""
    runs = Paced(3)
    monkeypatch.setattr("service.engine.batcher.time", runs)
    shedding: list[bool] = []
    async with batching(runs, max_wait_s=2.0, on_shedding=shedding.append) as batcher:
        with structlog.testing.capture_logs() as logged:
            tasks = await fill(batcher, runs, 60, 4)
            assert check_admission(batcher, "new", 60) is None
            rejection = check_admission(batcher, "new", 1.0)
            assert isinstance(rejection, Overloaded)
            assert rejection.facts["retry_after_s"] == pytest.approx(28 / 20)
            with pytest.raises(Overloaded, match="28 chunks are waiting, and 20 are done"):
                await submit(batcher, "hasty", deadline_s=runs.now_s + 1.0)
            more = [start(batcher, f"m{i}") for i in range(12)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                await submit(batcher, "n")
            assert caught.value.facts["retry_after_s"] == pytest.approx(40 / 20)
        assert [line["event"] for line in logged] == ["overloaded"]
        assert shedding == [True]
        runs.gate.set()
        await asyncio.gather(*tasks, *more)
        # Empty: nothing is known of its rate any more, and nothing is refused for it.
        assert check_admission(batcher, "new", 0.001) is None
        assert shedding == [True, False]
        assert await submit(batcher, "o") == "O"


async def test_load_shedding_stops_once_the_queue_is_drained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Paced(3)
    monkeypatch.setattr("service.engine.batcher.time", runs)
    shedding: list[bool] = []
    async with batching(runs, max_wait_s=0.001, on_shedding=shedding.append) as batcher:
        tasks = await fill(batcher, runs, 33, 4)
        with pytest.raises(Overloaded):
            await submit(batcher, "a")
        await batcher.drain(0)
        assert shedding == [True, False]
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_job_is_always_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the queue drained slowly: an empty queue has no wait."""
    runs = Paced(3)
    monkeypatch.setattr("service.engine.batcher.time", runs)
    async with batching(runs, max_wait_s=0.001) as batcher:
        *tasks, last = await fill(batcher, runs, 33, 4)
        with pytest.raises(Overloaded):
            await submit(batcher, "a")
        last.cancel()
        await wait_for_capacity(batcher)
        one = start(batcher, "b")
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(batcher, "c")
        runs.gate.set()
        await asyncio.gather(*tasks, one)


async def test_load_shedding_stops_once_a_batch_ends_if_the_queue_expired_meanwhile() -> None:
    runs, shedding = Runs(), list[bool]()
    async with batching(runs, queue=1, on_shedding=shedding.append) as batcher:
        running = start(batcher, "a")
        await runs.wait_for_batches(1)
        waiting = start(batcher, "b", deadline_s=time.monotonic())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(batcher, "c")
        with pytest.raises(DeadlineExceeded):
            await waiting
        assert shedding == [True]
        runs.gate.set()
        assert await running == "A"
        assert shedding == [True, False]
