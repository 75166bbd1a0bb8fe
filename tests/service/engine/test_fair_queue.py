"""The fair queue: order, fairness and cost of forming batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from itertools import count
from random import Random
from typing import Any

import pytest

from service.engine.fair_queue import (
    MAX_SKIPPED,
    BatchLimits,
    FairQueue,
    Job,
    RunningBatch,
    Work,
)

LIMITS = BatchLimits(max_rows=4, max_padded_steps=64, long_steps=200)
LONG_BEYOND_16 = BatchLimits(max_rows=4, max_padded_steps=64, long_steps=16)


class Waiting:
    """A queue whose jobs are named by stream and number, each of a separate request."""

    def __init__(self, limits: BatchLimits = LIMITS):
        self.queue: FairQueue[str, str] = FairQueue(limits, max_long=1000)
        self.jobs: dict[str, Job[str, str]] = {}
        self._numbers = count()

    def job(self, key: str | None, steps: int = 1, request: str | None = None) -> Any:
        name = f"{key}{next(self._numbers)}"
        job = Job(name, key, steps, 0.0, math.inf, lambda _: None, request)
        self.jobs[name] = job
        return job

    def push(self, *keys: str | None, steps: int = 1, request: str | None = None) -> None:
        jobs = [self.job(key, steps, request) for key in keys]
        for together in [jobs] if request else [[job] for job in jobs]:
            self.queue.push(*together)

    def cancel(self, *names: str) -> None:
        for name in names:
            self.jobs[name].is_cancelled = True

    def take(self, *, long_ones: bool = True) -> list[str]:
        self.queue.long_batches = 0 if long_ones else 1000
        return [job.payload for job in self.queue.take(0.0)[0]]


async def test_a_batch_takes_one_job_of_each_stream() -> None:
    waiting = Waiting()
    waiting.push("a", "a", "b")
    assert waiting.take() == ["a0", "b2"]
    assert waiting.take() == []
    waiting.queue.release(["a"], 0.0)
    waiting.queue.release(["b"], 0.0)
    assert waiting.take() == ["a1"]


@pytest.mark.parametrize("items", [1, 2])
async def test_a_job_that_does_not_fit_is_not_skipped_twice(items: int) -> None:
    """For any number of smaller jobs, and of jobs of its request."""
    waiting = Waiting()
    waiting.push(*"abcde")
    waiting.push(*"YZ"[:items], steps=40, request="many" if items > 1 else None)
    waiting.push(*"fghijklm")
    assert waiting.take() == ["a0", "b1", "c2", "d3"]
    assert waiting.take()[0] == "e4"
    assert waiting.take() == ["Y5"]


async def test_jobs_without_a_stream_share_a_batch() -> None:
    waiting = Waiting()
    waiting.push(None, None)
    assert waiting.take() == ["None0", "None1"]
    assert (waiting.queue.waiting, waiting.queue.ready) == (0, 0)


async def test_a_stream_with_a_backlog_is_served_round_robin() -> None:
    waiting = Waiting(BatchLimits(max_rows=2, max_padded_steps=64))
    waiting.push("hot", "hot", "hot", "a", "b")
    assert waiting.take() == ["hot0", "a3"]
    waiting.queue.release(["hot"], 0.0)
    assert waiting.take() == ["b4", "hot1"]


async def test_jobs_pushed_together_wait_behind_the_others_of_their_streams() -> None:
    waiting = Waiting()
    waiting.push("a")
    assert waiting.take() == ["a0"]
    waiting.push("a", "b", "b", "c", request="many")
    assert not waiting.queue.are_idle(["a", "d"])
    assert waiting.queue.are_idle(["d"])
    assert waiting.take() == ["b2", "c4"]
    waiting.queue.release(["a", "b", "c"], 0.0)
    assert waiting.take() == ["a1", "b3"]


async def test_requests_share_a_batch_evenly() -> None:
    """A request of many items gets as many places as others, and the unused ones."""
    waiting = Waiting()
    waiting.push("a", "b", "c", "d", "e", "f", request="many")
    waiting.push("lone", "other")
    assert waiting.take() == ["a0", "lone6", "other7", "b1"]
    assert waiting.take() == ["c2", "d3", "e4", "f5"]


async def test_a_job_that_does_not_fit_is_skipped_and_comes_first_next_time() -> None:
    waiting = Waiting()
    waiting.push("a", steps=20)
    waiting.push("b", steps=60)
    waiting.push("b", "c")
    assert waiting.take() == ["a0", "c3"]
    assert waiting.take() == ["b1"]


async def test_skipped_items_keep_their_order() -> None:
    waiting = Waiting()
    for key, steps in (("a", 20), ("b", 60), ("c", 60), ("d", 1)):
        waiting.push(key, steps=steps, request="many")
    assert [waiting.take() for _ in range(3)] == [["a0", "d3"], ["b1"], ["c2"]]


async def test_a_job_over_the_budget_goes_alone() -> None:
    waiting = Waiting()
    waiting.push("a", steps=150)
    waiting.push("b")
    assert waiting.take() == ["a0"]
    assert waiting.take() == ["b1"]


async def test_the_number_of_skipped_jobs_is_bounded() -> None:
    waiting = Waiting(BatchLimits(max_rows=200, max_padded_steps=64))
    waiting.push("first", steps=20)
    waiting.push(*(f"large{n}:" for n in range(MAX_SKIPPED)), steps=60)
    waiting.push("small")
    assert waiting.take() == ["first0"]
    assert waiting.queue.ready == MAX_SKIPPED + 1
    assert waiting.take() == ["large0:1"]


async def test_long_jobs_wait_where_only_short_ones_may_start() -> None:
    waiting = Waiting(LONG_BEYOND_16)
    waiting.push("a", steps=1000)
    waiting.push("a", "b")
    assert waiting.take(long_ones=False) == ["b2"]
    assert waiting.take(long_ones=False) == []
    assert waiting.take() == ["a0"]


async def test_long_and_short_jobs_are_batched_separately_oldest_first() -> None:
    waiting = Waiting(LONG_BEYOND_16)
    waiting.push("a", steps=20)
    waiting.push("b")
    waiting.push("c", steps=20)
    assert [waiting.take() for _ in range(2)] == [["a0", "c2"], ["b1"]]


async def test_a_job_that_is_put_back_comes_before_all_others() -> None:
    waiting = Waiting(BatchLimits(max_rows=1, max_padded_steps=64))
    waiting.push("a", "a", "b")
    (first,) = waiting.queue.take(0.0)[0]
    waiting.queue.put_back(first)
    waiting.queue.release(["a"], 0.0, {"a"})
    assert waiting.take() == ["a0"]
    waiting.queue.release(["a"], 0.0)
    assert waiting.take() + waiting.take() == ["b2", "a1"]


async def test_a_job_of_a_released_stream_is_put_back_before_the_streams_later_jobs() -> None:
    waiting = Waiting(BatchLimits(max_rows=1, max_padded_steps=64))
    waiting.push("a", "a", "b")
    (first,) = waiting.queue.take(0.0)[0]
    waiting.queue.release(["a"], 0.0)
    waiting.queue.put_back(first)
    assert waiting.take() + waiting.take() == ["b2", "a0"]
    waiting.queue.release(["a"], 0.0)
    assert waiting.take() == ["a1"]


async def test_a_job_put_back_waits_while_its_stream_is_held() -> None:
    waiting = Waiting()
    waiting.push("a", "a")
    (first,) = waiting.queue.take(0.0)[0]
    waiting.queue.release(["a"], 0.0)
    (second,) = waiting.queue.take(0.0)[0]
    waiting.queue.put_back(first)
    assert waiting.take() == []
    waiting.queue.put_back(second)
    waiting.queue.release(["a"], 0.0, {"a"})
    assert waiting.take() == ["a0"]
    waiting.queue.release(["a"], 0.0)
    assert waiting.take() == ["a1"]


async def test_short_job_behind_a_put_back_long_job_keeps_its_place() -> None:
    waiting = Waiting(LONG_BEYOND_16)
    waiting.push("a", steps=1000)
    waiting.push("a", "b")
    (first,) = waiting.queue.take(0.0)[0]
    waiting.queue.release(["a"], 0.0)
    waiting.queue.put_back(first)
    assert waiting.take(long_ones=False) == ["b2"]
    assert waiting.take(long_ones=False) == []
    assert waiting.take() == ["a0"]


@pytest.mark.parametrize("dropped_early", [False, True])
@pytest.mark.parametrize(("first", "second"), [(1, 20), (20, 1)])
async def test_a_job_behind_a_dropped_one_of_another_length_is_taken_at_once(
    first: int, second: int, *, dropped_early: bool
) -> None:
    """A batcher that gets no job waits for the next event, which need not come."""
    waiting = Waiting(LONG_BEYOND_16)
    waiting.push("a", steps=first)
    waiting.push("a", steps=second)
    waiting.cancel("a0")
    if dropped_early:
        waiting.queue.remove_expired(0.0)
    assert waiting.take() == ["a1"]


async def test_cancelled_jobs_are_dropped_and_free_their_streams() -> None:
    waiting = Waiting()
    waiting.push("a", "a", "b", "c", "c")
    waiting.cancel("b2")
    assert waiting.take() == ["a0", "c3"]
    assert waiting.queue.backlog("b") is None
    waiting.push("b")
    waiting.cancel("a1")
    waiting.queue.remove_expired(0.0)
    assert (waiting.queue.waiting, waiting.queue.ready, waiting.queue.requests) == (2, 1, 1)
    waiting.cancel("b5")
    waiting.queue.remove_expired(0.0)
    assert (waiting.queue.waiting, waiting.queue.ready, waiting.queue.requests) == (1, 0, 0)
    assert waiting.queue.backlog("b") is None
    waiting.queue.release(["a"], 0.0)
    assert waiting.queue.backlog("a") is None
    assert [job.payload for job in waiting.queue.clear()] == ["c4"]
    assert waiting.queue.waiting == 0


async def test_a_batch_costs_the_same_however_long_a_streams_backlog_is() -> None:
    waiting = Waiting()
    waiting.push(*["hot"] * 5000, "a")
    backlog = waiting.queue.backlog("hot")
    assert backlog is not None

    class Untouched(deque[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the backlog is looked through")

    backlog.jobs = Untouched(backlog.jobs)
    for _ in range(10):
        waiting.take()
        waiting.queue.release(["hot"], 0.0)


@pytest.mark.parametrize("seed", range(20))
async def test_invariants(seed: int) -> None:
    """Under random pushes, batches, releases and put-backs."""
    random = Random(seed)
    waiting = Waiting(BatchLimits(max_rows=4, max_padded_steps=64, long_steps=100))
    held: list[Job[str, str]] = []
    done: list[Job[str, str]] = []
    left = 60
    while len(done) < 60:
        move = random.random()
        if left and move < 0.4:
            left -= 1
            steps = random.choice((1, 16, 40, 150))
            key, request = random.choice([None, *"abcdef"]), random.choice("0123")
            waiting.push(key, steps=steps, request=request)
        elif held and move < 0.7:
            job = held.pop(random.randrange(len(held)))
            again = random.random() < 0.3
            if again:
                waiting.queue.put_back(job)
            else:
                done.append(job)
            if job.key is not None:
                waiting.queue.release([job.key], 0.0, {job.key} if again else set())
        else:
            ready = waiting.queue.ready
            jobs = waiting.queue.take(0.0)[0]
            assert bool(jobs) == bool(ready)
            assert len(jobs) <= 4
            assert len(jobs) < 2 or len(jobs) * max(job.steps for job in jobs) <= 64
            assert len({job.steps > 100 for job in jobs}) < 2
            held += jobs
            keys = [job.key for job in held if job.key is not None]
            assert len(set(keys)) == len(keys), "a stream has one job in flight"
    assert (waiting.queue.waiting, waiting.queue.ready, waiting.queue.requests) == (0, 0, 0)
    for key in "abcdef":
        numbers = [job.number for job in done if job.key == key]
        assert numbers == sorted(numbers)
        assert waiting.queue.backlog(key) is None


def test_a_batch_releases_only_streams_that_it_holds_and_in_their_order() -> None:
    released: list[Hashable] = []

    def detach(batch: RunningBatch, jobs: Sequence[Job[Any, Any]], work: Work) -> None:
        raise AssertionError("nothing is detached")

    batch = RunningBatch([], {*"abcd"}, released.extend, detach)
    batch.release_streams("cxa")
    batch.release_streams("abcd")
    assert released == [*"ca", *"bd"]
