"""Detection: every number against the oracle for any chunks, and what it makes of streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.detection.detector import Detector
from models.detection.fit import Stream, fit_detection
from models.detection.tails import Tails, fit_tail
from models.errors import DataError, SpecError
from models.spec.detection import CHANNEL_KINDS
from models.spec.layout import detection_columns, detection_state, network_outputs, output_spec
from models.spec.model import ModelSpec, parse_spec
from tests.support.oracle_detection import DetectionOracle

Floats = NDArray[np.float32]

FIELDS: list[dict[str, Any]] = [
    {"kind": "timestamp", "name": "at", "gap_mean": 1.0, "gap_std": 2.0},
    {"kind": "numeric", "name": "flow", "mean": 0.0, "std": 1.0},
    {
        "kind": "numeric",
        "name": "heat",
        "mean": 0.5,
        "std": 2.0,
        "optional": True,
        "transform": "signed_log1p",
    },
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
    spec: ModelSpec,
    rows: Floats,
    outputs: Floats,
    cuts: list[int],
    more: int = 0,
    rates: Floats | None = None,
) -> tuple[dict[str, Floats], Floats]:
    """One stream in chunks of these lengths, each padded by NaN and beside another stream; each
    asks for the rate at its first event."""
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
        if rates is not None:
            state[:, detection_state(spec).slices["odd.alarm_rate"]] = rates[at]
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
    season_events=7,
    alarm={"min_events": 2, "hold_events": 1, "hysteresis": 1.2},
    outputs=["z", "mean", "spread", "residual", "pit", "nats", "share", "deviation"],
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
    update = {"rates": (0.01, 0.05, 2.0), "thresholds": (0.02, 0.125, 0.3)}
    fit = spec.detection.fit.model_copy(update=update)
    return spec.model_copy(update={"detection": spec.detection.model_copy(update={"fit": fit})})


@pytest.mark.parametrize("cuts", [[60], [1] * 60, [7, 1, 20, 2, 30], [59, 1]])
def test_every_output_is_the_oracles_for_any_chunks(everything: ModelSpec, cuts: list[int]) -> None:
    rows, outputs = events(np.random.default_rng(11), everything, 60)
    found, _ = run(everything, rows, outputs, cuts, more=len(cuts) % 3)
    oracle = DetectionOracle(everything)
    expected = [
        oracle.step(row, given[PARAMETERS]) for row, given in zip(rows, outputs, strict=True)
    ]
    assert expected[0].keys() - {"probability", "alarm"} == set(everything.detection.outputs)  # type: ignore[union-attr]
    for name in expected[0]:
        values = np.array([each[name] for each in expected])
        np.testing.assert_allclose(found[f"odd.{name}"], values, rtol=2e-4, atol=1e-5)
    assert set(found["odd.alarm"].tolist()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(found["odd"], outputs[:, 0])
    np.testing.assert_array_equal(found["hidden"], outputs[:, PARAMETERS.stop :])


def test_attention_weights_follow_the_outputs() -> None:
    spec = spec_of(["flow"])
    fit = fit_detection(spec, streams_of(spec, 2, 300, seed=30))
    attention = {"kind": "attention", "name": "over", "over": "chunk", "units": 2}
    changed = spec.model_dump(mode="json", exclude={"training"})
    changed["layers"].append({**attention, "inputs": [changed["layers"][0]["name"]]})
    changed["max_chunk_steps"] = 50
    changed["detection"]["fit"] = fit.model_dump(mode="json")
    spec = parse_spec(changed)
    rows, outputs = events(np.random.default_rng(31), spec, 20)
    state = detection_state(spec).zero().floats[np.newaxis]
    found, _ = Detector(spec).step(rows[np.newaxis], np.array([20]), outputs[np.newaxis], state)
    weights = output_spec(spec).attention_by_name(found[0])["over"]
    np.testing.assert_array_equal(weights, outputs[:, -1])


def test_a_chunk_follows_its_own_rate_of_alarms(everything: ModelSpec) -> None:
    rows, outputs = events(np.random.default_rng(13), everything, 60)
    cuts = [7, 1, 20, 2, 30]
    rates = np.repeat(np.float32([0, 1.3, 0.02, 500, 0]), cuts)
    found, _ = run(everything, rows, outputs, cuts, rates=rates)
    oracle = DetectionOracle(everything)
    expected = [
        oracle.step(row, given[PARAMETERS], float(rate))["alarm"]
        for row, given, rate in zip(rows, outputs, rates, strict=True)
    ]
    assert found["odd.alarm"].tolist() == expected
    assert (
        found["odd.alarm"].tolist() != run(everything, rows, outputs, cuts)[0]["odd.alarm"].tolist()
    )


def test_probabilities_mean_the_same_on_streams_of_any_scale() -> None:
    spec = spec_of(["flow"], memory_events=300)
    spec = fitted(spec, streams_of(spec, 60, 1000, seed=1))
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
    spec = spec_of(["flow", "heat"], memory_events=300, outputs=["share"])
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


@pytest.fixture(scope="module")
def seasonal() -> ModelSpec:
    alarm = {"hold_events": 6, "close_above": 0.01, "backoff_nats": 1.0}
    spec = spec_of(["heat"], season_events=48, alarm=alarm)
    return fitted(spec, [day_and_night(spec, seed, 1500, missing=0.2) for seed in range(12)])


def day_and_night(spec: ModelSpec, seed: int, steps: int, missing: float = 0.0) -> Stream:
    """A stream with a season of 48 events, which its forecast does not know."""
    assert spec.events is not None
    random, rows = np.random.default_rng(seed), np.zeros((steps, spec.input_features), np.float32)
    values = 3 * np.sin(np.arange(steps) * 2 * np.pi / 48) + random.normal(0, 0.3, steps)
    there = random.random(steps) >= missing
    rows[:, spec.events.column_index["heat"]] = values * there
    rows[:, spec.events.column_index["heat.missing"]] = ~there
    counted = np.arange(steps) >= 500
    return Stream(rows, np.zeros((steps, 2), np.float32), counted, counted.sum() / 48)


def followed(spec: ModelSpec, rows: Floats) -> Floats:
    """The alarm at each event."""
    outputs = np.zeros((len(rows), network_outputs(spec).size), np.float32)
    cuts = [100] * (len(rows) // 100) + [len(rows) % 100] * (len(rows) % 100 > 0)
    found, state = run(spec, rows, outputs, cuts)
    assert all(np.isfinite(values).all() for values in (*found.values(), state))
    return found["odd.alarm"]


def alarms(spec: ModelSpec, rows: Floats) -> list[int]:
    """The events that open an alarm."""
    return np.flatnonzero(followed(spec, rows) == 1).tolist()


def is_alarmed(spec: ModelSpec, rows: Floats, since: int) -> bool:
    """Whether an alarm is open at one of the events from `since` on."""
    return bool((followed(spec, rows)[since:] > 0).any())


@pytest.mark.parametrize("kind", ["spike", "burst", "other season", "gap"])
def test_an_anomaly_is_not_unusual_again_one_season_later(seasonal: ModelSpec, kind: str) -> None:
    found: list[int] = []
    assert seasonal.events is not None
    where = seasonal.events.column_index
    for seed in range(20, 30):
        rows = day_and_night(seasonal, seed, 1400).rows
        match kind:
            case "spike":
                rows[1200, where["heat"]] += 9
            case "burst":
                rows[1200:1220, where["heat"]] *= 3
            case "other season":
                rows[1200:1230, where["heat"]] *= -1
            case "gap":
                rows[1200:1230, where["heat"]] = 0
                rows[1200:1230, where["heat.missing"]] = 1
        found += alarms(seasonal, rows)
        assert kind == "gap" or is_alarmed(seasonal, rows[:1230], 1200)
    # of 10 days without an anomaly; 0.5 are expected
    assert sum(1246 <= at < 1294 for at in found) <= 2


@pytest.mark.parametrize("height", [3, 0])
def test_a_value_is_compared_with_what_was_closer_before(height: int) -> None:
    """With the usual one at its phase, or in a stream without a season with its mean."""
    spec = spec_of(["flow"], season_events=48, alarm={"close_above": 0.01, "backoff_nats": 1.0})
    spec = fitted(spec, streams_of(spec, 10, 1000, seed=17))
    assert spec.events is not None
    season = height * np.sin(np.arange(1235) * 2 * np.pi / 48)
    rows = np.zeros((len(season), spec.input_features), np.float32)
    outputs = np.zeros((len(rows), network_outputs(spec).size), np.float32)
    for seed in range(70, 80):
        flow = season + np.random.default_rng(seed).normal(0, 0.3, len(rows))
        flow[-1] = 20
        rows[:, spec.events.column_index["flow"]] = flow
        _, state = run(spec, rows, outputs, [100] * 12 + [35])
        channel, excess = state[detection_columns(spec)["alarm_cause"]]
        assert channel == CHANNEL_KINDS.index("level")
        assert excess == pytest.approx(20 - season[-1], abs=1.0 if height else 0.05)


def test_the_season_follows_a_lasting_level() -> None:
    """Also with a memory as short as the season, in which the mean is closer for a while."""
    alarm = {"hold_events": 6, "close_above": 0.01}
    spec = spec_of(["flow"], season_events=48, memory_events=48, alarm=alarm)
    spec = fitted(spec, streams_of(spec, 10, 1000, seed=17))
    assert spec.events is not None
    season = 3 * np.sin(np.arange(1235) * 2 * np.pi / 48)
    rows = np.zeros((len(season), spec.input_features), np.float32)
    outputs = np.zeros((len(rows), network_outputs(spec).size), np.float32)
    flow = season + np.random.default_rng(71).normal(0, 0.3, len(rows))
    flow[240:] += 1000
    flow[-1] = 1200
    rows[:, spec.events.column_index["flow"]] = flow
    _, state = run(spec, rows, outputs, [100] * 12 + [35])
    channel, excess = state[detection_columns(spec)["alarm_cause"]]
    assert channel == CHANNEL_KINDS.index("level")
    assert excess == pytest.approx(200 - season[-1], abs=1.0)


def test_a_restored_number_of_events_hides_no_stuck_value() -> None:
    spec = spec_of(["flow"], alarm={"hold_events": 6, "close_above": 0.01})
    spec = fitted(spec, streams_of(spec, 10, 1000, seed=18))
    assert spec.events is not None
    rows = streams_of(spec, 1, 1200, seed=19)[0].rows
    rows[1100:] = rows[1100]
    outputs = np.zeros((1, len(rows), network_outputs(spec).size), np.float32)
    state = detection_state(spec).initial().floats[np.newaxis]
    state[:, detection_columns(spec)["events"]] = -3e38
    scored, _ = Detector(spec).step(rows[np.newaxis], np.array([1200]), outputs, state)
    assert output_spec(spec).by_name(scored[0])["odd.alarm"][1100:].any()


def test_a_lasting_level_becomes_usual() -> None:
    """One alarm, which closes within a few times the memory."""
    spec = spec_of(["flow"], memory_events=150, alarm={"hold_events": 20})
    spec = fitted(spec, streams_of(spec, 10, 1000, seed=14))
    assert spec.events is not None
    for stream in streams_of(spec, 5, 1600, seed=15):
        rows = stream.rows.copy()
        rows[800:, spec.events.column_index["flow"]] += 8
        outputs = np.zeros((len(rows), network_outputs(spec).size), np.float32)
        found, _ = run(spec, rows, outputs, [800] * 2)
        opened = np.flatnonzero(found["odd.alarm"][800:] == 1)
        assert opened[0] == 0
        assert len(opened) <= 2
        assert not found["odd.alarm"][1300:].any()


def test_a_stream_that_is_nearly_constant_has_few_alarms(seasonal: ModelSpec) -> None:
    """Its own past becomes usual: noise far below that of others, and a digit more now and then.
    In 31 days 1.5 are expected; the bound allows more at first."""
    assert seasonal.events is not None
    rows = np.zeros((1500, seasonal.input_features), np.float32)
    level, random = seasonal.events.column_index["heat"], np.random.default_rng(16)
    rows[:, level] = np.round(random.normal(1, 2e-4, 1500), 3)
    assert len(alarms(seasonal, rows)) <= 9


def test_missing_values_do_not_change_the_false_alarms(seasonal: ModelSpec) -> None:
    opened = 0
    for seed in range(40, 50):
        opened += len(alarms(seasonal, day_and_night(seasonal, seed, 1500, missing=0.5).rows))
    # in 10 x 31 days at 0.05 a day 16 are expected
    assert opened <= 24


def test_no_value_makes_the_state_infinite(seasonal: ModelSpec) -> None:
    assert seasonal.events is not None
    rows = day_and_night(seasonal, 50, 300).rows
    rows[100:110, seasonal.events.column_index["heat"]] = np.float32(3e38)
    assert 100 in alarms(seasonal, rows)


def test_a_new_stream_starts_without_alarms(seasonal: ModelSpec) -> None:
    """Its deviations are small until it has a past; its tails are those of fitted streams."""
    early = 0
    for seed in range(60, 80):
        rows = day_and_night(seasonal, seed, 100).rows
        early += len(alarms(seasonal, rows + np.float32(5)))
    assert early <= 2


def test_only_named_outputs_are_computed() -> None:
    spec = spec_of(["flow", "mode", "heat"], outputs=["nats", "mean"])
    assert [(each.name, each.labels) for each in output_spec(spec).outputs] == [
        ("odd", ()),
        ("hidden", ()),
        ("odd.probability", ()),
        ("odd.alarm", ()),
        ("odd.nats", ("flow", "mode", "heat")),
        ("odd.mean", ("flow", "heat")),
    ]
    with pytest.raises(
        SpecError, match=r"detection\.outputs: .*'mean'.* numeric or boolean target"
    ):
        spec_of(["mode"], outputs=["mean"])


def test_the_change_of_a_constant_stream_is_unusual_but_finite() -> None:
    spec = spec_of(["flow"], memory_events=100, outputs=["deviation"])
    spec = fitted(spec, streams_of(spec, 10, 300, seed=7))
    rows = np.zeros((900, len(spec.events.column_index)), np.float32)  # type: ignore[union-attr]
    rows[800:, spec.events.column_index["flow"]] = 1.0  # type: ignore[union-attr]
    found, state = run(
        spec, rows, np.zeros((900, network_outputs(spec).size), np.float32), [300] * 3
    )
    assert all(np.isfinite(values).all() for values in (*found.values(), state))
    assert found["odd.probability"][800] < 1e-3
    assert np.abs(found["odd.deviation"]).max() <= 20


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
    whole = fitted(spec, streams_of(spec, 2, 300, seed=1))
    assert whole.detection is not None
    assert whole.detection.fit is not None
    # of an earlier version, where a season was a channel of its own
    earlier = whole.detection.fit.model_copy(update={"tails": whole.detection.fit.tails[:1] * 8})
    changed = whole.detection.model_copy(update={"fit": earlier})
    with pytest.raises(SpecError, match="expected a fit with 6 tails of `detection`, got 8"):
        Detector(whole.model_copy(update={"detection": changed}))
    with pytest.raises(DataError, match="at least 200 events"):
        fit_detection(spec, streams_of(spec, 1, 100, seed=1))
    with pytest.raises(SpecError, match="expected an anomaly head among"):
        spec_of(["flow"], head="hidden")
    with pytest.raises(SpecError, match="expected distinct values"):
        spec_of(["flow"], outputs=["z", "z"])
    without_numbers = r"detection\.season_events: expected a numeric target, got \['mode', 'open'\]"
    with pytest.raises(SpecError, match=without_numbers):
        spec_of(["mode", "open"], season_events=7)
    with pytest.raises(
        SpecError, match=r"got \['scales', 'tail_memory_events'\] of an earlier one"
    ):
        spec_of(["flow"], scales=[3], tail_memory_events=100)
