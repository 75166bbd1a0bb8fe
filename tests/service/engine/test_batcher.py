"""The batcher: full batches under load, order within a stream, isolated failures."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections import Counter
from typing import Any

import pytest
import structlog

from service.core.errors import CarryError, InternalError, ShuttingDown
from service.engine.fair_queue import BatchLimits, DrainRate, FairQueue, JobSpec
from service.engine.policy import MAX_DELAY_TURNS, MIN_SPLIT_REQUESTS
from tests.service.engine.batching import Runs, batching, start, start_each, submit, turns

HALF = MIN_SPLIT_REQUESTS // 2
LONG_BEYOND_64 = BatchLimits(8, 100, long_steps=64)


@pytest.fixture
def runs() -> Runs:
    return Runs()


async def test_jobs_queued_during_a_batch_form_the_next_batch(runs: Runs) -> None:
    async with batching(runs) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        rest = start_each(batcher, "bcd")
        await turns()
        runs.gate.set()
        assert await asyncio.gather(first, *rest) == ["A", "B", "C", "D"]
    assert runs.batches == [["a"], ["b", "c", "d"]]


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["answered", "cancelled"])
async def test_request_of_many_jobs_is_freed_without_the_garbage_collector(
    runs: Runs, is_cancelled: bool
) -> None:
    class Payload(str):
        """Can be referenced weakly."""

    async with batching(runs) as batcher:
        requests = [JobSpec(Payload(name), name, 1) for name in "ab"]
        freed = [weakref.ref(each.payload) for each in requests]
        gc.disable()
        try:
            request = asyncio.create_task(batcher.submit(requests))
            await runs.wait_for_batches(1)
            if is_cancelled:
                request.cancel()
            runs.gate.set()
            await asyncio.wait({request})
            assert request.cancelled() or request.result() == ["A", "B"]
            del request
            for held in (requests, runs.batches, runs.seen):
                held.clear()
            await turns()
            assert [each() for each in freed] == [None, None]
        finally:
            gc.enable()


@pytest.fixture
def no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the time limit of the batching delay."""
    monkeypatch.setattr("service.engine.policy.LINGER_TICK_S", 60)


@pytest.mark.usefixtures("no_time_limit")
@pytest.mark.parametrize("by", ["batch", "jobs"])
async def test_linger_ends_with_the_batch_in_flight_or_with_as_many_jobs_as_the_last(
    runs: Runs, by: str
) -> None:
    async with batching(runs, in_flight=2) as batcher, asyncio.timeout(60):
        many = start_each(batcher, "abcd")
        await runs.wait_for_batches(1)
        late = []
        for name in "efg":
            late.append(start(batcher, name))
            await turns()
        assert runs.batches == [["a", "b", "c", "d"]]
        if by == "jobs":
            late.append(start(batcher, "h"))
            await runs.wait_for_batches(2)
        runs.gate.set()
        await asyncio.gather(*many, *late)
    assert runs.batches[1:] == [["e", "f", "g", "h"] if by == "jobs" else ["e", "f", "g"]]


async def test_linger_is_bounded(runs: Runs) -> None:
    async with batching(runs, in_flight=2) as batcher:
        many = start_each(batcher, "abcd")
        await runs.wait_for_batches(1)
        late = start(batcher, "e")
        await runs.wait_for_batches(2)
        assert runs.batches == [["a", "b", "c", "d"], ["e"]]
        runs.gate.set()
        await asyncio.gather(*many, late)


@pytest.mark.usefixtures("no_time_limit")
async def test_no_linger_for_a_long_job_in_flight(runs: Runs) -> None:
    runs.gates["long"] = asyncio.Event()
    runs.gate.set()
    async with batching(runs, in_flight=3, limits=LONG_BEYOND_64) as batcher, asyncio.timeout(60):
        long = start(batcher, "long", steps=1000)
        await runs.wait_for_batches(1)
        await asyncio.gather(*start_each(batcher, "bc"))
        assert await submit(batcher, "d") == "D"
        runs.gates["long"].set()
        await long
        await asyncio.gather(*start_each(batcher, "ef"))
        runs.gates["g"] = asyncio.Event()
        last = start(batcher, "g")
        await turns()
        await turns()
        assert runs.batches[1:] == [["b", "c"], ["d"], ["e", "f"], ["g"]]
        runs.gates["g"].set()
        await last


