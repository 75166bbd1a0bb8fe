"""Alarms: the threshold for a rate of false alarms, and how an alarm opens, holds and closes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from models.detection.alarms import (
    MUTED_EVENTS,
    OPENED,
    AlarmState,
    acknowledge_alarm,
    count_alarms,
    follow_alarm,
)
from models.detection.fit import alarm_threshold, alarm_thresholds
from models.detection.tails import MAX_NATS
from models.spec.detection import AlarmSpec, DetectionFit, Tail
from models.spec.layout import detection_state, state_spec
from tests.models.detection.test_detector import spec_of

TAIL = Tail(threshold=1.0, exceeded=0.05, scale=1.0, shape=0.0)


def bursts() -> list[NDArray[np.float64]]:
    """Larger thresholds make fewer and longer alarms of them."""
    random = np.random.default_rng(9)
    return [np.repeat(random.random(200), 20) for _ in range(5)]


def test_thresholds_grow_with_the_rate_and_give_as_many_alarms() -> None:
    alarm, random = AlarmSpec(hold_events=5), np.random.default_rng(18)
    streams = [random.random(4000) ** 2 for _ in range(10)]
    rates, thresholds = alarm_thresholds(alarm, streams, days=1000)
    fit = DetectionFit(
        tails=(TAIL,), combined=TAIL, rates=rates, thresholds=thresholds, events_per_day=100.0
    )
    assert list(thresholds) == sorted(set(thresholds))
    assert alarm.false_alarms_per_day in rates
    for rate in (0.02, 0.05, 0.3, 1.0):
        opened, _ = count_alarms(alarm, streams, fit.threshold(rate))
        assert opened == pytest.approx(1000 * rate, rel=0.3)
    assert fit.threshold(rates[0] / 4) == pytest.approx(thresholds[0] / 4)
    assert fit.threshold(1000) == thresholds[-1]


def test_a_rate_that_alarms_cannot_have_gives_the_most_within_the_bound() -> None:
    """Not the threshold of the largest stored rate that they can have."""
    alarm = AlarmSpec(hold_events=50, hysteresis=5)
    streams = bursts()
    rates, thresholds = alarm_thresholds(alarm, streams, days=800)
    assert rates[-1] == alarm.false_alarms_per_day
    opened, events = count_alarms(alarm, streams, thresholds[-1])
    assert events <= 3 * 40 * 51
    assert 36 <= opened < 40
    assert thresholds[-1] == alarm_threshold(alarm, streams, expected=40)


def test_the_rate_of_the_model_is_stored_however_large_it_is() -> None:
    alarm = AlarmSpec(hold_events=50, false_alarms_per_day=900)
    rates, thresholds = alarm_thresholds(alarm, bursts(), days=800)
    assert rates[-1] == 900
    assert list(thresholds) == sorted(thresholds)


def test_as_many_alarms_as_expected_are_opened_beside_a_stream_with_a_long_one() -> None:
    """The long one begins where the number is reached, and would exceed the bound."""
    alarm = AlarmSpec(hold_events=5, hysteresis=1, false_alarms_per_day=0.01)
    random = np.random.default_rng(20)
    streams = [random.random(4000) for _ in range(10)]
    reached = alarm_threshold(alarm, streams, expected=40)
    streams.append(np.full(2000, 1.01 * reached))
    rates, thresholds = alarm_thresholds(alarm, streams, days=800)
    threshold = thresholds[rates.index(0.05)]
    assert 36 <= count_alarms(alarm, streams, threshold)[0] <= 40


def test_the_threshold_of_a_few_alarms_does_not_depend_on_the_most_unusual_event() -> None:
    """One expected alarm among 40,000 events without anomalies, in 20 sets of them."""
    alarm, random = AlarmSpec(hold_events=5), np.random.default_rng(21)
    found = [alarm_threshold(alarm, list(random.random((10, 4000))), 1) for _ in range(20)]
    assert min(found) > 0.4 / 40_000
    assert max(found) < 2.5 / 40_000


def test_threshold_never_keeps_alarms_open_permanently() -> None:
    alarm = AlarmSpec(hold_events=50)
    streams = bursts()
    threshold = alarm_threshold(alarm, streams, expected=40)
    opened, events = count_alarms(alarm, streams, threshold)
    assert 20 <= opened <= 40
    assert events <= 3 * 40 * 51


BOUNDED = AlarmSpec(hold_events=5, close_above=0.01, backoff_nats=1.0)


def with_anomalies(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Tail probabilities of 4000 events, with anomalies of one event each."""
    probability = random.random(4000)
    probability[:: 4000 // count][:count] = 1e-6
    return probability


def test_as_many_alarms_are_opened_as_expected_with_the_bound_of_each_stream() -> None:
    """Two of the eight streams have more alarms than they may have."""
    random = np.random.default_rng(22)
    streams = [with_anomalies(random, count) for count in (20, 20, 1, 1, 1, 1, 1, 1)]
    rates, thresholds = alarm_thresholds(BOUNDED, streams, days=320)
    for expected in (16, 32):
        threshold = thresholds[rates.index(expected / 320)]
        opened, _ = count_alarms(BOUNDED, streams, threshold, expected / 32_000)
        assert 0.8 * expected <= opened <= expected
        assert threshold == alarm_threshold(BOUNDED, streams, expected)


def test_a_stream_with_many_anomalies_does_not_make_the_threshold_of_others_stricter() -> None:
    random = np.random.default_rng(23)
    streams = [random.random(4000) for _ in range(20)]
    usual = alarm_threshold(BOUNDED, streams, expected=30)
    streams[0] = with_anomalies(random, 20)
    assert alarm_threshold(BOUNDED, streams, expected=30) > 0.9 * usual


def test_long_anomalies_do_not_make_the_threshold_stricter() -> None:
    """Each of the alarms that they open is open for 60 events."""
    random = np.random.default_rng(24)
    streams = [random.random(4000) for _ in range(20)]
    usual = alarm_threshold(BOUNDED, streams, expected=30)
    for probability in streams[2:12]:
        probability[2000:2060] = 1e-6
    assert alarm_threshold(BOUNDED, streams, expected=30) > 0.5 * usual


@pytest.mark.parametrize(
    ("probability", "codes"),
    [
        ([0.5, 0.001, 0.5, 0.5, 0.5], [0, 1, 2, 3, 0]),
        ([0.001, 0.5, 0.001, 0.5, 0.5, 0.001], [1, 2, 2, 2, 3, 1]),
        ([0.001, 0.02, 0.02, 0.5, 0.5], [1, 2, 2, 2, 3]),
    ],
    ids=["closes after the hold", "opens once for neighbours", "held by the lower threshold"],
)
def test_alarms_open_hold_and_close(probability: list[float], codes: list[int]) -> None:
    alarm = AlarmSpec(hold_events=2, hysteresis=3.0)
    for cut in range(len(codes) + 1):
        state, found = AlarmState(), []
        for part in (probability[:cut], probability[cut:]):
            found += follow_alarm(alarm, np.array(part), 0.01, state).tolist()
        assert found == codes


def test_an_alarm_needs_its_minimum_of_events() -> None:
    alarm = AlarmSpec(min_events=2, hold_events=1, hysteresis=1.0)
    probability = np.array([0.001, 0.5, 0.001, 0.001, 0.5])
    found = follow_alarm(alarm, probability, 0.01, AlarmState())
    assert found.tolist() == [0, 0, 0, 1, 3]


@pytest.mark.parametrize("cut", [0, 1, 30, MUTED_EVENTS, MUTED_EVENTS + 1])
def test_no_alarm_opens_while_an_acknowledged_stream_is_muted(cut: int) -> None:
    model = spec_of(["flow"])
    layout = state_spec(model)
    floats = np.arange(1, layout.float_size + 1, dtype=np.float32)
    acknowledged = acknowledge_alarm(model, floats)
    alarm_at, own = layout.slices["odd.alarm"], detection_state(model).parts
    for name, columns in layout.slices.items():
        if name not in {part.name for part in own}:
            np.testing.assert_array_equal(acknowledged[columns], floats[columns])
        elif name != "odd.alarm":
            assert not acknowledged[columns].any()
    state, found = AlarmState(number=float(acknowledged[alarm_at][0])), []
    probability = np.full(MUTED_EVENTS + 3, 0.001)
    for part in (probability[:cut], probability[cut:]):
        found += follow_alarm(AlarmSpec(), part, 0.01, state).tolist()
    assert found == [0] * MUTED_EVENTS + [1, 2, 2]


@pytest.mark.parametrize("stored", [-3e38, -30.0, 3e38])
def test_an_alarm_follows_any_restored_state(stored: float) -> None:
    state = AlarmState(number=stored)
    found = follow_alarm(AlarmSpec(), np.array([0.5, 0.001, 0.5]), 0.01, state)
    assert found.tolist() == ([3, 1, 2] if stored < 0 else [0, 1, 2])


def test_each_excess_alarm_but_the_first_makes_the_threshold_stricter() -> None:
    alarm = AlarmSpec(hold_events=1, backoff_nats=1.0)
    unusual, usual = [0.01 * np.exp(-0.9)], [0.5]
    # after two alarms the third needs a probability exp(-1) times smaller, and less so later
    probability = np.array([*unusual, *usual] * 3 + usual * 100 + [*unusual, *usual] * 2)
    state, found = AlarmState(), []
    for part in (probability[:5], probability[5:90], probability[90:]):
        found += follow_alarm(alarm, part, 0.01, state, per_event=0.002).tolist()
    assert np.flatnonzero(np.array(found) == OPENED).tolist() == [0, 2, 4 + 102]
    assert follow_alarm(alarm, probability, 0.01, AlarmState()).tolist().count(1) == 5


@pytest.mark.parametrize("per_event", [0.0, 0.003])
def test_alarms_have_an_upper_bound_for_any_probabilities(per_event: float) -> None:
    alarm, random = AlarmSpec(hold_events=1, backoff_nats=2.0), np.random.default_rng(4)
    nats = np.minimum(random.exponential(40.0, 20_000), MAX_NATS) * (np.arange(20_000) % 3 == 0)
    codes = follow_alarm(alarm, np.exp(-nats), 0.01, AlarmState(), per_event)
    opened = np.cumsum(codes == OPENED)
    for span in (10, 1000, 20_000):
        most = (opened[span - 1 :] - np.append(0, opened[:-span])).max()
        assert most <= per_event * span + MAX_NATS / 2 + 2
    assert opened[-1] > per_event * 20_000
