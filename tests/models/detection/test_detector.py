"""Detection: every number against the oracle for any chunks, and what it makes of streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.detection.alarms import AlarmState, count_alarms, follow_alarm
from models.detection.detector import Detector
from models.detection.fit import Stream, alarm_threshold, fit_detection
from models.detection.tails import Tails, fit_tail
from models.errors import DataError, SpecError
from models.spec.detection import AlarmSpec
from models.spec.layout import detection_state, network_outputs, output_spec
from models.spec.model import ModelSpec, parse_spec
from tests.support.oracle_detection import DetectionOracle

Floats = NDArray[np.float32]

FIELDS: list[dict[str, Any]] = [
    {"kind": "timestamp", "name": "at", "gap_mean": 1.0, "gap_std": 2.0},
    {"kind": "numeric", "name": "flow", "mean": 0.0, "std": 1.0},
    {"kind": "numeric", "name": "heat", "mean": 0.0, "std": 1.0, "optional": True},
    {"kind": "categorical", "name": "mode", "vocabulary": ["a", "b"], "embedding": 2},
    {"kind": "boolean", "name": "open", "optional": True},
]


def spec_of(targets: list[str], **detection: Any) -> ModelSpec:
    return parse_spec(
        {
            "name": "pump",
            "events": {"fields": FIELDS},
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [
                {"kind": "anomaly", "name": "odd", "targets": targets},
                {"kind": "sequence", "name": "hidden"},
            ],
            "detection": {"head": "odd", **detection},
        }
    )


def events(random: np.random.Generator, spec: ModelSpec, steps: int) -> tuple[Floats, Floats]:
    """Random rows, a third of the optional values missing, and what the network puts out."""
    assert spec.events is not None
    where = spec.events.column_index
    rows = np.zeros((steps, len(where)), np.float32)
    for name in ("flow", "heat"):
        rows[:, where[name]] = random.normal(1, 2, steps)
    rows[:, where["mode"]] = random.integers(0, 2, steps)
    rows[:, where["open"]] = random.integers(0, 2, steps)
    for name in ("heat", "open"):
        missing = random.random(steps) < 0.3
        rows[missing, where[name]] = 0
        rows[:, where[f"{name}.missing"]] = missing
    size = network_outputs(spec).size
    return rows, random.normal(0, 0.7, (steps, size)).astype(np.float32)


def streams_of(spec: ModelSpec, count: int, steps: int, seed: int) -> list[Stream]:
    """Streams of normal noise, whose forecast is right; their beginnings are not counted."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        rows, _ = events(random, spec, steps)
        parameters = np.zeros((steps, 2), np.float32)
        rows[:, spec.events.column_index["flow"]] = random.normal(0, 1, steps)  # type: ignore[union-attr]
        counted = np.arange(steps) >= min(400, steps // 3)
        found.append(Stream(rows, parameters, counted, counted.sum() / 100))
    return found


def fitted(spec: ModelSpec, streams: list[Stream]) -> ModelSpec:
    assert spec.detection is not None
    fit = fit_detection(spec, streams)
    return spec.model_copy(update={"detection": spec.detection.model_copy(update={"fit": fit})})


def run(
    spec: ModelSpec, rows: Floats, outputs: Floats, cuts: list[int], more: int = 0
) -> tuple[dict[str, Floats], Floats]:
    """One stream in chunks of these lengths, each padded by NaN and beside another stream."""
    detector, state = Detector(spec), detection_state(spec).initial().floats[np.newaxis]
    parts, at = [], 0
    for length in cuts:
        padded = np.full((2, length + more, rows.shape[1]), np.nan, np.float32)
        computed = np.full((2, length + more, outputs.shape[1]), 1e30, np.float32)
        padded[0, :length], computed[0, :length] = (
            rows[at : at + length],
            outputs[at : at + length],
        )
        padded[1, 0], computed[1, 0] = rows[0], outputs[0]
        found, after = detector.step(
            padded, np.array([length, 1]), computed, np.concatenate([state, state])
        )
        parts.append(found[0, :length])
        state = after[:1]
        at += length
    assert at == len(rows)
    return output_spec(spec).by_name(np.concatenate(parts)), state[0]


EVERYTHING = spec_of(
    ["flow", "mode", "heat", "open"],
    memory_events=30,
    prior_events=5,
    scales=[3, 8],
    season_events=7,
    alarm={"min_events": 2, "hold_events": 1, "hysteresis": 1.2},
)


PARAMETERS = network_outputs(EVERYTHING).slices["odd.parameters"]


@pytest.fixture(scope="module")
def everything() -> ModelSpec:
    random = np.random.default_rng(5)
    streams = []
    for _ in range(6):
        rows, outputs = events(random, EVERYTHING, 200)
        streams.append(Stream(rows, outputs[:, PARAMETERS], np.ones(200, np.bool_), 2.0))
    spec = fitted(EVERYTHING, streams)
    assert spec.detection is not None
    assert spec.detection.fit is not None
    # often, so that alarms open and close
    fit = spec.detection.fit.model_copy(update={"threshold": 0.2})
    return spec.model_copy(update={"detection": spec.detection.model_copy(update={"fit": fit})})


@pytest.mark.parametrize("cuts", [[60], [1] * 60, [7, 1, 20, 2, 30], [59, 1]])
def test_every_output_is_the_oracles_for_any_chunks(everything: ModelSpec, cuts: list[int]) -> None:
    rows, outputs = events(np.random.default_rng(11), everything, 60)
    found, _ = run(everything, rows, outputs, cuts, more=len(cuts) % 3)
    oracle = DetectionOracle(everything)
    expected = [
        oracle.step(row, given[PARAMETERS]) for row, given in zip(rows, outputs, strict=True)
    ]
    for name in ("probability", "alarm", "deviation", "share"):
        values = np.array([each[name] for each in expected])
        np.testing.assert_allclose(found[f"odd.{name}"], values, rtol=2e-4, atol=1e-5)
    assert set(found["odd.alarm"].tolist()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(found["odd"], outputs[:, 0])
    np.testing.assert_array_equal(found["hidden"], outputs[:, PARAMETERS.stop :])


def test_streams_of_a_batch_are_scored_independently(everything: ModelSpec) -> None:
    rows, outputs = events(np.random.default_rng(12), everything, 40)
    whole, state = run(everything, rows, outputs, [40])
    parts, again = run(everything, rows, outputs, [13, 27], more=5)
    np.testing.assert_allclose(whole["odd.probability"], parts["odd.probability"], rtol=1e-4)
    np.testing.assert_allclose(state, again, rtol=1e-5, atol=1e-5)


def test_probabilities_mean_the_same_on_streams_of_any_scale() -> None:
    spec = spec_of(["flow"], memory_events=300)
    spec = fitted(spec, streams_of(spec, 20, 1000, seed=1))
    shares = []
    for scale in (0.2, 1.0, 5.0):
        rare = early = 0
        for stream in streams_of(spec, 20, 2000, seed=2):
            rows = stream.rows * np.float32(scale) + np.float32(3 * scale)
            outputs = np.zeros((len(rows), network_outputs(spec).size), np.float32)
            found, _ = run(spec, rows, outputs, [250] * 8)
            rare += int((found["odd.probability"][1000:] < 0.01).sum())
            early += int((found["odd.probability"][:20] < 0.001).any())
        shares.append(rare / 20_000)
        # a new stream's own level is not unusual
        assert early <= (2 if scale <= 1 else 20)
    assert all(0.006 < share < 0.015 for share in shares), shares


def test_false_alarm_rate_on_other_streams_is_as_specified() -> None:
    alarm = {"false_alarms_per_day": 0.5, "hold_events": 10}
    spec = spec_of(["flow"], memory_events=300, alarm=alarm)
    spec = fitted(spec, streams_of(spec, 40, 1000, seed=3))
    opened = 0
    for stream in streams_of(spec, 40, 1000, seed=4):
        outputs = np.zeros((1000, network_outputs(spec).size), np.float32)
        found, _ = run(spec, stream.rows, outputs, [250] * 4)
        opened += int((found["odd.alarm"][333:] == 1).sum())
    # in 267 days 133 are expected; their standard deviation is 12 if they are independent
    assert 133 / 1.5 < opened < 133 * 1.5


@pytest.mark.parametrize("kind", ["spike", "shift", "burst", "stuck"])
def test_an_anomaly_opens_one_alarm_that_names_its_channel(kind: str) -> None:
    spec = spec_of(["flow", "heat"], memory_events=300)
    random = np.random.default_rng(6)
    streams = []
    for _ in range(20):
        rows, _ = events(random, spec, 1000)
        streams.append(Stream(rows, np.zeros((1000, 4), np.float32), np.ones(1000, np.bool_), 10.0))
    spec = fitted(spec, streams)
    assert spec.events is not None
    flow = spec.events.column_index["flow"]
    rows, _ = events(random, spec, 1000)
    match kind:
        case "spike":
            rows[900, flow] += 20
        case "shift":
            rows[900:930, flow] += 9
        case "burst":
            rows[900:930, flow] *= 6
        case "stuck":
            rows[900:960, flow] = rows[899, flow]
    outputs = np.zeros((1000, network_outputs(spec).size), np.float32)
    found, _ = run(spec, rows, outputs, [250] * 4)
    opened = np.flatnonzero(found["odd.alarm"] == 1)
    near = opened[(opened >= 900) & (opened < 960)]
    assert len(near) == 1
    labels = next(o.labels for o in output_spec(spec).outputs if o.name == "odd.share")
    assert labels[int(found["odd.share"][near[0]].argmax())].startswith("flow.")


def test_the_change_of_a_constant_stream_is_unusual_but_finite() -> None:
    spec = spec_of(["flow"], memory_events=100)
    spec = fitted(spec, streams_of(spec, 10, 300, seed=7))
    rows = np.zeros((900, len(spec.events.column_index)), np.float32)  # type: ignore[union-attr]
    rows[800:, spec.events.column_index["flow"]] = 1.0  # type: ignore[union-attr]
    found, state = run(spec, rows, np.zeros((900, 1 + 2 + 2), np.float32), [300] * 3)
    assert all(np.isfinite(values).all() for values in (*found.values(), state))
    assert found["odd.probability"][800] < 1e-3
    assert np.abs(found["odd.deviation"]).max() <= 30


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
        state, found = AlarmState(np.zeros(3)), []
        for part in (probability[:cut], probability[cut:]):
            found += follow_alarm(alarm, np.array(part), 0.01, state).tolist()
            state = AlarmState(np.array(state.values()))
        assert found == codes


def test_an_alarm_needs_its_minimum_of_events() -> None:
    alarm = AlarmSpec(min_events=2, hold_events=1, hysteresis=1.0)
    probability = np.array([0.001, 0.5, 0.001, 0.001, 0.5])
    found = follow_alarm(alarm, probability, 0.01, AlarmState(np.zeros(3)))
    assert found.tolist() == [0, 0, 0, 1, 3]


@pytest.mark.parametrize("shape", [0.0, 0.3])
def test_a_fitted_tail_extends_beyond_its_data(shape: float) -> None:
    random = np.random.default_rng(8)
    uniform = random.random(20_000)
    values = (uniform**-shape - 1) / shape if shape else -np.log(uniform)
    tails = Tails([fit_tail(values, 0.05)])
    for probability in (1e-2, 1e-4, 1e-6):
        value = (probability**-shape - 1) / shape if shape else -np.log(probability)
        nats = tails.nats(np.array([[value]]))[0, 0]
        assert nats == pytest.approx(-np.log(probability), rel=0.12)


def test_errors_name_what_is_missing() -> None:
    spec = spec_of(["flow"])
    with pytest.raises(SpecError, match="expected a fitted `detection`"):
        Detector(spec)
    with pytest.raises(DataError, match="at least 200 events"):
        fit_detection(spec, streams_of(spec, 1, 100, seed=1))
    with pytest.raises(SpecError, match="expected an anomaly head among"):
        spec_of(["flow"], head="hidden")
    with pytest.raises(SpecError, match="expected distinct values"):
        spec_of(["flow"], scales=[3, 3])


def test_threshold_never_keeps_alarms_open_permanently() -> None:
    alarm = AlarmSpec(hold_events=50)
    random = np.random.default_rng(9)
    # bursts: larger thresholds make fewer and longer alarms
    streams = [np.repeat(random.random(200), 20) for _ in range(5)]
    threshold = alarm_threshold(alarm, streams, expected=40)
    opened, events = count_alarms(alarm, streams, threshold)
    assert 20 <= opened <= 40
    assert events <= 3 * 40 * 51
