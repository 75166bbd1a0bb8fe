"""A few seconds of `make overload`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.bench.generator import Load
from tests.load.overload import LIMITS, Measurement, started


@pytest.mark.alone
def test_overload_keeps_goodput_and_rejects_the_rest(tmp_path: Path) -> None:
    """Bounds for a busy machine; `make overload` has the real ones."""
    with started(tmp_path, units=64, steps=256) as overload:
        before, over, after = overload.run(times=2.0, seconds=3.0, peak_s=1.0)
    assert over.load.rejected > over.load.chunks * 0.1
    # other processes on the cores do not change what a second of CPU time is worth
    assert 2 * over.per_cpu_s / (before.per_cpu_s + after.per_cpu_s) > 0.5
    assert over.percentiles_ms()[1] < 5000


def test_every_failed_condition_is_reported() -> None:
    load = Load(seconds=10.0, chunks=500, latencies_s=np.full(500, 3.0))
    over = Measurement(load, [100, 100, 100, 130], 1.0)
    assert [check.name for check in over.check(100.0) if not check.passed] == list(LIMITS)
    load = Load(seconds=10.0, chunks=900, latencies_s=np.full(900, 0.4), rejected=900)
    over = Measurement(load, [100, 100, 100, 105], 1.0)
    assert all(check.passed for check in over.check(100.0))
