"""The record of an alarm, against the oracle for any chunks, and the words for its cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from models.detection.causes import Causes
from models.detection.detector import Detector, FloatRows
from models.detection.fit import Stream
from models.errors import SpecError
from models.spec.detection import AlarmSpec
from models.spec.layout import (
    detection_columns,
    detection_state,
    network_outputs,
    output_spec,
    state_spec,
)
from models.spec.model import ModelSpec
from tests.models.detection.test_detector import events, fitted, run, spec_of
from tests.support.oracle_detection import DetectionOracle

TARGETS = ["flow", "mode", "heat", "open"]
ALARM = {"close_above": 0.1, "hold_events": 1}
OUTPUTS = ["share", "severity", "since"]
OPTIONS: dict[str, Any] = {"memory_events": 30, "prior_events": 5}
BACKOFF = ("alarm_since", "alarm_excess")
MANY_EVENTS = 1 << 20
BOUNDED = ALARM | {"backoff_nats": 0.3, "false_alarms_per_day": 5.0}


def fitted_to_events(alarm: dict[str, Any] = ALARM, **options: Any) -> ModelSpec:
    """Its threshold is high, so that alarms open and close."""
    spec = spec_of(TARGETS, outputs=OUTPUTS, alarm=alarm, **OPTIONS, **options)
    random, parameters = np.random.default_rng(5), network_outputs(spec).slices["odd.parameters"]
    made = [events(random, spec, 200) for _ in range(6)]
    counted = np.ones(200, np.bool_)
    spec = fitted(spec, [Stream(rows, each[:, parameters], counted, 2.0) for rows, each in made])
    assert spec.detection is not None
    assert spec.detection.fit is not None
    rates = (spec.detection.alarm.false_alarms_per_day,)
    fit = spec.detection.fit.model_copy(update={"rates": rates, "thresholds": (0.04,)})
    return spec.model_copy(update={"detection": spec.detection.model_copy(update={"fit": fit})})


@pytest.fixture(scope="module", params=["a season", "a bound"])
def model(request: pytest.FixtureRequest) -> ModelSpec:
    return (
        fitted_to_events(season_events=7)
        if request.param == "a season"
        else fitted_to_events(BOUNDED)
    )


@pytest.mark.parametrize("length", [90, 32, 1])
def test_the_record_is_the_oracles_for_any_chunks(model: ModelSpec, length: int) -> None:
    rows, outputs = events(np.random.default_rng(11), model, 90)
    assert model.events is not None
    rows[55:, model.events.column_index["flow"]] += 9
    parameters = network_outputs(model).slices["odd.parameters"]
    oracle, expected, records = DetectionOracle(model), [], []
    for row, given in zip(rows, outputs, strict=True):
        expected.append(oracle.step(row, given[parameters]))
        records.append((oracle.since, oracle.peak, oracle.latest, *oracle.cause, oracle.excess))
    assert {each["alarm"] for each in expected} == {0, 1, 2, 3}
    labels = next(each.labels for each in output_spec(model).outputs if each.name == "odd.share")
    causes = {labels[int(record[3])] for record in records}
    assert len(causes) > 1
    assert "flow.level" in causes
    columns = detection_columns(model)
    parts = [columns[name] for name in ("alarm_events", "alarm_nats", "alarm_cause")]
    for end in range(15, 91, 15):
        cuts = [min(length, end - at) for at in range(0, end, length)]
        scored, state = run(model, rows[:end], outputs[:end], cuts, more=end % 2)
        for name in ("alarm", "severity", "since"):
            values = np.array([each[name] for each in expected[:end]])
            np.testing.assert_allclose(scored[f"odd.{name}"], values, rtol=1e-3, atol=1e-5)
        record = np.concatenate([*(state[part] for part in parts), [excess_of(model, state)]])
        np.testing.assert_allclose(record, records[end - 1], rtol=1e-3, atol=1e-4)


def excess_of(model: ModelSpec, state: FloatRows) -> float:
    """The excess alarms of a stream after the events of a state."""
    columns, detection = detection_columns(model), model.detection
    assert detection is not None
    assert detection.fit is not None
    if detection.alarm.backoff_nats is None:
        return 0.0
    since, excess = (float(state[columns[name]][0]) for name in BACKOFF)
    a_day = detection.alarm.false_alarms_per_day
    return max(excess - since * a_day / detection.fit.events_per_day, 0.0)


def test_excess_alarms_fall_at_the_specified_rate_for_any_number_of_events() -> None:
    model = fitted_to_events(BOUNDED)
    rows, outputs = events(np.random.default_rng(12), model, 40)
    quiet = np.tile(rows[:1], (32, 1))[np.newaxis], np.tile(outputs[:1], (32, 1))[np.newaxis]
    columns, state = detection_columns(model), detection_state(model).zero().floats[np.newaxis]
    since, excess = (columns[name].start for name in BACKOFF)
    state[:, [since, excess]] = MANY_EVENTS - 20, 1e5
    before = excess_of(model, state[0])
    _, after = Detector(model).step(quiet[0], np.array([32]), quiet[1], state)
    assert after[0, since] == 12
    assert before > excess_of(model, after[0]) > before - 3
    # they fall a tenth as fast for a chunk with a tenth of the rate
    state[:, columns["alarm_rate"]] = 0.5
    _, after = Detector(model).step(quiet[0], np.array([32]), quiet[1], state)
    assert after[0, excess] == pytest.approx(1e5 - 0.5 / 100 * MANY_EVENTS)


def test_a_state_gives_its_latest_alarm(model: ModelSpec) -> None:
    causes, parts = Causes(model), state_spec(model).slices
    floats = state_spec(model).zero().floats
    assert causes.of_state(floats) is None
    labels = next(each.labels for each in output_spec(model).outputs if each.name == "odd.share")
    floats[parts["odd.alarm"]] = -2
    floats[parts["odd.alarm_events"]] = 7
    floats[parts["odd.alarm_nats"]] = -2 * np.log(0.04), -np.log(0.3)
    floats[parts["odd.alarm_cause"]] = labels.index("heat.level"), -6.1
    alarm = causes.of_state(floats, "pump_3")
    assert alarm is not None
    assert (alarm.is_open, alarm.events) == (True, 7)
    assert alarm.severity == pytest.approx(2.0)
    assert alarm.probability == pytest.approx(0.3)
    assert alarm.cause[:2] == ("heat", "level")
    assert alarm.cause.words == "level of pump_3.heat 6.1 below its usual"
    # as in the outputs of a chunk that asks for a fifth of the rate, and so of the threshold
    assert model.detection is not None
    floats[parts["odd.alarm_rate"]] = model.detection.alarm.false_alarms_per_day / 5
    asked = causes.of_state(floats)
    assert asked is not None
    assert asked.severity == pytest.approx(2 * np.log(0.04) / np.log(0.04 / 5))
    floats[parts["odd.alarm"]] = 0
    closed = causes.of_state(floats)
    assert closed is not None
    assert not closed.is_open


@pytest.mark.parametrize("stored", [-3e38, -1.0, 0.5, 3e38])
def test_any_restored_state_has_a_record(model: ModelSpec, stored: float) -> None:
    rows, outputs = events(np.random.default_rng(12), model, 40)
    columns, state = detection_columns(model), detection_state(model).zero().floats[np.newaxis]
    for name in ("alarm", "alarm_events", "alarm_nats", "alarm_cause", *BACKOFF):
        if name in columns:
            state[:, columns[name]] = stored
    complete = state_spec(model).zero().floats
    complete[len(complete) - state.size :] = state[0]
    complete[state_spec(model).slices["odd.alarm_rate"]] = -abs(stored)
    assert stored <= 0 or Causes(model).of_state(complete) is not None
    scored, after = Detector(model).step(
        rows[np.newaxis], np.array([40]), outputs[np.newaxis], state
    )
    assert np.isfinite(scored).all()
    assert np.isfinite(after).all()


@pytest.mark.parametrize(
    ("label", "deviation", "residual", "words"),
    [
        ("flow.level", 6.1, 3.0, "level of flow 6.1 deviations above its usual"),
        ("flow.forecast", -4.0, -1234.5, "flow 1,234 below its forecast"),
        ("flow.forecast", -4.0, None, "flow 4 deviations below its forecast"),
        ("mode.forecast", 4.0, 3.0, "mode unlike its forecast"),
        ("heat.change", -6.1, 3.0, "heat 6.1 deviations below the value before"),
        ("heat.change", 0.4, 3.0, "heat unlike its usual changes"),
        ("heat.change", None, None, "heat unlike its usual changes"),
    ],
)
def test_outputs_of_an_event_give_its_cause(
    model: ModelSpec, label: str, deviation: float | None, residual: float | None, words: str
) -> None:
    labels = next(each.labels for each in output_spec(model).outputs if each.name == "odd.share")
    share = [0.9 if each == label else 0.1 for each in labels]
    deviations = None if deviation is None else [deviation] * len(labels)
    cause = Causes(model).of_event(share, deviations, None if residual is None else [residual] * 3)
    assert f"{cause.target}.{cause.kind}" == label
    assert cause.words == words


def test_older_alarms_have_no_record() -> None:
    spec = spec_of(["flow"])
    assert "alarm_nats" not in detection_columns(spec)
    assert Causes(spec).of_state(state_spec(spec).zero().floats) is None
    with pytest.raises(ValidationError, match="expected `close_above` or `hysteresis`, got both"):
        AlarmSpec(close_above=0.05, hysteresis=2.0)
    with pytest.raises(SpecError, match=r"expected `alarm.close_above` with \['since'\]"):
        spec_of(["flow"], outputs=["since"])
