"""The batcher: full batches under load, order within a stream, isolated failures."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from typing import Any

import pytest
import structlog

from service.core.errors import CarryError, InternalError, Overloaded, ShuttingDown
from service.engine.batcher import Batcher
from service.engine.fair_queue import BatchLimits, DrainRate, FairQueue, JobSpec, RunningBatch
from service.engine.policy import MAX_DELAY_TURNS
from tests.service.engine.batching import Jobs, Running, Runs, batching, start, start_each, submit

LONG_BEYOND_64 = BatchLimits(8, 100, long_steps=64)


async def test_jobs_queued_during_a_batch_form_the_next_batch() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        rest = start_each(batcher, "bcd")
        await asyncio.sleep(0)
        runs.gate.set()
        assert await asyncio.gather(first, *rest) == ["A", "B", "C", "D"]
    assert runs.batches == [["a"], ["b", "c", "d"]]


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["answered", "cancelled"])
async def test_request_of_many_jobs_is_freed_without_the_garbage_collector(
    is_cancelled: bool,
) -> None:
    class Payload(str):
        """Can be referenced weakly."""

    runs = Runs()
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
            requests.clear()
            runs.batches.clear()
            await turns()
            assert [each() for each in freed] == [None, None]
        finally:
            gc.enable()


@pytest.fixture
def no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the time limit of the batching delay."""
    monkeypatch.setattr("service.engine.policy.LINGER_TICK_S", 60)


@pytest.mark.usefixtures("no_time_limit")
async def test_small_batch_lingers_while_a_batch_is_in_flight() -> None:
    """Requests that follow the replies join the batch."""
    runs = Runs()
    async with batching(runs, in_flight=2) as batcher:
        many = start_each(batcher, "abcd")
        await runs.wait_for_batches(1)
        late = start(batcher, "e")
        await turns()
        assert runs.batches == [["a", "b", "c", "d"]]
        runs.gate.set()
        await many[0]
        more = start_each(batcher, "fgh")
        assert await asyncio.gather(*many, late, *more) == list("ABCDEFGH")
    assert runs.batches[1:] == [["e", "f", "g", "h"]]


async def test_linger_is_bounded() -> None:
    runs = Runs()
    async with batching(runs, in_flight=2) as batcher:
        many = start_each(batcher, "abcd")
        await runs.wait_for_batches(1)
        late = start(batcher, "e")
        await runs.wait_for_batches(2)
        assert runs.batches == [["a", "b", "c", "d"], ["e"]]
        runs.gate.set()
        assert await asyncio.gather(*many, late) == ["A", "B", "C", "D", "E"]


@pytest.mark.usefixtures("no_time_limit")
async def test_no_linger_for_a_long_job_in_flight() -> None:
    runs, short = Runs(), Runs()
    short.gate.set()

    async def run(jobs: Jobs, batch: RunningBatch) -> Jobs:
        return await (runs if jobs[0].payload == "long" else short)(jobs, batch)

    async with asyncio.timeout(5), batching(runs, in_flight=3, limits=LONG_BEYOND_64) as batcher:
        batcher._runner = Running(run)
        long = start(batcher, "long", steps=1000)
        await runs.wait_for_batches(1)
        await asyncio.gather(*(submit(batcher, name) for name in "bc"))
        assert await submit(batcher, "d") == "D"
        runs.gate.set()
        await long
    assert short.batches == [["b", "c"], ["d"]]


@pytest.mark.usefixtures("no_time_limit")
async def test_no_linger_if_the_batch_is_as_large_as_the_last() -> None:
    runs = Runs()
    async with batching(runs, in_flight=2) as batcher:
        first = start_each(batcher, "ab")
        await runs.wait_for_batches(1)
        second = start_each(batcher, "cd")
        await turns()
        assert runs.batches == [["a", "b"], ["c", "d"]]
        runs.gate.set()
        assert await asyncio.gather(*first, *second) == ["A", "B", "C", "D"]


async def test_small_batch_waits_a_few_loop_turns_if_none_is_in_flight() -> None:
    runs = Runs()
    runs.gate.set()
    async with batching(runs) as batcher:
        await asyncio.gather(*(submit(batcher, name) for name in "ab"))
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


