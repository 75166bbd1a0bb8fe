"""A few seconds of `make overload`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.load.overload import LIMITS, Measurement, overload, pinned_service


@pytest.mark.alone
def test_overload_keeps_goodput_and_rejects_the_rest(tmp_path: Path) -> None:
    """Bounds for a busy machine; `make overload` has the real ones."""
    with pinned_service(tmp_path, units=64) as service:
        before, over, after = overload(service, steps=256, times=2.0, seconds=5.0, peak_s=2.0)
    assert set(over.statuses) == {200, 429}
    assert over.statuses[429] > over.offered * 0.1
    # other processes on the cores do not change what a second of CPU time is worth
    assert 2 * over.per_cpu_s / (before.per_cpu_s + after.per_cpu_s) > 0.5
    assert over.percentile_s(99) < 5


def test_every_failed_condition_is_reported() -> None:
    over = Measurement(10.0)
    over.statuses.update({200: 500, 500: 1})
    over.latencies_s.extend([3.0] * 500)
    over.rss_bytes += [100, 100, 100, 130]
    assert [check.name for check in over.check(100.0) if not check.passed] == list(LIMITS)
    over.statuses.update({429: 500, 200: 450})
    del over.statuses[500], over.rss_bytes[3], over.latencies_s[:]
    over.latencies_s.append(0.4)
    assert all(check.passed for check in over.check(100.0))
