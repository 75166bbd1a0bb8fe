"""The budget of a challenger: a share of what the champion computes and of the idle time."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from service.pipeline.shadow_budget import BURST_S, BusyClock, ShadowBudget


def empty_budget(share: float = 0.5) -> ShadowBudget:
    budget = ShadowBudget(share, now_s=100.0, busy_s=7.0)
    assert not budget.has_time
    return budget


def test_busy_process_gives_the_share_of_the_champion_and_no_more() -> None:
    budget = empty_budget()
    for _ in range(10):
        budget.earn(0.002)
    # all the time that passed was spent by the process
    budget.note_clocks(now_s=100.2, busy_s=7.2)
    budget.spend(0.0098)
    assert budget.has_time
    budget.spend(0.0003)
    assert not budget.has_time


def test_idle_time_counts_and_is_never_negative() -> None:
    budget = empty_budget()
    budget.note_clocks(now_s=100.02, busy_s=7.01)
    budget.spend(0.0048)
    assert budget.has_time
    budget.spend(0.0004)
    assert not budget.has_time
    budget.note_clocks(now_s=100.2, busy_s=8.0)
    budget.earn(0.003)
    assert budget.has_time


def test_unused_time_is_saved_up_to_a_bound() -> None:
    budget = empty_budget()
    budget.note_clocks(now_s=5000.0, busy_s=7.0)
    budget.spend(BURST_S - 0.001)
    assert budget.has_time
    budget.spend(0.0011)
    assert not budget.has_time


def test_busy_clock_counts_the_time_that_the_process_computes() -> None:
    clock = BusyClock()
    try:
        before_s, began_s = clock.read_s(), time.process_time()
        while time.process_time() < began_s + 0.02:
            pass
        assert clock.read_s() >= before_s + 0.02
    finally:
        clock.close()
    clock.close()


def test_share_of_0_never_computes() -> None:
    budget = ShadowBudget(0.0, now_s=0.0, busy_s=0.0)
    budget.earn(10.0)
    budget.note_clocks(now_s=100.0, busy_s=0.0)
    assert not budget.has_time


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.001, 0.2)), max_size=50),
    st.floats(0.05, 2),
)
def test_challenger_never_takes_more_than_its_share(
    rounds: list[tuple[float, float, float]], share: float
) -> None:
    """Whatever is computed, the sum is bounded by share, burst and one call."""
    budget, now_s, cpu_s = ShadowBudget(share, 0.0, 0.0), 0.0, 0.0
    earned = spent = longest = 0.0
    for champion_s, idle_s, call_s in rounds:
        budget.earn(champion_s)
        now_s, cpu_s = now_s + champion_s + idle_s, cpu_s + champion_s
        budget.note_clocks(now_s, cpu_s)
        earned += champion_s + idle_s
        if budget.has_time:
            budget.spend(call_s)
            spent, longest = spent + call_s, max(longest, call_s)
            now_s, cpu_s = now_s + call_s, cpu_s + call_s
    assert spent <= share * earned + BURST_S + longest + 1e-6