async def test_a_stream_never_has_two_jobs_in_flight() -> None:
    runs = Runs()
    async with batching(runs, in_flight=3) as batcher:
        tasks = start_each(batcher, ("a1", "a2"), "same")
        other = start(batcher, "b")
        await runs.wait_for_batches(1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert runs.batches == [["a1", "b"]]
        runs.gate.set()
        assert await asyncio.gather(*tasks, other) == ["A1", "A2", "B"]
    assert runs.batches == [["a1", "b"], ["a2"]]


async def test_released_stream_continues_before_its_batch_ends() -> None:
    runs = Runs()
    runs.releasing = True
    async with batching(runs, in_flight=2) as batcher:
        tasks = start_each(batcher, ("a1", "a2"), "same")
        await runs.wait_for_batches(2)
        assert runs.batches == [["a1"], ["a2"]]
        runs.gate.set()
        assert await asyncio.gather(*tasks) == ["A1", "A2"]


async def test_a_batch_does_not_release_a_stream_twice() -> None:
    """By then another batch holds the stream."""
    runs = Runs()
    gates = {name: asyncio.Event() for name in ("a1", "a2")}

    async def run(jobs: Jobs, batch: RunningBatch) -> Jobs:
        name = jobs[0].payload
        if name == "a1":
            batch.release_streams(["same"])
        again = await runs(jobs, batch)
        await gates.get(name, runs.gate).wait()
        return again

    async with batching(runs, in_flight=3) as batcher:
        batcher._runner = Running(run)
        runs.gate.set()
        tasks = start_each(batcher, ("a1", "a2", "a3"), "same")
        await runs.wait_for_batches(2)
        gates["a1"].set()
        await turns()
        assert runs.batches == [["a1"], ["a2"]]
        gates["a2"].set()
        assert await asyncio.gather(*tasks) == ["A1", "A2", "A3"]
    assert runs.batches == [["a1"], ["a2"], ["a3"]]


async def test_retried_job_returns_to_its_old_place() -> None:
    runs = Runs()
    runs.releasing = True
    runs.retries = {"a1": 1, "a2": 1}
    async with batching(runs, in_flight=2) as batcher:
        tasks = start_each(batcher, ("a1", "a2", "a3"), "same")
        await runs.wait_for_batches(2)
        runs.gate.set()
        assert await asyncio.gather(*tasks) == ["A1", "A2", "A3"]
    assert [name for batch in runs.batches for name in batch] == ["a1", "a2", "a1", "a2", "a3"]


async def test_jobs_started_after_a_retried_one_are_out_of_order() -> None:
    """Later jobs of the same stream that are in batches; no others."""
    runs, seen = Runs(), {}
    runs.releasing = True
    runs.retries = {"a1": 1}
    gates = {name: asyncio.Event() for name in ("a1", "a2", "b")}
    began = {name: asyncio.Event() for name in gates}

    async def run(jobs: Jobs, batch: RunningBatch) -> Jobs:
        for job in jobs:
            seen[job.payload] = job
            began[job.payload].set()
            batch.release_streams([job.key])
        gate = gates.get(jobs[0].payload)
        if gate is not None and not jobs[0].attempts:
            await gate.wait()
        return await runs(jobs, batch)

    async with batching(runs, in_flight=3) as batcher:
        batcher._runner = Running(run)
        runs.gate.set()
        tasks = []
        for name in ("a1", "a2", "b"):
            tasks.append(start(batcher, name, name[0]))
            await began[name].wait()
        gates["a1"].set()
        assert await tasks[0] == "A1"
        assert {name: job.is_out_of_order for name, job in seen.items()} == {
            "a1": False,
            "a2": True,
            "b": False,
        }
        gates["a2"].set()
        gates["b"].set()
        assert await asyncio.gather(*tasks) == ["A1", "A2", "B"]


async def test_results_come_in_the_order_of_the_requests() -> None:
    runs = Runs()
    runs.gate.set()
    async with batching(runs) as batcher:
        names = ["a", "b", "a", "c"]
        results = await batcher.submit([JobSpec(name, name, 1) for name in names])
        assert results == ["A", "B", "A", "C"]
        assert await batcher.submit([]) == []


async def test_a_failed_batch_fails_its_own_jobs_only() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        bad = start(batcher, "poison", "p")
        await runs.wait_for_batches(1)
        good = start(batcher, "b")
        await asyncio.sleep(0)
        runs.gate.set()
        with pytest.raises(InternalError):
            await bad
        assert await good == "B"


async def test_cancelled_job_is_dropped_without_its_neighbours() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        leaver = start(batcher, "b")
        stays = start(batcher, "c")
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.sleep(0)
        runs.gate.set()
        assert await asyncio.gather(first, stays) == ["A", "C"]
    assert runs.batches == [["a"], ["c"]]


async def test_cancelling_a_caller_does_not_stop_its_running_batch() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        leaver = start(batcher, "a")
        stays = start(batcher, "b")
        await runs.wait_for_batches(1)
        leaver.cancel()
        runs.gate.set()
        assert await stays == "B"


async def test_full_queue_rejects_at_once() -> None:
    runs = Runs()
    async with batching(runs, queue=1) as batcher:
        first = start(batcher, "a")
        await runs.wait_for_batches(1)
        second = start(batcher, "b")
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(batcher, "c")
        runs.gate.set()
        assert await asyncio.gather(first, second) == ["A", "B"]


async def test_drain_finishes_accepted_jobs_and_rejects_new_ones() -> None:
    runs = Runs()
    async with batching(runs) as batcher:
        tasks = start_each(batcher, "ab")
        await runs.wait_for_batches(1)
        draining = asyncio.create_task(batcher.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await submit(batcher, "late")
        admitted: list[str | CarryError] = []
        batcher.enqueue_admitted("late", "late", 1, math.inf, admitted.append)
        assert not admitted, "a caller gets no result before its job is queued"
        await asyncio.sleep(0)
        assert isinstance(admitted[0], ShuttingDown)
        runs.gate.set()
        await draining
        assert await asyncio.gather(*tasks) == ["A", "B"]


async def test_a_caller_that_raises_does_not_affect_the_others_of_its_batch() -> None:
    runs, got = Runs(), list[str | CarryError]()

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


async def test_a_caller_may_queue_its_next_job_when_it_gets_a_result() -> None:
    """Also if that result is a deadline that expires, while the queue is looked through."""
    runs, got = Runs(), list[str | CarryError]()
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


async def test_drain_is_bounded() -> None:
    runs = Runs()
    batcher: Batcher[str, str] = Batcher(runs, BatchLimits(1, 1000), max_queue=9, max_in_flight=1)
    tasks = start_each(batcher, "ab")
    await runs.wait_for_batches(1)
    await batcher.drain(0.01)
    for task in tasks:
        with pytest.raises(ShuttingDown):
            await task


async def turns() -> None:
    """Run the event loop until every batch that may start has started."""
    for _ in range(MAX_DELAY_TURNS + 4):
        await asyncio.sleep(0)


@pytest.fixture
def ready_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of ready jobs at each attempt to form a batch."""
    found: list[int] = []
    take = FairQueue.take

    def counted(queue: FairQueue[Any, Any], *rest: Any, **more: Any) -> list[Any]:
        found.append(queue.ready)
        return take(queue, *rest, **more)

    monkeypatch.setattr(FairQueue, "take", counted)
    return found


async def test_no_batch_is_formed_while_none_may_start(ready_counts: list[int]) -> None:
    """Jobs that wait for a slot or for their stream are not searched at every arrival."""
    runs = Runs()
    async with batching(runs, in_flight=3, limits=LONG_BEYOND_64) as batcher:
        tasks = start_each(batcher, "abcde", steps=1000)
        await runs.wait_for_batches(2)
        tasks.append(start(batcher, "f", steps=1000))
        await turns()
        assert ready_counts == [5, 4]
        for name in "gh":
            tasks.append(start(batcher, name, steps=1000))
            tasks.append(start(batcher, name, "a"))
            await turns()
        assert ready_counts == [5, 4]
        tasks.append(start(batcher, "s"))
        await runs.wait_for_batches(3)
        assert runs.batches == [["a"], ["b"], ["s"]]
        runs.gate.set()
        await asyncio.gather(*tasks)


async def test_retried_short_job_runs_beside_a_long_one(ready_counts: list[int]) -> None:
    class LongOnesWait(Runs):
        async def __call__(self, jobs: Jobs, batch: RunningBatch) -> Jobs:
            if jobs[0].steps > 64:
                return await super().__call__(jobs, batch)
            self.batches.append([job.payload for job in jobs])
            again = [job for job in jobs if job.attempts < 1]
            for job in jobs:
                if job not in again:
                    job.resolve("done")
            return again

    runs = LongOnesWait()
    async with batching(runs, in_flight=2, limits=LONG_BEYOND_64) as batcher:
        long = start(batcher, "a", steps=1000)
        await runs.wait_for_batches(1)
        async with asyncio.timeout(5):
            assert await submit(batcher, "s") == "done"
        assert runs.batches == [["a"], ["s"], ["s"]]
        next_one = start(batcher, "b", steps=1000)
        await turns()
        assert ready_counts == [1, 1, 1]
        runs.gate.set()
        assert await asyncio.gather(long, next_one) == ["A", "B"]


async def test_long_jobs_leave_a_slot_for_short_ones() -> None:
    runs = Runs()
    async with batching(runs, in_flight=3, limits=LONG_BEYOND_64) as batcher:
        long_ones = start_each(batcher, "abcd", steps=1000)
        short = start(batcher, "s")
        await runs.wait_for_batches(3)
        assert runs.batches == [["a"], ["b"], ["s"]]
        runs.gate.set()
        assert await asyncio.gather(*long_ones, short) == ["A", "B", "C", "D", "S"]


async def test_failure_while_forming_fails_queued_jobs_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, note = Runs(), DrainRate.note
    broken = iter([None, ZeroDivisionError()])

    def failing_note(rate: DrainRate, *arguments: Any) -> None:
        if error := next(broken, None):
            raise error
        note(rate, *arguments)

    monkeypatch.setattr(DrainRate, "note", failing_note)
    batcher: Batcher[str, str] = Batcher(runs, BatchLimits(1, 100), max_queue=9, max_in_flight=1)
    running, following, waiting = (start(batcher, name) for name in "abc")
    runs.gate.set()
    assert await running == "A"
    with pytest.raises(InternalError):
        await waiting
    assert await following == "B"
    assert await submit(batcher, "d") == "D"
    await batcher.drain(5)
