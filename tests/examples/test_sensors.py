"""The generated sensors have their anomalies where they say."""

from __future__ import annotations

import numpy as np
import pytest

from examples.sensors.data import CLEAN, KINDS, LENGTHS, Kinds, sensors
from models.detection.vus import runs


@pytest.mark.parametrize("kinds", ["development", "held_out"])
def test_anomalies_are_labelled_and_after_the_clean_part(kinds: Kinds) -> None:
    frame = sensors(kinds, count=5, days=20)
    assert frame.equals(sensors(kinds, count=5, days=20))
    for part in frame.partition_by("sensor"):
        found = runs(part["anomaly"].to_numpy())
        assert 1 <= len(found) <= 2
        longest = max(stop - start for start, stop in found)
        assert longest <= 2 * max(LENGTHS[kind][1] for kind in KINDS[kinds])
        assert found[0][0] >= CLEAN * part.height
        assert set(np.diff(part["time"].dt.epoch("ms"))) == {900_000}
        assert np.isfinite(part["value"].to_numpy()).all()


def test_the_two_sets_of_kinds_are_disjoint() -> None:
    assert not set(KINDS["development"]) & set(KINDS["held_out"])
    assert {kind for kinds in KINDS.values() for kind in kinds} == LENGTHS.keys()
