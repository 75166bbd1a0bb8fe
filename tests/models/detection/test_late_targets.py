"""A target whose first values are missing, in a model with a season."""

from __future__ import annotations

import numpy as np
import pytest

from models.spec.detection import CHANNEL_KINDS
from models.spec.layout import network_outputs
from tests.models.detection.test_detector import events, fitted, run, spec_of, streams_of
from tests.models.detection.test_stream_tails import fitted_to_events, parameters_of
from tests.support.oracle_detection import DetectionOracle


@pytest.mark.parametrize("missing", [1, 12, 100])
def test_missing_first_values_do_not_hide_what_follows(missing: int) -> None:
    spec = spec_of(["heat"], season_events=24, outputs=["deviation"])
    spec = fitted(spec, streams_of(spec, 10, 1000, seed=3))
    assert spec.events is not None
    rows = np.zeros((missing + 400, spec.input_features), np.float32)
    heat = np.random.default_rng(5).normal(50, 1, len(rows))
    heat[-1] = 60
    rows[missing:, spec.events.column_index["heat"]] = heat[missing:]
    rows[:missing, spec.events.column_index["heat.missing"]] = 1
    outputs = np.zeros((len(rows), network_outputs(spec).size), np.float32)
    found, _ = run(spec, rows, outputs, [missing + 100, 300])
    deviation = found["odd.deviation"][:, CHANNEL_KINDS.index("level")]
    assert deviation[-1] > 4
    assert np.abs(deviation[:-1]).max() < 3


@pytest.mark.parametrize("missing", [3, 20])
def test_the_season_of_a_target_that_comes_late_is_the_oracles(missing: int) -> None:
    spec = spec_of(["flow", "heat"], prior_events=5, season_events=7, outputs=["nats", "share"])
    spec = fitted_to_events(spec)
    rows, outputs = events(np.random.default_rng(11), spec, 150)
    assert spec.events is not None
    rows[:missing, spec.events.column_index["heat"]] = 0
    rows[:missing, spec.events.column_index["heat.missing"]] = 1
    scored, _ = run(spec, rows, outputs, [2, 48, 100])
    oracle, parameters = DetectionOracle(spec), parameters_of(spec)
    expected = [
        oracle.step(row, given[parameters]) for row, given in zip(rows, outputs, strict=True)
    ]
    for name in ("probability", "share", "nats"):
        values = np.array([each[name] for each in expected])
        np.testing.assert_allclose(scored[f"odd.{name}"], values, rtol=1e-3, atol=1e-5)
