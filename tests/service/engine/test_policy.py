"""Forming batches: who is taken, who waits, in which order."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.policy import ENOUGH_ROWS, MOST_TURNS, BatchLimits, PutOff, form, put_off


@dataclass(frozen=True)
class Waits:
    key: Hashable | None
    steps: int


LIMITS = BatchLimits(max_rows=4, max_padded_steps=64)

jobs = st.lists(
    st.builds(Waits, st.none() | st.sampled_from("abcdefgh"), st.integers(1, 200)), max_size=30
)


def test_takes_one_job_per_stream_in_order() -> None:
    queue = [Waits("a", 1), Waits("a", 1), Waits("b", 1)]
    assert form(queue, set(), LIMITS) == [0, 2]


def test_leaves_streams_in_flight() -> None:
    assert form([Waits("a", 1), Waits("b", 1)], {"a"}, LIMITS) == [1]


def test_a_job_passed_over_is_not_overtaken_by_its_own_stream() -> None:
    queue = [Waits("a", 60), Waits("b", 60), Waits("b", 1)]
    assert form(queue, set(), LIMITS) == [0]


def test_a_job_over_the_budget_goes_alone() -> None:
    assert form([Waits("a", 1000), Waits("b", 1)], set(), LIMITS) == [0]


def test_long_jobs_wait_where_only_short_ones_may_start() -> None:
    limits = BatchLimits(max_rows=4, max_padded_steps=64, long_steps=16)
    queue = [Waits("a", 1000), Waits("a", 1), Waits("b", 1)]
    assert form(queue, set(), limits, long_ones=False) == [2]
    assert form(queue, set(), limits) == [0]


def test_jobs_without_a_stream_share_a_batch() -> None:
    assert form([Waits(None, 1), Waits(None, 1)], set(), LIMITS) == [0, 1]


@given(jobs, st.sets(st.sampled_from("abcdefgh")))
def test_invariants(queue: list[Waits], busy: set[str]) -> None:
    chosen = form(queue, busy, LIMITS)
    assert chosen == sorted(set(chosen))
    keys = [queue[i].key for i in chosen if queue[i].key is not None]
    assert len(set(keys)) == len(keys)
    assert not busy.intersection(keys)
    assert len(chosen) <= LIMITS.max_rows
    if len(chosen) > 1:
        longest = max(queue[i].steps for i in chosen)
        assert len(chosen) * longest <= LIMITS.max_padded_steps
    eligible = [i for i, job in enumerate(queue) if job.key not in busy]
    assert chosen[:1] == eligible[:1]
    for i in chosen:
        assert all(queue[j].key != queue[i].key or queue[i].key is None for j in range(i))


@pytest.mark.parametrize(
    ("waiting", "last", "in_flight", "turns", "expected"),
    [
        (15, 16, 1, 0, PutOff.FOR_ANSWERS),
        (15, 16, 1, MOST_TURNS, PutOff.FOR_ANSWERS),
        (16, 16, 1, 0, PutOff.NOT),
        (ENOUGH_ROWS - 1, 64, 1, 0, PutOff.FOR_ANSWERS),
        (ENOUGH_ROWS, 64, 1, 0, PutOff.NOT),
        (ENOUGH_ROWS, 64, 0, 0, PutOff.A_TURN),
        (15, 16, 0, MOST_TURNS - 1, PutOff.A_TURN),
        (15, 16, 0, MOST_TURNS, PutOff.NOT),
        (16, 16, 0, 0, PutOff.NOT),
        (1, 1, 1, 0, PutOff.NOT),
        (1, 0, 0, 0, PutOff.NOT),
        (0, 16, 1, 0, PutOff.NOT),
    ],
)
def test_a_batch_smaller_than_the_last_is_put_off(
    waiting: int, last: int, in_flight: int, turns: int, expected: PutOff
) -> None:
    assert put_off(waiting, last, in_flight, turns) is expected
