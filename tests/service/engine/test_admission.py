"""Admission control: by length and expected wait; backlogs and requests of many items affect their
own callers only."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import pytest
import structlog

from service.core.errors import CarryError, DeadlineExceeded, Overloaded, StreamOverloaded
from service.engine.batcher import ITEMS_PER_PART, Batcher
from service.engine.fair_queue import WINDOW_S, BatchLimits, DrainRate, JobSpec
from service.engine.policy import STREAM_SHARE
from tests.service.engine.batching import (
    UP_TO_8,
    Paced,
    Runs,
    batching,
    check_admission,
    patch_admission,
    start,
    start_each,
    submit,
    turns,
    wait_for_capacity,
)

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


def start_items(
    batcher: Batcher[str, str], prefix: str, count: int, deadline_s: float = math.inf
) -> Results:
    """A request of many items, each of another stream."""
    specs = [JobSpec(f"{prefix}{n}", f"{prefix}{n}", 1) for n in range(count)]
    return asyncio.ensure_future(batcher.submit(specs, deadline_s))


def rejected(results: Sequence[Results]) -> list[type]:
    """Types of the errors of rejected requests."""
    return [type(each.result()[0]) for each in results if each.done()]


def count_rejected(results: Results) -> int:
    """Number of items of a request that were rejected."""
    return sum(isinstance(each, Overloaded) for each in results.result())


async def test_an_overloaded_stream_rejects_its_own_callers_only() -> None:
    runs = Runs()
    async with batching(runs, queue=QUEUE) as batcher:
        with structlog.testing.capture_logs() as logged:
            hot = await enqueue(batcher, ["hot"] * 500)
            others = await enqueue(batcher, [f"other{n}" for n in range(40)])
        assert rejected(hot) == [StreamOverloaded] * (500 - MOST_OF_ONE)
        assert rejected(others) == []
        rejection = check_admission(batcher, "hot", 60)
        assert isinstance(rejection, StreamOverloaded)
        assert check_admission(batcher, "hot", 60) is rejection
        assert check_admission(batcher, "other99", 60) is None
        assert [(line["event"], line["stream"]) for line in logged] == [
            ("stream_overloaded", "hot")
        ]
        runs.gate.set()
        await asyncio.gather(*hot, *others)
        assert check_admission(batcher, "hot", 60) is None


async def test_many_streams_with_many_callers_leave_room_for_others() -> None:
    async with batching(Runs(), queue=QUEUE) as batcher:
        hot = await enqueue(batcher, [f"hot{n % 10}" for n in range(1000)])
        assert set(rejected(hot)) == {StreamOverloaded}
        assert rejected(await enqueue(batcher, [f"other{n}" for n in range(20)])) == []


async def test_a_full_queue_rejects_every_stream_at_once() -> None:
    async with batching(Runs(), queue=QUEUE) as batcher:
        results = await enqueue(batcher, [f"s{n}" for n in range(QUEUE + 2)])
        assert rejected(results) == [Overloaded] * 2


async def test_an_admitted_job_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    admitted: list[str | CarryError] = []
    runs = Runs()
    async with batching(runs) as batcher:
        assert check_admission(batcher, "a", 60) is None
        patch_admission(monkeypatch)
        batcher.enqueue_admitted("a", "a", 1, math.inf, admitted.append)
        assert rejected(await enqueue(batcher, ["b"])) == [Overloaded]
        runs.gate.set()
        await turns()
        assert admitted == ["A"]


async def test_a_stream_is_admitted_by_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its chunks starts every 0.4 s, regardless of other streams."""
    runs = Paced(monkeypatch)
    async with batching(runs, queue=1000, max_wait_s=4.0) as batcher:
        hot = await enqueue(batcher, ["hot"] * 14)
        await runs.wait_for_batches(4)
        assert rejected(hot[3:]) == []
        rejection = check_admission(batcher, "hot", 60)
        assert isinstance(rejection, StreamOverloaded)
        assert rejection.detail.startswith("10 chunks of this stream are waiting")
        assert rejection.facts["retry_after_s"] == pytest.approx(10 / 2.5)
        assert check_admission(batcher, "other", 0.001) is None


