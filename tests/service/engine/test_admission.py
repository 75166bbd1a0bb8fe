"""Admission control: backlogs and requests of many items affect their own callers only."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest
import structlog

from service.core.errors import CarryError, Overloaded, StreamOverloaded
from service.engine.batcher import ITEMS_PER_PART, Batcher
from service.engine.fair_queue import BatchLimits, JobSpec
from service.engine.policy import STREAM_SHARE
from tests.service.engine.batching import (
    UP_TO_8,
    Runs,
    batching,
    check_admission,
    patch_admission,
    submit,
)
from tests.service.engine.test_batcher import turns
from tests.service.engine.test_batcher_deadlines import Paced

QUEUE = 90
MOST_OF_ONE = QUEUE // (STREAM_SHARE + 1)
"""Length at which a backlog equals its share of the free places."""


Results = asyncio.Future[list[str | CarryError]]


async def enqueue(batcher: Batcher[str, str], keys: Sequence[str]) -> list[Results]:
    """Enqueue a request for each key."""
    specs = [JobSpec(f"{key}{n}", key, 1) for n, key in enumerate(keys)]
    requests = [asyncio.ensure_future(batcher.submit([spec])) for spec in specs]
    await asyncio.sleep(0)
    return requests


def start_items(batcher: Batcher[str, str], prefix: str, count: int) -> Results:
    """A request of many items, each of another stream."""
    specs = [JobSpec("a", f"{prefix}{n}", 1) for n in range(count)]
    return asyncio.ensure_future(batcher.submit(specs))


def rejected(results: Sequence[Results]) -> list[type]:
    """Types of the errors of rejected requests."""
    return [type(found.result()[0]) for found in results if found.done()]


async def test_an_overloaded_stream_rejects_its_own_callers_only() -> None:
    runs = Runs()
    async with batching(runs, queue=QUEUE) as batcher:
        with structlog.testing.capture_logs() as logged:
            hot = await enqueue(batcher, ["hot"] * 500)
            others = await enqueue(batcher, [f"other{n}" for n in range(40)])
        assert rejected(hot) == [StreamOverloaded] * (500 - MOST_OF_ONE)
        assert rejected(others) == []
        assert isinstance(check_admission(batcher, "hot", 60), StreamOverloaded)
        assert check_admission(batcher, "hot", 60) is check_admission(batcher, "hot", 60)
        assert check_admission(batcher, "other99", 60) is None
        assert [(line["event"], line["stream"]) for line in logged] == [
            ("stream_overloaded", "hot")
        ]
        runs.gate.set()
        await asyncio.gather(*hot, *others)
        assert check_admission(batcher, "hot", 60) is None


async def test_an_admitted_job_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        assert check_admission(batcher, "a", 60) is None
        patch_admission(monkeypatch)
        admitted: list[str | CarryError] = []
        batcher.enqueue_admitted("a", "a", 1, math.inf, admitted.append)
        assert rejected(await enqueue(batcher, ["b"])) == [Overloaded]
        runs.gate.set()
        await turns()
        assert admitted == ["A"]


async def test_many_streams_with_many_callers_leave_room_for_others() -> None:
    runs = Runs()
    async with batching(runs, queue=QUEUE) as batcher:
        hot = await enqueue(batcher, [f"hot{n % 10}" for n in range(1000)])
        assert set(rejected(hot)) == {StreamOverloaded}
        assert rejected(await enqueue(batcher, [f"other{n}" for n in range(20)])) == []
        runs.gate.set()


async def test_a_full_queue_rejects_every_stream() -> None:
    runs = Runs()
    async with batching(runs, queue=QUEUE) as batcher:
        results = await enqueue(batcher, [f"s{n}" for n in range(QUEUE + 2)])
        assert rejected(results) == [Overloaded] * 2
        runs.gate.set()


async def test_a_stream_is_admitted_by_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its chunks starts every 0.4 s, regardless of other streams."""
    runs = Paced(3)
    monkeypatch.setattr("service.engine.batcher.time", runs)
    async with batching(runs, queue=1000, max_wait_s=4.0) as batcher:
        hot = await enqueue(batcher, ["hot"] * 14)
        await runs.wait_for_batches(4)
        assert rejected(hot[3:]) == []
        rejection = check_admission(batcher, "hot", 60)
        assert isinstance(rejection, StreamOverloaded)
        assert rejection.detail.startswith("10 chunks of this stream are waiting")
        assert rejection.facts["retry_after_s"] == pytest.approx(10 / 2.5)
        assert check_admission(batcher, "other", 0.001) is None
        runs.gate.set()


async def test_a_request_with_many_items_leaves_room_for_others() -> None:
    runs = Runs()
    async with batching(runs, queue=QUEUE, limits=BatchLimits(1, 1000)) as batcher:
        many = start_items(batcher, "m", QUEUE)
        await asyncio.sleep(0)
        more = start_items(batcher, "n", QUEUE)
        assert rejected(await enqueue(batcher, [f"s{n}" for n in range(20)])) == []
        runs.gate.set()
        outcomes = [await many, await more]
        assert [sum(isinstance(each, Overloaded) for each in found) for found in outcomes] == [
            QUEUE // 2,
            QUEUE - (QUEUE // 2 + 1) // 2,
        ]


async def test_items_of_another_request_do_not_count_as_waiting_before_a_lone_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 20 a second 28 items take 1.4 s, but a lone chunk is in the next batch."""
    runs = Paced(3)
    monkeypatch.setattr("service.engine.batcher.time", runs)
    async with batching(runs, queue=1000) as batcher:
        many = start_items(batcher, "m", 60)
        await runs.wait_for_batches(4)
        assert check_admission(batcher, "lone", 0.1) is None
        lone = asyncio.ensure_future(batcher.submit([JobSpec("lone", "lone", 1)], runs.now_s + 0.1))
        assert not lone.done()
        requests = [JobSpec("b", f"n{n}", 1) for n in range(12)]
        late = asyncio.ensure_future(batcher.submit(requests, runs.now_s + 1.0))
        runs.gate.set()
        await turns()
        assert "lone" in runs.batches[4]
        await asyncio.gather(many, lone)
        assert sum(isinstance(each, Overloaded) for each in await late) == 6


async def test_few_items_of_a_request_are_queued_at_a_time() -> None:
    """Results stay in order over all parts, and no item is rejected because of the others."""
    runs = Runs()
    names = [f"s{n}" for n in range(5 * ITEMS_PER_PART + 3)]
    async with batching(runs, queue=3 * ITEMS_PER_PART) as batcher:
        many = asyncio.create_task(batcher.submit([JobSpec(name, name, 1) for name in names]))
        await runs.wait_for_batches(1)
        await turns()
        assert batcher.waiting == 2 * ITEMS_PER_PART - UP_TO_8.max_rows
        assert rejected(await enqueue(batcher, [f"lone{n}" for n in range(ITEMS_PER_PART)])) == []
        runs.gate.set()
        assert await many == [name.upper() for name in names]


async def test_a_cancelled_request_queues_no_more_parts() -> None:
    runs = Runs()
    names = [f"s{n}" for n in range(5 * ITEMS_PER_PART)]
    async with batching(runs) as batcher, asyncio.timeout(5):
        many = asyncio.create_task(batcher.submit([JobSpec(name, name, 1) for name in names]))
        await runs.wait_for_batches(1)
        many.cancel()
        await turns()
        runs.gate.set()
        assert await submit(batcher, "a") == "A"
    assert sum(map(len, runs.batches)) == UP_TO_8.max_rows + 1
