"""Baselines of detection see the past alone, and share detection's calibration."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

pytest.importorskip("tensorflow")

from models.spec.layout import network_outputs, output_spec
from models.spec.model import ModelSpec, parse_spec
from models.training.data import streams_of
from models.training.detection import (
    WINDOW,
    Run,
    Scored,
    detection_baselines,
    fitted_to_outputs,
    rolling_z,
    scored_by,
    windows_of,
)
from models.training.evaluate import detect

HOUR_MS = 3_600_000
STEPS, SPLIT = 160, (80, 120)
FIT_MS = (SPLIT[0] * HOUR_MS, SPLIT[1] * HOUR_MS)
SPEC = parse_spec(
    {
        "name": "meters",
        "events": {
            "fields": [
                {"kind": "numeric", "name": "value", "mean": 3.0, "std": 2.0, "optional": True},
            ]
        },
        "layers": [{"kind": "lstm", "units": 2}],
        "heads": [{"kind": "anomaly", "name": "odd", "targets": ["value"]}],
        "detection": {
            "head": "odd",
            "channels": ["level"],
            "scales": [6],
            "memory_events": 50,
            "alarm": {"false_alarms_per_day": 0.3, "hold_events": 6},
        },
        "training": {"stream": "id", "order_by": "at"},
    }
)
Rows = NDArray[np.float64]


def table(values: Rows) -> pl.DataFrame:
    """Streams [S, T] of hourly values; NaN is a missing one."""
    return pl.concat(
        pl.DataFrame({"id": f"m{at:02d}", "at": np.arange(STEPS) * HOUR_MS, "value": own})
        for at, own in enumerate(values)
    ).with_columns(pl.col("value").fill_nan(None))


def run_of(values: Rows) -> Run:
    nats = np.abs(np.nan_to_num(values)).ravel().astype(np.float32)
    return Run(streams_of(SPEC, table(values), "data"), nats)


@pytest.fixture(scope="module")
def values() -> Rows:
    random = np.random.default_rng(5)
    daily = np.sin(np.arange(STEPS) * 2 * np.pi / 24)
    levels = random.normal(size=(8, 1)) * 10
    rows = levels + random.uniform(1, 5, (8, 1)) * (daily + random.normal(size=(8, STEPS)) / 3)
    rows[2, 30:33] = np.nan
    return rows


def found(spec: ModelSpec, fitted_to: Run, run: Run) -> dict[str, Scored]:
    return dict(detection_baselines(spec, fitted_to, run, *FIT_MS))


def test_later_events_change_no_earlier_score(values: Rows) -> None:
    spec = SPEC.model_copy(
        update={"detection": SPEC.detection.model_copy(update={"season_events": 24})}
        if SPEC.detection
        else {}
    )
    fitted_to = run_of(values)
    changed = values.copy()
    changed[:, SPLIT[1] :] *= 3.0
    before, after = found(spec, fitted_to, fitted_to), found(spec, fitted_to, run_of(changed))
    kept = np.tile(np.arange(STEPS) < SPLIT[1], len(values))
    assert before.keys() == {
        "level",
        "change",
        "seasonal naive",
        "rolling z",
        "isolation forest",
        "nats",
        "raw nats",
    }
    for name, scored in before.items():
        assert np.isfinite(scored.score).all(), name
        np.testing.assert_allclose(after[name].score[kept], scored.score[kept], atol=1e-6)
        np.testing.assert_array_equal(after[name].alarm[kept], scored.alarm[kept])
        assert not np.allclose(after[name].score[~kept], scored.score[~kept]), name


def test_the_level_is_scored_as_detection_scores_that_channel(values: Rows) -> None:
    run = run_of(values)
    outputs = np.zeros((values.size, network_outputs(SPEC).size), np.float32)
    spec = fitted_to_outputs(SPEC, run.streams, outputs, *FIT_MS)
    expected = scored_by("odd", output_spec(spec).by_name(detect(spec, run.streams, outputs)))
    level = found(SPEC, run, run)["level"]
    np.testing.assert_allclose(level.score, expected.score, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(level.alarm, expected.alarm)


def test_rolling_z_and_windows_equal_loops(values: Rows) -> None:
    own = values[2][:, np.newaxis]
    z, windows = rolling_z(own), windows_of(own, ((0, STEPS),))
    for at in (1, 2, 20, 34, 70, 159):
        recent, past = own[max(0, at - WINDOW) : at], own[:at]
        recent, past = recent[~np.isnan(recent)], past[~np.isnan(past)]
        if len(past) < 2:
            assert np.isnan(z[at, 0])
            assert not windows[at].any()
            continue
        assert z[at, 0] == pytest.approx((own[at, 0] - recent.mean()) / recent.std(), nan_ok=True)
        window = np.zeros(WINDOW)
        latest = own[max(0, at - WINDOW + 1) : at + 1, 0]
        window[WINDOW - len(latest) :] = (latest - past.mean()) / past.std()
        np.testing.assert_allclose(windows[at], np.nan_to_num(window), rtol=1e-4, atol=1e-5)
