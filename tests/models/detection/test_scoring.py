"""Alarms are scored against labelled anomalies."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from models.detection.scoring import (
    average_precision,
    runs,
    score_streams,
    summarise,
    vus_pr,
    with_intervals,
)

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
    # one alarm that overlaps two anomalies
    labels = np.array([1, 1, 0, 1, 0, 0, 1, 1, 1, 1], np.bool_)
    alarm = np.array([0, 1, 2, 2, 0, 0, 1, 0, 0, 0], np.float64)
    scores = summarise(score_streams(alarm, alarm, labels, [(0, 10)], [1.0]))
    assert (scores.anomalies, scores.recall, scores.alarms, scores.precision) == (3, 1.0, 2, 1.0)


def test_an_alarm_beside_an_anomaly_is_false() -> None:
    """Closed at the event before its start, or opened at the event after its end."""
    labels = np.array([0, 0, 1, 1, 0, 0], np.bool_)
    alarm = np.array([1, 1, 0, 0, 1, 1], np.float64)
    scores = summarise(score_streams(alarm, alarm, labels, [(0, 6)], [1.0]))
    assert (scores.recall, scores.alarms, scores.precision) == (0.0, 2, 0.0)


def test_the_delay_is_from_the_start_of_an_anomaly_to_its_alarm() -> None:
    anomalous = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, *SECOND], np.bool_)
    alarm = np.array([1, 0, 0, 1, 2, 3, 0, 0, 0, 0, *ALARMS], np.float64)
    scores = summarise(score_streams(alarm, alarm, anomalous, [(0, 10), (10, 20)], [2.0, 2.0]))
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
        (0, 0.28367235005297553),
        (4, 0.3250784237918372),
        (9, 0.3710612024225691),
        (16, 0.48891253075467656),
    ],
)
def test_vus_pr_equals_the_implementation_of_its_authors(
    buffer_events: int, expected: float
) -> None:
    anomalous = np.zeros(60, np.bool_)
    for start, stop in ANOMALIES:
        anomalous[start:stop] = True
    at = np.arange(60)
    # the last anomaly is found late, when precision is low
    score = (7 * at**2 + 3 * at) % 61 / 61 + np.where(at < 40, 0.25, -0.5) * anomalous
    assert vus_pr(score, anomalous, buffer_events) == pytest.approx(expected, rel=1e-12)


def test_vus_pr_tolerates_scores_slightly_early_or_late() -> None:
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
    halves = [(0, 20), (20, 40)]
    assert vus_pr(score, anomalous, 4, halves) < 0.1 < together
    # the anomaly is the last event of its stream, and the next stream's first counts as any other
    last = np.arange(40) == 19
    beside, far = (np.where(np.arange(40) == at, 1.0, last / 2) for at in (20, 30))
    assert vus_pr(beside, last, 4, halves) == vus_pr(far, last, 4, halves)


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
