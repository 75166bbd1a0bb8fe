"""Alarms are scored against labelled anomalies."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from models.detection.scoring import average_precision, runs, score_alarms

SECOND = (0, 0, 0, 0, 1, 1, 0, 0, 0, 0)
ALARMS = (0, 0, 1, 2, 2, 2, 0, 0, 1, 0)
"""Labels and alarms of the second stream."""


def test_alarms_that_overlap_an_anomaly_are_true() -> None:
    anomalous = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, *SECOND], np.bool_)
    alarm = np.array([1, 0, 0, 1, 2, 3, 0, 0, 0, 0, *ALARMS], np.float64)
    scores = score_alarms(alarm, alarm, anomalous, [(0, 10), (10, 20)], [2.0, 2.0])
    assert scores.anomalies == 3
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.alarms == 4
    assert scores.precision == pytest.approx(0.5)
    assert scores.false_per_day == pytest.approx(2 / (2.0 * 0.6 + 2.0 * 0.8))
    # one event late, and open before it began
    assert scores.delay_events == pytest.approx(0.5)


def test_recall_and_precision_are_nan_without_anomalies_and_alarms() -> None:
    none = np.zeros(5)
    scores = score_alarms(none, none, none > 0, [(0, 5)], [1.0])
    assert np.isnan([scores.recall, scores.precision, scores.average_precision]).all()
    assert scores.false_per_day == 0


def test_average_precision_equals_scikit_learn() -> None:
    random = np.random.default_rng(3)
    score = random.integers(0, 9, 400).astype(np.float64)
    positive = random.random(400) < score / 20
    expected = average_precision_score(positive, score)
    assert average_precision(score, positive) == pytest.approx(expected)


def test_runs_are_maximal() -> None:
    assert runs(np.array([1, 1, 0, 0, 1], np.bool_)) == [(0, 2), (4, 5)]
    assert runs(np.zeros(0, np.bool_)) == []
