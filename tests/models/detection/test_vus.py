"""Areas under precision and recall, against loops by the definition and cases of known areas."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from models.detection.vus import average_precision, runs, vus_pr

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def labels_of(events: int, *anomalies: tuple[int, int]) -> Bools:
    labels = np.zeros(events, np.bool_)
    for start, stop in anomalies:
        labels[start:stop] = True
    return labels


def weight_of(event: int, anomalies: list[tuple[int, int]], buffer: int) -> float:
    """The soft label of an event outside of the anomalies."""
    weight = 0.0
    for start, stop in anomalies:
        distance = start - event if event < start else event - stop + 1
        if distance <= buffer // 2:
            weight += (1 - distance / buffer) ** 0.5
    return min(weight, 1.0)


def area_by_loops(score: Floats, labels: Bools, buffer: int) -> float:
    """Range-AUC-PR with one buffer, threshold by threshold and event by event."""
    anomalies = runs(labels)
    soft = [
        1.0 if labels[at] else weight_of(at, anomalies, buffer) if buffer else 0.0
        for at in range(len(score))
    ]
    ranges = runs(np.array([weight > 0 for weight in soft]))
    positives = sum(labels.tolist())
    area = before = 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        predicted = [at for at in range(len(score)) if score[at] >= threshold]
        true = sum(soft[at] for at in predicted)
        beside = sum(soft[at] for at in predicted if not labels[at])
        found = sum(any(a <= at < b for at in predicted) for a, b in ranges)
        recall = min(true / (positives + beside / 2), 1.0) * found / len(ranges)
        area += (recall - before) * true / len(predicted)
        before = recall
    return area


@pytest.mark.parametrize("seed", range(4))
def test_vus_pr_equals_loops_over_buffers_thresholds_and_events(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = labels_of(90, (0, 4), (31, 38), (60, 61))
    score = random.integers(0, 12, 90) + 4.0 * labels * random.random(90)
    expected = np.mean([area_by_loops(score, labels, buffer) for buffer in range(11)])
    assert vus_pr(score, labels, 10) == pytest.approx(expected, rel=1e-12)


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
    labels, at = labels_of(60, *ANOMALIES), np.arange(60)
    # the last anomaly is found late, when precision is low
    score = (7 * at**2 + 3 * at) % 61 / 61 + np.where(at < 40, 0.25, -0.5) * labels
    assert vus_pr(score, labels, buffer_events) == pytest.approx(expected, rel=1e-12)


def test_a_perfect_score_has_the_area_one() -> None:
    labels = labels_of(200, (50, 70), (120, 121))
    assert vus_pr(labels.astype(np.float64), labels, 20) == 1.0
    assert average_precision(labels.astype(np.float64), labels) == 1.0


def test_a_constant_score_has_the_share_of_the_soft_labels() -> None:
    """Its one threshold predicts every event, at a recall of 1."""
    labels = labels_of(400, (100, 140))
    falling = [
        sum((1 - distance / buffer) ** 0.5 for distance in range(1, buffer // 2 + 1))
        for buffer in range(21)
    ]
    expected = np.mean([(40 + 2 * beside) / 400 for beside in falling])
    assert vus_pr(np.full(400, 3.0), labels, 20) == pytest.approx(expected, rel=1e-12)
    assert average_precision(np.full(400, 3.0), labels) == pytest.approx(0.1)


def test_a_random_score_has_about_the_area_of_a_constant_one() -> None:
    labels = labels_of(20_000, *((at, at + 50) for at in range(100, 20_000, 1000)))
    random = np.random.default_rng(2).random(20_000)
    constant = vus_pr(np.zeros(20_000), labels, 50)
    assert vus_pr(random, labels, 50) == pytest.approx(constant, rel=0.15)


def test_any_score_of_events_that_are_all_anomalous_has_the_area_one() -> None:
    score = np.random.default_rng(1).random(100)
    assert vus_pr(score, np.ones(100, np.bool_), 30) == pytest.approx(1.0)


def test_one_long_anomaly_found_by_half_has_half_the_recall_at_full_precision() -> None:
    """Its other half comes last, when precision is the share of the labels."""
    labels = labels_of(1000, (200, 600))
    score = np.where(np.arange(1000) < 400, 1.0, 0.0) * labels - 1.0 * (
        labels & (np.arange(1000) >= 400)
    )
    expected = 0.5 * 1.0 + 0.5 * 0.4
    assert vus_pr(score, labels, 0) == pytest.approx(expected)


def test_many_buffers_are_averaged_at_equal_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    labels = labels_of(3000, (300, 420), (900, 1100), (2000, 2010))
    score = random.random(3000) + 0.5 * np.roll(labels, 15)
    few = vus_pr(score, labels, 200)
    monkeypatch.setattr("models.detection.vus.BUFFERS", 201)
    assert few == pytest.approx(vus_pr(score, labels, 200), rel=2e-3)


def test_vus_pr_tolerates_scores_slightly_early_or_late() -> None:
    anomalous = np.arange(200) // 10 == 5
    early, late, far = (np.roll(anomalous, by).astype(np.float64) for by in (-3, 3, 40))
    assert 1 > vus_pr(late, anomalous, 10) > average_precision(late, anomalous) + 0.05
    assert vus_pr(early, anomalous, 10) == pytest.approx(vus_pr(late, anomalous, 10))
    assert vus_pr(far, anomalous, 10) < 0.1
    assert np.isnan(vus_pr(late, late < 0, 10))


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


def test_average_precision_equals_scikit_learn() -> None:
    random = np.random.default_rng(3)
    score = random.integers(0, 9, 400).astype(np.float64)
    positive = random.random(400) < score / 20
    expected = average_precision_score(positive, score)
    assert average_precision(score, positive) == pytest.approx(expected)


def test_runs_are_maximal() -> None:
    assert runs(np.array([1, 1, 0, 0, 1], np.bool_)) == [(0, 2), (4, 5)]
    assert runs(np.zeros(0, np.bool_)) == []
