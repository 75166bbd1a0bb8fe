"""Baselines of detection see the past alone, and are fitted to the training part alone."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA

pytest.importorskip("tensorflow")

from models.detection.tails import EXCEEDED, Tails, fit_tail
from models.spec.model import ModelSpec, parse_spec
from models.training.data import Streams, streams_of
from models.training.detection_baselines import (
    EXPLAINED,
    LAST,
    MIN_WINDOWS,
    NEIGHBOURS,
    WINDOW,
    Parts,
    Scored,
    detection_baselines,
    fit_components,
    fit_neighbours,
    own_past_nats,
    past_moments,
    windows_of,
)

HOUR_MS = 3_600_000
STEPS, VALIDATE, TEST = 360, 160, 260
Rows = NDArray[np.float64]
FITTED = {"isolation forest", "k nearest neighbours", "PCA"}
SINGLE = ("raw nats", "running level", "change", "seasonal naive")
CAUSAL = {"random", *SINGLE, *(f"{name}{LAST}" for name in SINGLE)}


def spec_of(*targets: str) -> ModelSpec:
    fields = [
        {"kind": "numeric", "name": name, "mean": 3.0, "std": 2.0, "optional": True}
        for name in targets
    ]
    return parse_spec(
        {
            "name": "meters",
            "events": {"fields": fields},
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "anomaly", "name": "odd", "targets": list(targets)}],
            "detection": {
                "head": "odd",
                "season_events": 24,
                "alarm": {"false_alarms_per_day": 0.3, "hold_events": 6},
            },
            "training": {"stream": "id", "order_by": "at"},
        }
    )


SPEC = spec_of("value")


def streams_from(values: Rows, spec: ModelSpec = SPEC) -> Streams:
    """Streams [S, T] or [S, T, D] of hourly values; NaN is a missing one."""
    names = [field.name for field in spec.events.fields] if spec.events else []
    by_target = values.reshape(len(values), STEPS, len(names))
    frame = pl.concat(
        pl.DataFrame(
            {"id": f"m{at:02d}", "at": np.arange(STEPS) * HOUR_MS}
            | {name: own[:, target] for target, name in enumerate(names)}
        )
        for at, own in enumerate(by_target)
    )
    return streams_of(spec, frame.with_columns(pl.col(names).fill_nan(None)), "data")


def found(values: Rows, spec: ModelSpec = SPEC) -> dict[str, Scored]:
    step = np.tile(np.arange(STEPS), len(values))
    is_validation = (step >= VALIDATE) & (step < TEST)
    parts = Parts(step < VALIDATE, is_validation, len(values) * (TEST - VALIDATE) / 24)
    first = np.nan_to_num(values.reshape(len(values) * STEPS, -1)[:, 0])
    return dict(detection_baselines(spec, streams_from(values, spec), np.abs(first), parts))


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.training.detection_baselines.TREES", 5)


@pytest.fixture
def values() -> Rows:
    random = np.random.default_rng(5)
    daily = np.sin(np.arange(STEPS) * 2 * np.pi / 24)
    levels = random.normal(size=(6, 1)) * 10
    rows = levels + random.uniform(1, 5, (6, 1)) * (daily + random.normal(size=(6, STEPS)) / 3)
    rows[2, 30:33] = np.nan
    return rows


def test_later_events_change_no_earlier_score(values: Rows) -> None:
    changed = values.copy()
    changed[:, TEST:] *= 3.0
    before, after = found(values), found(changed)
    kept = np.tile(np.arange(STEPS) < TEST, len(values))
    assert before.keys() == CAUSAL | FITTED
    for name, scored in before.items():
        other = after[name]
        assert np.isfinite(scored.score).all(), name
        assert scored.alarm is not None
        assert other.alarm is not None
        np.testing.assert_allclose(other.score[kept], scored.score[kept], atol=1e-6)
        np.testing.assert_array_equal(other.alarm[kept], scored.alarm[kept])
        assert name == "random" or not np.allclose(other.score[~kept], scored.score[~kept]), name


def test_methods_are_fitted_to_the_training_part_alone(values: Rows) -> None:
    changed = values.copy()
    changed[:, VALIDATE:] += np.random.default_rng(2).normal(size=(6, STEPS - VALIDATE)) * 20
    before, after = found(values), found(changed)
    kept = np.tile(np.arange(STEPS) < VALIDATE, len(values))
    for name in before.keys() - {"random"}:
        own, other = before[name].score[kept], after[name].score[kept]
        np.testing.assert_allclose(other, own, atol=1e-5, err_msg=name)


def test_neighbours_and_components_are_those_of_the_own_stream(values: Rows) -> None:
    changed = values.copy()
    changed[1:] += np.random.default_rng(2).normal(size=(5, STEPS)) * 20
    before, after = found(values), found(changed)
    for name in ("k nearest neighbours", "PCA"):
        own, other = before[name].score[:STEPS], after[name].score[:STEPS]
        np.testing.assert_allclose(other, own, atol=1e-5, err_msg=name)


def test_as_many_alarms_open_as_expected_in_the_validation_part(values: Rows) -> None:
    for name, scored in found(np.random.default_rng(9).normal(size=(30, STEPS))).items():
        assert scored.alarm is not None
        alarms = (scored.alarm.reshape(30, STEPS)[:, VALIDATE:TEST] == 1).sum()
        # 0.3 a day in 100 hours of 30 streams are 37.5
        assert 20 < alarms < 40, name


def test_scores_equal_loops(values: Rows) -> None:
    scores = {name: each.score for name, each in found(values).items()}
    own = (values[2] - 3.0) / 2.0
    deviation = np.nanstd(own[:VALIDATE])
    for at in (40, 100, 200, 359):
        row = 2 * STEPS + at
        expected = {
            "raw nats": abs(np.nan_to_num(values[2, at])),
            "running level": abs(own[at] - np.nanmean(own[:at])) / deviation,
            "change": abs(own[at] - own[at - 1]) / deviation,
            "seasonal naive": abs(own[at] - own[at - 24]) / deviation,
        }
        for name, value in expected.items():
            assert scores[name][row] == pytest.approx(value, rel=1e-4), (name, at)
    for name in SINGLE:
        power = 1 if name == "raw nats" else 2
        for at in (0, 5, 11, 12, 100):
            last = scores[name][STEPS + max(0, at - 11) : STEPS + at + 1]
            expected_mean = np.mean(last**power) ** (1 / power)
            assert scores[f"{name}{LAST}"][STEPS + at] == pytest.approx(expected_mean, abs=1e-6)


def test_several_targets_are_combined_by_their_norm() -> None:
    random = np.random.default_rng(6)
    rows = random.normal(size=(3, STEPS, 3)) * np.array([1.0, 50.0, 0.01])
    scores = {name: each.score for name, each in found(rows, spec_of("a", "b", "c")).items()}
    own = rows[1]
    deviation = own[:VALIDATE].std(axis=0)
    expected = np.linalg.norm((own[300] - own[:300].mean(axis=0)) / deviation)
    assert scores["running level"][STEPS + 300] == pytest.approx(expected, rel=1e-3)
    expected = np.linalg.norm((own[300] - own[276]) / deviation)
    assert scores["seasonal naive"][STEPS + 300] == pytest.approx(expected, rel=1e-3)


def test_a_tail_of_the_past_is_that_of_all_scores_before_its_fit() -> None:
    score = np.abs(np.random.default_rng(4).normal(size=600))
    nats = own_past_nats(score)
    assert not nats[:MIN_WINDOWS].any()
    tail = Tails([fit_tail(score[:MIN_WINDOWS], EXCEEDED)])
    expected = tail.nats(score[np.newaxis, MIN_WINDOWS : MIN_WINDOWS + 25])[0]
    np.testing.assert_array_equal(nats[MIN_WINDOWS : MIN_WINDOWS + 25], expected)
    # of normal events, as many are below a probability as it says
    long = own_past_nats(np.abs(np.random.default_rng(5).normal(size=50_000)))
    assert np.mean(np.exp(-long[1000:]) < 0.01) == pytest.approx(0.01, rel=0.2)


def test_neighbours_and_components_equal_their_definitions() -> None:
    random = np.random.default_rng(7)
    fitted = random.normal(size=(300, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    windows = random.normal(size=(20, 8)).astype(np.float32) * 5
    distances = np.linalg.norm(windows[:, np.newaxis] - fitted, axis=2)
    expected = np.sort(distances, axis=1)[:, NEIGHBOURS - 1]
    np.testing.assert_allclose(fit_neighbours(fitted)(windows), expected, rtol=1e-4)
    pca = PCA(n_components=EXPLAINED).fit(fitted.astype(np.float64))
    rest = windows - pca.inverse_transform(pca.transform(windows))
    np.testing.assert_allclose(
        fit_components(fitted)(windows), np.linalg.norm(rest, axis=1), rtol=1e-3
    )


def test_windows_and_moments_of_the_past_equal_loops(values: Rows) -> None:
    own = values[2][:, np.newaxis]
    windows, (mean, deviation) = windows_of(own), past_moments(own, WINDOW)
    for at in (1, 2, 20, 34, 70, 159):
        recent, past = own[max(0, at - WINDOW) : at], own[:at]
        recent, past = recent[~np.isnan(recent)], past[~np.isnan(past)]
        if len(past) < 2:
            assert np.isnan(mean[at, 0])
            assert not windows[at].any()
            continue
        assert mean[at, 0] == pytest.approx(recent.mean())
        assert deviation[at, 0] == pytest.approx(recent.std())
        window = np.zeros(WINDOW)
        latest = own[max(0, at - WINDOW + 1) : at + 1, 0]
        window[WINDOW - len(latest) :] = (latest - past.mean()) / past.std()
        np.testing.assert_allclose(windows[at], np.nan_to_num(window), rtol=1e-4, atol=1e-5)
    assert windows_of(np.zeros((50, 5))).shape == (50, 35)
