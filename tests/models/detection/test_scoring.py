"""Alarms are scored against labelled anomalies."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from models.detection.scoring import (
    ECHO_EVENTS,
    AlarmScores,
    alarm_spans,
    draw_streams,
    score_streams,
    share_of_shifts,
    summarise,
    with_intervals,
)
from models.spec.detection import ALARM_STATES

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


def scores_of(alarm: NDArray[np.float64], labels: NDArray[np.bool_]) -> AlarmScores:
    """The scores of one stream, with an event each hour."""
    spans, days = [(0, len(labels))], [len(labels) / 24]
    return summarise(score_streams(alarm, alarm, labels, spans, days))


NONE, OPENED, CONTINUING, CLOSED = map(float, range(len(ALARM_STATES)))


def test_an_alarm_that_is_always_open_has_no_better_recall_than_by_chance() -> None:
    """It finds every anomaly and is never false: the other scores show what that is worth."""
    labels = np.zeros(1000, np.bool_)
    labels[[150, 400, 401, 402, 800]] = True
    alarm = np.full(1000, CONTINUING)
    alarm[0] = OPENED
    scores = scores_of(alarm, labels)
    assert (scores.recall, scores.precision, scores.false_per_day) == (1.0, 1.0, 0.0)
    assert scores.recall_by_chance == 1.0
    assert scores.opening_recall == 0.0
    assert scores.time_in_alarm == scores.normal_time_in_alarm == 1.0
    assert scores.merged == 1.0
    assert np.isnan(scores.openings_per_anomaly)


def test_an_alarm_that_was_open_before_the_first_event_opens_in_no_anomaly() -> None:
    labels = np.array([1, 1, 0, 0], np.bool_)
    for first, opened in ((CONTINUING, 0.0), (OPENED, 1.0)):
        scores = scores_of(np.array([first, CONTINUING, CLOSED, NONE]), labels)
        assert (scores.recall, scores.opening_recall) == (1.0, opened)


def test_alarms_that_follow_each_other_at_once_are_two() -> None:
    alarm = np.array([NONE, OPENED, CLOSED, OPENED, CONTINUING, CLOSED, NONE, OPENED])
    assert alarm_spans(alarm) == [(1, 3), (3, 6), (7, 8)]
    labels = np.array([0, 0, 0, 1, 1, 0, 0, 0], np.bool_)
    scores = scores_of(alarm, labels)
    assert (scores.alarms, scores.precision) == (3, pytest.approx(1 / 3))
    assert scores.false_per_day == pytest.approx(2 / (8 / 24 * 6 / 8))


def test_openings_in_an_anomaly_and_echoes_after_it_are_counted() -> None:
    labels = np.arange(600) // 10 == 10  # events 100 to 109
    alarm = np.zeros(600)
    # two in the anomaly, the last event that is an echo, and two elsewhere
    alarm[[102, 107, 109 + ECHO_EVENTS, 300, 60]] = OPENED
    scores = scores_of(alarm, labels)
    assert (scores.opening_recall, scores.openings_per_anomaly) == (1.0, 2.0)
    assert (scores.echoes, scores.merged) == (1.0, 0.0)
    assert scores.alarms == 5
    assert scores.time_in_alarm == pytest.approx(5 / 600)
    assert scores.normal_time_in_alarm == pytest.approx(3 / 590)
    assert scores_of(np.roll(alarm, 1), labels).echoes == 0.0


@pytest.mark.parametrize("events", [1, 3, 10, 60])
def test_the_recall_by_chance_is_the_mean_over_all_shifts(events: int) -> None:
    is_open = np.random.default_rng(7).random(60) < 0.1
    shifts = [np.roll(is_open, by)[:events].any() for by in range(60)]
    assert share_of_shifts(is_open, events) == pytest.approx(np.mean(shifts))
    assert share_of_shifts(np.zeros(60, np.bool_), events) == 0.0


def test_the_streams_with_most_false_alarms_a_day_have_names() -> None:
    alarm, labels = np.zeros(400), np.zeros(400, np.bool_)
    alarm[[5, 20, 30, 110]] = OPENED
    spans = [(at, at + 100) for at in range(0, 400, 100)]
    streams = score_streams(alarm, alarm, labels, spans, [2.0, 0.5, 2.0, 2.0], ["a", "b", "c", "d"])
    scored = with_intervals(streams)
    assert scored["false_per_day"] == pytest.approx(4 / 6.5)
    assert scored["median_false_per_day"] == pytest.approx(0.75)
    # the rate decides, not the number
    assert [each["stream"] for each in scored["most_false"]] == ["b", "a"]
    assert scored["most_false"][0] == {
        "stream": "b",
        "false_per_day": 2.0,
        "false_alarms": 1,
        "time_in_alarm": 0.01,
    }


def test_medians_of_draws_equal_those_of_repeated_streams() -> None:
    """The interval of a median comes from weights; here they are compared with repetitions."""
    random = np.random.default_rng(11)
    labels = np.tile(np.arange(40) // 10 == 1, 30)
    late = random.integers(10, 20, 30)
    alarm = np.zeros(1200)
    alarm[np.arange(30) * 40 + late] = OPENED
    spans = [(at, at + 40) for at in range(0, 1200, 40)]
    streams = score_streams(alarm, alarm, labels, spans, [1.0] * 30)
    assert summarise(streams).delay_events == np.median(late - 10)
    counts = draw_streams(30)
    delays = [np.median(np.repeat(late - 10, count.astype(int))) for count in counts]
    expected = np.quantile(delays, [0.025, 0.975]).tolist()
    assert with_intervals(streams)["intervals"]["delay_events"] == expected