async def test_small_batch_waits_a_few_loop_turns_if_none_is_in_flight(runs: Runs) -> None:
    runs.gate.set()
    async with batching(runs) as batcher:
        await asyncio.gather(*start_each(batcher, "ab"))
        first = start(batcher, "c")
        for _ in range(MAX_DELAY_TURNS // 2):
            await asyncio.sleep(0)
        assert runs.batches == [["a", "b"]]
        assert await submit(batcher, "d") == "D"
        assert await first == "C"
        alone = start(batcher, "e")
        await turns()
        assert alone.done()
    assert runs.batches == [["a", "b"], ["c", "d"], ["e"]]


class Splitting(Runs):
    """Batches that may be split."""

    may_split = True


@pytest.mark.parametrize(
    ("kind", "in_flight", "jobs", "expected"),
    [
        (Splitting, 2, MIN_SPLIT_REQUESTS, [HALF, HALF]),
        (Splitting, 2, MIN_SPLIT_REQUESTS + 1, [HALF, HALF + 1]),
        (Splitting, 2, MIN_SPLIT_REQUESTS - 1, [MIN_SPLIT_REQUESTS - 1]),
        (Splitting, 1, MIN_SPLIT_REQUESTS, [MIN_SPLIT_REQUESTS]),
        (Runs, 2, MIN_SPLIT_REQUESTS, [MIN_SPLIT_REQUESTS]),
    ],
)
async def test_many_jobs_are_split_into_a_batch_that_commits_and_one_that_computes(
    kind: type[Runs], in_flight: int, jobs: int, expected: list[int]
) -> None:
    runs = kind()
    limits = BatchLimits(100, 1000)
    async with batching(runs, in_flight=in_flight, limits=limits) as batcher:
        tasks = start_each(batcher, map(str, range(jobs)))
        await turns()
        assert [len(batch) for batch in runs.batches] == expected
        runs.gate.set()
        await asyncio.gather(*tasks)


async def test_jobs_are_not_split_while_a_batch_is_in_flight() -> None:
    runs = Splitting()
    async with batching(runs, in_flight=3, limits=BatchLimits(100, 1000)) as batcher:
        first = start(batcher, "first")
        await runs.wait_for_batches(1)
        tasks = start_each(batcher, map(str, range(2 * MIN_SPLIT_REQUESTS)))
        await turns()
        assert [len(batch) for batch in runs.batches] == [1, 2 * MIN_SPLIT_REQUESTS]
        runs.gate.set()
        await asyncio.gather(first, *tasks)


async def test_request_of_many_jobs_is_not_split() -> None:
    runs = Splitting()
    async with batching(runs, in_flight=2, limits=BatchLimits(100, 1000)) as batcher:
        specs = [JobSpec(str(at), at, 1) for at in range(2 * MIN_SPLIT_REQUESTS)]
        request = asyncio.create_task(batcher.submit(specs))
        await turns()
        assert [len(batch) for batch in runs.batches] == [len(specs)]
        runs.gate.set()
        await request


async def test_a_stream_has_one_job_in_flight_until_its_batch_releases_it(runs: Runs) -> None:
    async with batching(runs, in_flight=3) as batcher:
        tasks = start_each(batcher, ("a1", "a2"), "same")
        tasks.append(start(batcher, "b"))
        await runs.wait_for_batches(1)
        await turns()
        assert runs.batches == [["a1", "b"]]
        runs.gate.set()
        assert await asyncio.gather(*tasks) == ["A1", "A2", "B"]
        runs.gate.clear()
        runs.releasing = True
        tasks = start_each(batcher, ("c1", "c2"), "same")
        await runs.wait_for_batches(4)
        runs.gate.set()
        assert await asyncio.gather(*tasks) == ["C1", "C2"]
    assert runs.batches == [["a1", "b"], ["a2"], ["c1"], ["c2"]]


async def test_a_batch_does_not_release_a_stream_that_another_one_holds_by_then(
    runs: Runs,
) -> None:
    runs.releasing = True
    runs.gates = {name: asyncio.Event() for name in ("a1", "a2")}
    async with batching(runs, in_flight=3) as batcher:
        tasks = start_each(batcher, ("a1", "a2"), "same")
        await runs.wait_for_batches(2)
        runs.releasing = False
        tasks += start_each(batcher, ("a3", "a4"), "same")
        await runs.wait_for_batches(3)
        for gate in runs.gates.values():
            gate.set()
        await turns()
        assert runs.batches == [["a1"], ["a2"], ["a3"]]
        runs.gate.set()
        assert await asyncio.gather(*tasks) == ["A1", "A2", "A3", "A4"]


async def test_retried_job_returns_to_its_old_place(runs: Runs) -> None:
    runs.releasing = True
    runs.retries = {"a1": 1, "a2": 1}
    async with batching(runs, in_flight=2) as batcher:
        tasks = start_each(batcher, ("a1", "a2", "a3"), "same")
        await runs.wait_for_batches(2)
        runs.gate.set()
        assert await asyncio.gather(*tasks) == ["A1", "A2", "A3"]
    assert [name for batch in runs.batches for name in batch] == ["a1", "a2", "a1", "a2", "a3"]


async def test_retried_job_of_a_held_stream_comes_before_all_others(runs: Runs) -> None:
    runs.retries = {"a": 2}
    runs.gate.set()
    async with batching(runs, limits=BatchLimits(1, 1000)) as batcher:
        await asyncio.gather(*start_each(batcher, "abc"))
    assert runs.batches == [["a"], ["a"], ["a"], ["b"], ["c"]]


async def test_jobs_started_after_a_retried_one_are_out_of_order(runs: Runs) -> None:
    """Later jobs of the same stream that are in batches; no others."""
    runs.releasing = True
    runs.retries = {"a2": 1}
    runs.gates = {name: asyncio.Event() for name in ("a1", "a2", "a3", "b")}
    async with batching(runs, in_flight=4) as batcher:
        tasks = []
        for count, name in enumerate(runs.gates, 1):
            tasks.append(start(batcher, name, name[0]))
            await runs.wait_for_batches(count)
        runs.seen["a2"].is_out_of_order = True
        runs.gates["a2"].set()
        await runs.wait_for_batches(5)
        marked = {name for name, job in runs.seen.items() if job.is_out_of_order}
        assert marked == {"a3"}
        assert {name: job.attempts for name, job in runs.seen.items()}["a2"] == 1
        for gate in runs.gates.values():
            gate.set()
        assert await asyncio.gather(*tasks) == ["A1", "A2", "A3", "B"]


async def test_results_come_in_the_order_of_the_requests(runs: Runs) -> None:
    runs.gate.set()
    async with batching(runs) as batcher:
        results = await batcher.submit([JobSpec(name, name, 1) for name in "abac"])
        assert results == ["A", "B", "A", "C"]
        assert await batcher.submit([]) == []


async def test_a_cancelled_caller_does_not_affect_the_others_of_its_batch(runs: Runs) -> None:
    async with batching(runs) as batcher:
        running = start_each(batcher, "abe")
        await runs.wait_for_batches(1)
        queued = start_each(batcher, "cd")
        await turns()
        got: list[str | CarryError] = []
        batcher.cancel(batcher.enqueue_admitted("f", "f", 1, math.inf, got.append))
        for cancelled in (running[0], running[2], queued[0]):
            cancelled.cancel()
        with structlog.testing.capture_logs() as logged:
            runs.seen["e"].resolve("before the task knows that it is cancelled")
            await turns()
        assert not logged
        runs.gate.set()
        assert await asyncio.gather(running[1], queued[1]) == ["B", "D"]
        assert not got
    assert runs.batches == [["a", "b", "e"], ["d"]]


async def test_drain_finishes_accepted_jobs_and_rejects_new_ones(runs: Runs) -> None:
    async with batching(runs) as batcher:
        tasks = start_each(batcher, "ab")
        await runs.wait_for_batches(1)
        tasks.append(start(batcher, "c"))
        await turns()
        draining = asyncio.create_task(batcher.drain(5))
        await turns()
        with pytest.raises(ShuttingDown):
            await submit(batcher, "late")
        admitted: list[str | CarryError] = []
        batcher.enqueue_admitted("late", "late", 1, math.inf, admitted.append)
        assert not admitted, "a caller gets no result before its job is queued"
        await turns()
        assert isinstance(admitted[0], ShuttingDown)
        assert not draining.done()
        runs.gate.set()
        await draining
        assert await asyncio.gather(*tasks) == ["A", "B", "C"]


async def test_drain_is_bounded(runs: Runs) -> None:
    async with batching(runs, limits=BatchLimits(1, 1000)) as batcher:
        tasks = start_each(batcher, "ab")
        await runs.wait_for_batches(1)
        await batcher.drain(0.01)
        for task in tasks:
            with pytest.raises(ShuttingDown):
                await task


async def test_a_caller_that_raises_does_not_affect_the_others_of_its_batch(runs: Runs) -> None:
    got: list[str | CarryError] = []

    def fail(_: str | CarryError) -> None:
        raise RuntimeError("cannot be sent")

    async with batching(runs) as batcher:
        for payload, on_result in (("a", got.append), ("b", fail), ("c", got.append)):
            batcher.enqueue_admitted(payload, payload, 1, math.inf, on_result)
        with structlog.testing.capture_logs() as logged:
            runs.gate.set()
            await turns()
    assert got == ["A", "C"]
    assert [line["event"] for line in logged] == ["result_not_sent"]


async def test_a_caller_may_queue_its_next_job_when_it_gets_a_result(runs: Runs) -> None:
    """Also if that result is a deadline that expires, while the queue is looked through."""
    got: list[str | CarryError] = []
    async with batching(runs) as batcher:
        batcher.enqueue_admitted("first", "s", 1, math.inf, got.append)
        await runs.wait_for_batches(1)
        expired = asyncio.Event()

        def send_next(_: str | CarryError) -> None:
            batcher.enqueue_admitted("next", "s", 1, math.inf, got.append)
            expired.set()

        batcher.enqueue_admitted("late", "s", 1, 0.0, send_next)
        await expired.wait()
        runs.gate.set()
        await turns()
        assert got == ["FIRST", "NEXT"]


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the attempts to form a batch."""
    counts: Counter[str] = Counter()
    take = FairQueue.take

    def counted(queue: FairQueue[Any, Any], *arguments: Any) -> Any:
        counts["take"] += 1
        return take(queue, *arguments)

    monkeypatch.setattr(FairQueue, "take", counted)
    return counts


async def test_no_batch_is_formed_while_none_may_start(runs: Runs, formed: Counter[str]) -> None:
    """Jobs that wait for a slot or for their stream are not searched at every arrival; long ones
    leave a slot to short ones."""
    async with batching(runs, in_flight=3, limits=LONG_BEYOND_64) as batcher:
        tasks = start_each(batcher, "abcde", steps=1000)
        await runs.wait_for_batches(2)
        for name in "gh":
            tasks.append(start(batcher, name, steps=1000))
            tasks.append(start(batcher, name, "a"))
            await turns()
        assert formed["take"] == 2
        tasks.append(start(batcher, "s"))
        await runs.wait_for_batches(3)
        tasks.append(start(batcher, "t"))
        await turns()
        assert formed["take"] == 3
        assert runs.batches == [["a"], ["b"], ["s"]]
        runs.gate.set()
        await asyncio.gather(*tasks)


async def test_retried_short_job_runs_beside_a_long_one(runs: Runs) -> None:
    runs.retries = {"s": 1}
    runs.gates = {"a": asyncio.Event()}
    runs.gate.set()
    async with batching(runs, in_flight=2, limits=LONG_BEYOND_64) as batcher, asyncio.timeout(60):
        long = start(batcher, "a", steps=1000)
        await runs.wait_for_batches(1)
        assert await submit(batcher, "s") == "S"
        next_one = start(batcher, "b", steps=1000)
        await turns()
        assert runs.batches == [["a"], ["s"], ["s"]]
        runs.gates["a"].set()
        assert await asyncio.gather(long, next_one) == ["A", "B"]


async def test_failure_while_forming_fails_queued_jobs_only(
    monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    note = DrainRate.note
    failures = iter([None, ZeroDivisionError()])

    def failing_note(rate: DrainRate, *arguments: Any) -> None:
        if error := next(failures, None):
            raise error
        note(rate, *arguments)

    monkeypatch.setattr(DrainRate, "note", failing_note)
    runs.gate.set()
    async with batching(runs, limits=BatchLimits(1, 100)) as batcher:
        running, following, waiting = start_each(batcher, "abc")
        assert await running == "A"
        with pytest.raises(InternalError):
            await waiting
        assert await following == "B"
        assert await submit(batcher, "d") == "D"
