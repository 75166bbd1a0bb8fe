"""The fair queue: order, fairness and cost of forming batches."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest

from service.engine.fair_queue import (
    MAX_SKIPPED,
    BatchLimits,
    FairQueue,
    Job,
)

LIMITS = BatchLimits(max_rows=4, max_padded_steps=64, long_steps=200)
LONG_BEYOND_16 = LIMITS._replace(long_steps=16)
ONE_ROW = LIMITS._replace(max_rows=1)
EVERY_LONG = 1000
"""More batches of long jobs than run."""


class Waiting:
    """A queue whose jobs are named by stream and number.

    `play` runs steps: `push a b:20` (streams, with steps), `push many= a b` (a request of several
    jobs), `take a0 b1` (expects these jobs), `release a`, `first a` (releases a retried stream),
    `put-back a0`, `cancel a0`, `drop` (all that are cancelled), `short-only`, `long-too`.
    """

    def __init__(self, limits: BatchLimits = LIMITS):
        self.queue: FairQueue[str, str] = FairQueue(limits, max_long=EVERY_LONG)
        self.jobs: dict[str, Job[str, str]] = {}

    def push(self, *streams: str, request: str | None = None) -> None:
        jobs = []
        for stream in streams:
            key, _, steps = stream.partition(":")
            name = f"{key}{len(self.jobs)}"
            stream_key = None if key == "-" else key
            count = int(steps or 1)
            self.jobs[name] = Job(
                name, stream_key, count, 0.0, math.inf, lambda _: None, request=request
            )
            jobs.append(self.jobs[name])
        for together in [jobs] if request else [[job] for job in jobs]:
            self.queue.push(*together)

    def take(self) -> list[str]:
        return [job.payload for job in self.queue.take(0.0)[0]]

    def play(self, steps: str) -> None:
        for step in steps.split(";"):
            verb, *names = step.split()
            match verb:
                case "push":
                    request = names.pop(0)[:-1] if names[0].endswith("=") else None
                    self.push(*names, request=request)
                case "take":
                    assert self.take() == names, step
                case "release" | "first":
                    self.queue.release(names, 0.0, names if verb == "first" else ())
                case "put-back":
                    self.queue.put_back(self.jobs[names[0]])
                case "cancel":
                    self.jobs[names[0]].is_cancelled = True
                case "drop":
                    assert [job.payload for job in self.queue.remove_expired(0.0)] == names
                case _:
                    self.queue.long_batches = EVERY_LONG if verb == "short-only" else 0


SCENARIOS = {
    "one job of each stream": (LIMITS, "push a a b; take a0 b2; take; release a b; take a1"),
    "jobs without a stream share a batch": (LIMITS, "push - -; take -0 -1; take"),
    "a backlog is served round robin": (
        LIMITS._replace(max_rows=2),
        "push a a a b c; take a0 b3; release a; take c4 a1",
    ),
    "jobs pushed together wait behind the others of their streams": (
        LIMITS,
        "push a; take a0; push many= a b b c; take b2 c4; release a b c; take a1 b3",
    ),
    "requests share a batch evenly": (
        LIMITS,
        "push many= a b c d e f; push g h; take a0 g6 h7 b1; take c2 d3 e4 f5",
    ),
    "a job that does not fit is skipped and comes first next time": (
        LIMITS,
        "push a:20 b:60 b c; take a0 c3; take b1",
    ),
    "a batch is filled up to its budget": (LIMITS, "push a:16 b:16 c:16 d:16; take a0 b1 c2 d3"),
    "a job is not skipped twice, for any number of smaller ones": (
        LIMITS,
        "push a b c d e; push Y:40; push f g h i; take a0 b1 c2 d3; take e4 f6 g7 h8; take Y5",
    ),
    "nor is one of a request": (
        LIMITS,
        "push a b c d e; push many= Y:40 Z:40; push f g; take a0 b1 c2 d3; take e4 f7 g8; take Y5",
    ),
    "skipped items keep their order": (
        LIMITS,
        "push many= a:20 b:60 c:60 d; take a0 d3; take b1; take c2",
    ),
    "a job over the budget runs alone": (LIMITS, "push a:150 b; take a0; take b1"),
    "long jobs wait where only short ones may start": (
        LONG_BEYOND_16,
        "push a:999 a b; short-only; take b2; take; long-too; take a0",
    ),
    "long and short jobs are batched separately, oldest first": (
        LONG_BEYOND_16,
        "push a:20 b c:20; take a0 c2; take b1; push d e:20 f; take d3 f5; take e4",
    ),
    "a retried job comes before all others": (
        ONE_ROW,
        "push a a b; take a0; put-back a0; first a; take a0; release a; take b2; take a1",
    ),
    "a retried job of a released stream comes before the stream's later jobs": (
        ONE_ROW,
        "push a a b; take a0; release a; put-back a0; take b2; take a0; release a; take a1",
    ),
    "a retried job of an idle stream comes before all others": (
        ONE_ROW,
        "push a b; take a0; release a; put-back a0; take a0; take b1",
    ),
    "a retried job waits while its stream is held": (
        LIMITS,
        "push a a; take a0; release a; take a1; put-back a0; take; put-back a1; first a; take a0;"
        "release a; take a1",
    ),
    "a short job behind a retried long one keeps its place": (
        LONG_BEYOND_16,
        "push a:999 a b; take a0; release a; put-back a0; short-only; take b2; take; long-too;"
        "take a0",
    ),
    "a short job behind a dropped long one is taken at once": (
        LONG_BEYOND_16,
        "push a:20 a; cancel a0; take a1",
    ),
    "a long job behind a dropped short one is taken at once": (
        LONG_BEYOND_16,
        "push a a:20; cancel a0; drop a0; take a1",
    ),
    "the others of a request whose job was dropped keep their place": (
        LIMITS,
        "push many= a b; push c; cancel a0; drop a0; take b1 c2; push many= d; take d3",
    ),
    "a stream whose jobs were dropped starts again": (
        LIMITS,
        "push a b; cancel a0; take b1; push a; take a2;push c; cancel c3; drop c3; push c; take c4",
    ),
    "so does one that a batch had released": (
        LIMITS,
        "push a a; take a0; release a; cancel a1; drop a1; push a; take a2",
    ),
    "a held stream whose waiting jobs were dropped stays held": (
        LIMITS,
        "push a a; take a0; cancel a1; drop a1; push a; take; release a; take a2",
    ),
}


@pytest.mark.parametrize(("limits", "steps"), SCENARIOS.values(), ids=SCENARIOS)
async def test_order_of_jobs(limits: BatchLimits, steps: str) -> None:
    Waiting(limits).play(steps)


async def test_the_number_of_skipped_jobs_is_bounded() -> None:
    waiting = Waiting(LIMITS._replace(max_rows=200))
    waiting.push("first:20", *(f"large{n}.:60" for n in range(MAX_SKIPPED)), "small")
    assert waiting.take() == ["first0"]
    assert waiting.queue.ready == MAX_SKIPPED + 1
    assert waiting.take() == ["large0.1"]


async def test_jobs_are_counted_until_they_are_taken_or_dropped() -> None:
    waiting = Waiting()
    waiting.play("push a a b c c; cancel b2; take a0 c3")
    queue = waiting.queue
    assert (queue.waiting, queue.ready, queue.requests) == (2, 0, 0)
    assert queue.backlog("b") is None
    assert not queue.are_idle(["a", "d"])
    assert queue.are_idle(["d"])
    waiting.play("push b:300; cancel a1; drop a1")
    assert (queue.waiting, queue.ready, queue.requests) == (2, 1, 1)
    queue.release(["a"], 0.0)
    assert queue.backlog("a") is None
    assert queue.are_idle(["a"])
    assert [job.payload for job in queue.clear()] == ["c4", "b5"]
    assert (queue.waiting, queue.ready, queue.requests) == (0, 0, 0)
    waiting.play("push -; take -6")
    assert queue.are_idle(["a", "b", waiting.jobs["-6"]])


async def test_expired_jobs_are_returned() -> None:
    waiting = Waiting(LONG_BEYOND_16)
    waiting.push("a:20", "a:20", "a", "b", "c")
    for name, deadline_s in (("a0", 1.0), ("a1", 1.0), ("b3", 2.0), ("c4", 1.0)):
        waiting.jobs[name].deadline_s = deadline_s
    jobs, expired = waiting.queue.take(1.0)
    assert [job.payload for job in jobs] == ["a2", "b3"]
    assert [job.payload for job in expired] == ["a0", "a1", "c4"]
    assert waiting.queue.waiting == 0


async def test_a_batch_costs_the_same_however_long_a_streams_backlog_is() -> None:
    waiting = Waiting()
    waiting.push(*["hot"] * 5000, "a")
    backlog = waiting.queue.backlog("hot")
    assert backlog is not None

    class Untouched(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the backlog is looked through")

    backlog.jobs = Untouched(backlog.jobs)
    for _ in range(10):
        waiting.take()
        waiting.queue.release(["hot"], 0.0)


@pytest.mark.parametrize("seed", range(20))
async def test_invariants(seed: int) -> None:
    """Under random pushes, batches, releases and retries."""
    random = Random(seed)
    waiting = Waiting(LIMITS._replace(long_steps=100))
    queue = waiting.queue
    held: list[Job[str, str]] = []
    done: list[Job[str, str]] = []
    while len(done) < 60:
        move = random.random()
        if len(waiting.jobs) < 60 and move < 0.4:
            stream = f"{random.choice('-abcdef')}:{random.choice((1, 16, 40, 150))}"
            waiting.push(stream, request=random.choice("0123"))
        elif held and move < 0.7:
            job = held.pop(random.randrange(len(held)))
            is_retried = random.random() < 0.3
            if is_retried:
                queue.put_back(job)
            else:
                done.append(job)
            if job.key is not None:
                queue.release([job.key], 0.0, {job.key} if is_retried else set())
        else:
            ready = queue.ready
            jobs, _ = queue.take(0.0)
            assert bool(jobs) == bool(ready)
            assert len(jobs) <= 4
            assert len(jobs) < 2 or len(jobs) * max(job.steps for job in jobs) <= 64
            assert len({job.steps > 100 for job in jobs}) < 2
            held += jobs
            keys = [job.key for job in held if job.key is not None]
            assert len(set(keys)) == len(keys), "a stream has one job in flight"
    assert (queue.waiting, queue.ready, queue.requests) == (0, 0, 0)
    for key in "abcdef":
        numbers = [job.number for job in done if job.key == key]
        assert numbers == sorted(numbers)
        assert queue.backlog(key) is None
