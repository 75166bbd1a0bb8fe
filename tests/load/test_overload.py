"""A service that gets twice what it can do: a few seconds of `make overload`."""

from __future__ import annotations

from pathlib import Path

from tests.load.overload import MOST_GROWTH, Result, Seen, overload, overloadable


def test_goodput_stays_and_the_rest_is_refused_at_once(tmp_path: Path) -> None:
    """Bounds for a busy machine; `make overload` has the real ones."""
    with overloadable(tmp_path, units=64) as service:
        result = overload(service, steps=256, times=2.0, seconds=5.0, peak_s=2.0)
    over = result.over
    assert set(over.statuses) == {200, 429}
    assert over.statuses[429] > over.offered * 0.1
    assert result.efficiency > 0.5
    assert over.percentile_s(99) < 5


def test_what_is_wrong_is_named() -> None:
    over = Seen(10.0)
    over.statuses.update({200: 500, 500: 1})
    over.latencies_s.extend([3.0] * 500)
    over.rss_bytes += [100, 100, 100, 130]
    assert over.growth > MOST_GROWTH
    found = Result(100.0, over).failures()
    assert [failure.split()[0] for failure in found] == [
        *("other", "nothing", "goodput", "p99", "memory"),
    ]
    over.statuses.update({429: 500, 200: 450})
    del over.statuses[500], over.rss_bytes[3], over.latencies_s[:]
    over.latencies_s.append(0.4)
    assert Result(100.0, over).failures() == []
