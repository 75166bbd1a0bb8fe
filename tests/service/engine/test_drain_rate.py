"""The rate at which a queue drains: measured while something waits, and never guessed."""

from __future__ import annotations

import pytest

from service.engine.drain_rate import WINDOW_S, DrainRate


def test_there_is_no_rate_before_a_window_has_passed() -> None:
    rate = DrainRate()
    rate.note(0.0, 5)
    rate.done += 20
    rate.note(WINDOW_S / 2, 5)
    assert rate.per_s is None
    rate.done += 20
    rate.note(WINDOW_S, 5)
    assert rate.per_s == pytest.approx(40 / WINDOW_S)


def test_it_follows_what_is_done_and_keeps_half_of_the_window_before() -> None:
    rate = DrainRate()
    rate.note(0.0, 5)
    for done, now_s in ((100, 1.0), (300, 2.0), (300, 3.0)):
        rate.done += done
        rate.note(now_s, 5)
    assert rate.per_s == pytest.approx((100 + 300) / 4 + 300 / 2)


def test_a_time_in_which_nothing_was_done_changes_nothing() -> None:
    """The store is away: how fast work goes is not known any better for it."""
    rate = DrainRate()
    rate.note(0.0, 5)
    rate.done += 50
    rate.note(1.0, 5)
    rate.note(31.0, 5)
    assert rate.per_s == pytest.approx(50)
    rate.done += 50
    rate.note(32.0, 5)
    assert rate.per_s == pytest.approx(50)


def test_where_nothing_waits_there_is_no_rate() -> None:
    rate = DrainRate()
    rate.note(0.0, 5)
    rate.done += 50
    rate.note(1.0, 5)
    rate.note(2.0, 0)
    assert rate.per_s is None
    rate.done += 1
    rate.note(60.0, 5)
    assert rate.per_s is None