async def test_a_request_with_many_items_leaves_room_for_others() -> None:
    runs = Runs()
    async with batching(runs, queue=QUEUE, limits=BatchLimits(1, 1000)) as batcher:
        many, more = start_items(batcher, "m", QUEUE), start_items(batcher, "n", QUEUE)
        await asyncio.sleep(0)
        assert rejected(await enqueue(batcher, [f"s{n}" for n in range(20)])) == []
        runs.gate.set()
        await asyncio.gather(many, more)
        assert count_rejected(many) == QUEUE // 2
        assert count_rejected(more) == QUEUE - (QUEUE // 2 + 1) // 2


async def test_items_of_another_request_do_not_count_as_waiting_before_a_lone_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 20 a second 28 items take 1.4 s, but a lone chunk is in the next batch."""
    runs = Paced(monkeypatch)
    async with batching(runs, queue=1000) as batcher:
        many = start_items(batcher, "m", 60)
        await runs.wait_for_batches(4)
        assert check_admission(batcher, "lone", 0.1) is None
        lone = start(batcher, "lone", deadline_s=runs.now_s + 0.1)
        late = start_items(batcher, "n", 12, runs.now_s + 1.0)
        await asyncio.sleep(0)
        runs.gate.set()
        await turns()
        assert "lone" in runs.batches[4]
        await asyncio.gather(many, lone, late)
        assert count_rejected(late) == 6


async def test_few_items_of_a_request_are_queued_at_a_time() -> None:
    """Results stay in order over all parts, and no item is rejected because of the others."""
    runs = Runs()
    async with batching(runs, queue=3 * ITEMS_PER_PART) as batcher:
        many = start_items(batcher, "s", 5 * ITEMS_PER_PART + 3)
        await runs.wait_for_batches(1)
        await turns()
        assert batcher.waiting == 2 * ITEMS_PER_PART - UP_TO_8.max_rows
        lone = [f"lone{n}" for n in range(ITEMS_PER_PART)]
        assert rejected(await enqueue(batcher, lone)) == []
        runs.gate.set()
        assert await many == [f"S{n}" for n in range(5 * ITEMS_PER_PART + 3)]


async def test_a_cancelled_request_queues_no_more_parts() -> None:
    runs = Runs()
    async with batching(runs) as batcher, asyncio.timeout(60):
        many = start_items(batcher, "s", 5 * ITEMS_PER_PART)
        await runs.wait_for_batches(1)
        many.cancel()
        await turns()
        runs.gate.set()
        assert await submit(batcher, "a") == "A"
    assert sum(map(len, runs.batches)) == UP_TO_8.max_rows + 1


async def test_queue_length_is_limited_by_the_drain_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 20 jobs/s and at most 2 s, 40 may wait; 20 are too many for a deadline in 1 s."""
    runs, shedding = Paced(monkeypatch), list[bool]()
    async with batching(runs, max_wait_s=2.0, on_shedding=shedding.append) as batcher:
        with structlog.testing.capture_logs() as logged:
            tasks = start_each(batcher, [f"j{i}" for i in range(60)])
            await runs.wait_for_batches(4)
            assert check_admission(batcher, "new", 60) is None
            rejection = check_admission(batcher, "new", 1.0)
            assert isinstance(rejection, Overloaded)
            assert rejection.facts["retry_after_s"] == pytest.approx(28 / 20)
            with pytest.raises(Overloaded, match="28 chunks are waiting, and 20 are done"):
                await submit(batcher, "hasty", deadline_s=runs.now_s + 1.0)
            tasks += start_each(batcher, [f"m{i}" for i in range(12)])
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                await submit(batcher, "n")
            assert caught.value.facts["retry_after_s"] == pytest.approx(40 / 20)
        assert [line["event"] for line in logged] == ["overloaded"]
        assert shedding == [True]
        runs.gate.set()
        await asyncio.gather(*tasks)
        # empty: its rate is not known any more, and nothing is rejected for it
        assert check_admission(batcher, "new", 0.001) is None
        assert shedding == [True, False]
        assert await submit(batcher, "o") == "O"


async def test_one_job_is_always_admitted_and_a_drain_ends_load_shedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if the queue drained slowly: an empty queue has no wait."""
    runs, shedding = Paced(monkeypatch), list[bool]()
    async with batching(runs, max_wait_s=0.001, on_shedding=shedding.append) as batcher:
        *tasks, last = start_each(batcher, [f"j{i}" for i in range(33)])
        await runs.wait_for_batches(4)
        with pytest.raises(Overloaded):
            await submit(batcher, "a")
        last.cancel()
        await wait_for_capacity(batcher)
        one = start(batcher, "b")
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(batcher, "c")
        await batcher.drain(0)
        assert shedding == [True, False]
        await asyncio.gather(*tasks, one, return_exceptions=True)


async def test_load_shedding_goes_on_while_jobs_wait() -> None:
    runs, shedding = Runs(), list[bool]()
    runs.gates["b"] = asyncio.Event()
    limits = BatchLimits(1, 1000)
    async with batching(runs, queue=2, limits=limits, on_shedding=shedding.append) as batcher:
        running = start(batcher, "a")
        await runs.wait_for_batches(1)
        waiting = start_each(batcher, "bc")
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(batcher, "d")
        runs.gate.set()
        await runs.wait_for_batches(2)
        await turns()
        assert shedding == [True]
        runs.gates["b"].set()
        await asyncio.gather(running, *waiting)
        assert shedding == [True, False]


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


@pytest.mark.parametrize(
    ("windows", "per_s"),
    [
        pytest.param([(20, WINDOW_S / 2)], None, id="not before the first window has passed"),
        pytest.param([(20, WINDOW_S / 2), (20, WINDOW_S)], 40 / WINDOW_S, id="of a window"),
        pytest.param([(100, 1), (300, 2), (300, 3)], 100 / 4 + 300 / 4 + 300 / 2, id="averaged"),
        pytest.param([(50, 1), (0, 31), (50, 32)], 50, id="kept without progress"),
        pytest.param([(50, 1), (None, 2)], None, id="unknown of an empty queue"),
        pytest.param([(50, 1), (None, 2), (1, 60)], None, id="unknown again after that"),
    ],
)
def test_drain_rate(windows: list[tuple[int | None, float]], per_s: float | None) -> None:
    rate = DrainRate()
    rate.note(0.0, 5)
    for done, now_s in windows:
        rate.done += done or 0
        rate.note(now_s, 0 if done is None else 5)
    assert rate.per_s == (per_s if per_s is None else pytest.approx(per_s))
