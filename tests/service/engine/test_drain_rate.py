"""The drain rate of a queue: measured while jobs wait, otherwise unknown."""

from __future__ import annotations

import pytest

from service.engine.fair_queue import WINDOW_S, DrainRate


def test_no_rate_before_the_first_window_has_passed() -> None:
    rate = DrainRate()
    rate.note(0.0, 5)
    rate.done += 20
    rate.note(WINDOW_S / 2, 5)
    assert rate.per_s is None
    rate.done += 20
    rate.note(WINDOW_S, 5)
    assert rate.per_s == pytest.approx(40 / WINDOW_S)


def test_rate_averages_the_last_two_windows() -> None:
    rate = DrainRate()
    rate.note(0.0, 5)
    for done, now_s in ((100, 1.0), (300, 2.0), (300, 3.0)):
        rate.done += done
        rate.note(now_s, 5)
    assert rate.per_s == pytest.approx((100 + 300) / 4 + 300 / 2)


def test_window_without_progress_keeps_the_rate() -> None:
    """A time without progress (the store is unavailable) says nothing about the rate."""
    rate = DrainRate()
    rate.note(0.0, 5)
    rate.done += 50
    rate.note(1.0, 5)
    rate.note(31.0, 5)
    assert rate.per_s == pytest.approx(50)
    rate.done += 50
    rate.note(32.0, 5)
    assert rate.per_s == pytest.approx(50)


def test_empty_queue_has_no_rate() -> None:
    rate = DrainRate()
    rate.note(0.0, 5)
    rate.done += 50
    rate.note(1.0, 5)
    rate.note(2.0, 0)
    assert rate.per_s is None
    rate.done += 1
    rate.note(60.0, 5)
    assert rate.per_s is None
