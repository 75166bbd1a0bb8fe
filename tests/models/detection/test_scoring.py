"""Alarms are scored against labelled anomalies."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from models.detection.measures import average_precision, runs, vus_pr
from models.detection.scoring import score_streams, summarise, with_intervals

SECOND = (0, 0, 0, 0, 1, 1, 0, 0, 0, 0)
ALARMS = (0, 0, 1, 2, 2, 2, 0, 0, 1, 0)
"""Labels and alarms of the second stream."""


def test_alarms_that_overlap_an_anomaly_are_true() -> None:
    anomalous = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, *SECOND], np.bool_)
    alarm = np.array([1, 0, 0, 1, 2, 3, 0, 0, 0, 0, *ALARMS], np.float64)
    scores = summarise(score_streams(alarm, alarm, anomalous, [(0, 10), (10, 20)], [2.0, 2.0]))
    assert scores.anomalies == 3
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.alarms == 4
    assert scores.precision == pytest.approx(0.5)
    assert scores.false_per_day == pytest.approx(2 / (2.0 * 0.6 + 2.0 * 0.8))
    # one event late, and open before it began
    assert scores.delay_events == pytest.approx(0.5)


def test_recall_and_precision_are_nan_without_anomalies_and_alarms() -> None:
    none = np.zeros(5)
    scores = summarise(score_streams(none, none, none > 0, [(0, 5)], [1.0]))
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


ANOMALIES = ((10, 14), (19, 21), (58, 60))
"""The buffers of the first two overlap from 10 events on; the last is at the end."""


@pytest.mark.parametrize(
    ("buffer_events", "expected"),
    # by the package vus 0.0.6 of the measure's authors, with as many thresholds as events
    [
        (0, 0.49161486411049793),
        (4, 0.5181956577344053),
        (9, 0.5634823670228363),
        (16, 0.6466551323420173),
    ],
)
def test_vus_pr_equals_the_implementation_of_its_authors(
    buffer_events: int, expected: float
) -> None:
    anomalous = np.zeros(60, np.bool_)
    for start, stop in ANOMALIES:
        anomalous[start:stop] = True
    at = np.arange(60)
    score = (7 * at**2 + 3 * at) % 61 / 61 + 0.25 * anomalous
    assert vus_pr(score, anomalous, buffer_events) == pytest.approx(expected, rel=1e-12)


def test_vus_pr_tolerates_what_is_slightly_early_or_late() -> None:
    anomalous = np.arange(200) // 10 == 5
    early, late, far = (np.roll(anomalous, by).astype(np.float64) for by in (-3, 3, 40))
    exact = anomalous.astype(np.float64)
    assert vus_pr(exact, anomalous, 10) == 1.0
    assert 1 > vus_pr(late, anomalous, 10) > average_precision(late, anomalous) + 0.05
    assert vus_pr(early, anomalous, 10) == pytest.approx(vus_pr(late, anomalous, 10))
    assert vus_pr(far, anomalous, 10) < 0.1
    assert np.isnan(vus_pr(exact, exact < 0, 10))


def test_buffers_do_not_cross_streams() -> None:
    anomalous = np.arange(40) == 20
    score = np.where(np.arange(40) == 19, 1.0, 0.0)
    together = vus_pr(score, anomalous, 4)
    assert vus_pr(score, anomalous, 4, [(0, 20), (20, 40)]) < 0.1 < together


def test_intervals_resample_streams() -> None:
    labels = np.tile(np.arange(20) == 10, 40)
    alarm = np.where(np.arange(800) // 20 % 2 == 0, labels, 0.0)
    spans = [(at, at + 20) for at in range(0, 800, 20)]
    scored = with_intervals(score_streams(alarm, alarm, labels, spans, [1.0] * 40))
    assert scored["recall"] == 0.5
    low, high = scored["intervals"]["recall"]
    # a binomial of 40 draws has a standard deviation of 0.079
    assert 0.3 < low < 0.4
    assert 0.6 < high < 0.7
    assert scored["intervals"]["precision"] == [1.0, 1.0]
    assert len(scored["worst"]) == 10
    assert scored["worst"][0] == {"stream": "1", "missed": 1, "false_alarms": 0}
    alone = with_intervals(score_streams(alarm[:20], alarm[:20], labels[:20] < 0, [(0, 20)], [1.0]))
    assert alone["recall"] is alone["intervals"]["recall"] is None
