"""What streams remember: the numbers of the oracle for any chunks, and the shares of events."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from models.detection.detector import Detector
from models.detection.fit import Stream, fit_detection
from models.detection.kernel import BLOCK, FloatRows, Kernel
from models.detection.tails import Tails
from models.spec.detection import ALARM_RATE, DetectionFit, DetectionSpec, Tail
from models.spec.layout import detection_columns, detection_state, network_outputs, output_spec
from models.spec.model import ModelSpec
from tests.models.detection.test_detector import events, run, spec_of
from tests.support.detection import sensor_model
from tests.support.oracle_detection import DetectionOracle

MEMORY = 100
NUMBERS = (-3.4e38, -200.0, -20.0, 0.5, 1e30, 3.4e38)
EVERY_TARGET = spec_of(
    ["flow", "mode", "heat", "open"],
    memory_events=MEMORY,
    prior_events=5,
    outputs=["nats", "share"],
)
OPTIONAL_TARGETS = spec_of(
    ["heat", "open"], prior_events=5, memory_events=MEMORY, outputs=["nats", "share"]
)
NO_NUMERIC_TARGET = spec_of(
    ["mode", "open"], prior_events=5, memory_events=MEMORY, outputs=["nats", "share"]
)
ONE_TARGET = spec_of(["flow"])


def normalised(targets: list[str], memory: int, **alarm: float) -> ModelSpec:
    """A model with a running normalisation of `flow`."""
    spec = spec_of(
        targets,
        prior_events=5,
        memory_events=memory,
        alarm=alarm,
        outputs=["nats", "share"],
    )
    assert spec.events is not None
    flow = spec.events.field("flow").model_copy(update={"normalisation": {"std": 1.0}})
    fields = [flow if each.name == "flow" else each for each in spec.events.fields]
    return spec.model_copy(update={"events": spec.events.model_copy(update={"fields": fields})})


def fitted_to(spec: ModelSpec, streams: list[Stream]) -> ModelSpec:
    assert spec.detection is not None
    detection = {**spec.detection.model_dump(), "fit": fit_detection(spec, streams).model_dump()}
    return spec.model_copy(update={"detection": DetectionSpec.model_validate(detection)})


def events_with_values(
    random: np.random.Generator, spec: ModelSpec, steps: int, offset: float = 5.0
) -> tuple[FloatRows, FloatRows]:
    """Events whose values of `flow` as they come, if the model sees them, are not the encoded
    ones."""
    rows, outputs = events(random, spec, steps)
    assert spec.events is not None
    column = spec.events.column_index.get("flow.value")
    if column is not None:
        rows[:, column] = offset + 0.01 * random.standard_t(3, steps)
    return rows, outputs


def parameters_of(spec: ModelSpec) -> slice:
    return network_outputs(spec).slices["odd.parameters"]


def fitted_to_events(spec: ModelSpec) -> ModelSpec:
    random = np.random.default_rng(5)
    streams = []
    for _ in range(6):
        rows, outputs = events_with_values(random, spec, 200)
        streams.append(Stream(rows, outputs[:, parameters_of(spec)], np.ones(200, np.bool_), 2.0))
    return fitted_to(spec, streams)


@pytest.fixture(scope="module")
def every_target() -> ModelSpec:
    return fitted_to_events(EVERY_TARGET)


@pytest.fixture(scope="module")
def optional_targets() -> ModelSpec:
    """Some events have none of the targets."""
    return fitted_to_events(OPTIONAL_TARGETS)


@pytest.fixture(scope="module")
def as_they_come() -> ModelSpec:
    return fitted_to_events(normalised(["mode", "flow", "heat"], MEMORY))


def check_against_oracle(
    spec: ModelSpec, cuts: list[int], runs: tuple[tuple[int, int], ...] = ()
) -> None:
    """Of random events, in some of which `flow` stays the same: the first and the last one."""
    rows, outputs = events_with_values(np.random.default_rng(11), spec, 150)
    assert spec.events is not None
    for start, stop in runs:
        rows[start:stop, spec.events.column_index["flow"]] = start
    scored, _ = run(spec, rows, outputs, cuts, more=len(cuts) % 3)
    oracle, parameters = DetectionOracle(spec), parameters_of(spec)
    expected = [
        oracle.step(row, given[parameters]) for row, given in zip(rows, outputs, strict=True)
    ]
    for name in ("probability", "share", "nats"):
        values = np.array([each[name] for each in expected])
        np.testing.assert_allclose(scored[f"odd.{name}"], values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cuts", [[150], [1] * 150, [31, 1, 32, 33, 53], [5, 70, 75]])
def test_outputs_are_the_oracles_for_any_chunks(every_target: ModelSpec, cuts: list[int]) -> None:
    check_against_oracle(every_target, cuts)


@pytest.mark.parametrize("cuts", [[150], [1] * 150, [31, 1, 32, 33, 53]])
def test_values_as_they_come_are_the_oracles_for_any_chunks(
    as_they_come: ModelSpec, cuts: list[int]
) -> None:
    check_against_oracle(as_they_come, cuts)


def test_levels_of_a_large_offset_are_the_same_for_any_chunks(as_they_come: ModelSpec) -> None:
    """Deviations a hundred thousand times smaller than the values themselves."""
    rows, outputs = events_with_values(np.random.default_rng(13), as_they_come, 600, offset=1000.0)
    whole, _ = run(as_they_come, rows, outputs, [600])
    single, _ = run(as_they_come, rows, outputs, [1] * 600)
    probability = whole["odd.probability"]
    np.testing.assert_array_equal(single["odd.probability"], probability)
    assert float(np.min(probability)) < 0.01


def test_levels_see_beyond_the_limit_of_encoded_values() -> None:
    """Streams with units of their own, in which one value is far from all others. Its encoded
    value is the limit of `normalisation`, as many others are."""
    random = np.random.default_rng(14)
    spec = normalised(["flow"], 10_000)
    assert spec.events is not None
    where, streams = spec.events.column_index, []
    for number in range(12):
        rows = np.zeros((2000, len(where)), np.float32)
        noise = random.standard_t(2, 2000)
        rows[:, where["flow"]] = np.clip(3 * noise, -10, 10)
        rows[:, where["flow.value"]] = 10.0 ** (number % 5 - 4) * noise
        streams.append(Stream(rows, np.zeros((2000, 2), np.float32), np.arange(2000) >= 500, 15.0))
    spec = fitted_to(spec, streams)
    for stream in streams:
        rows = stream.rows.copy()
        rows[1990, where["flow"]] = 10.0
        outputs, found = np.zeros((len(rows), network_outputs(spec).size), np.float32), []
        for far in (0.3, 3):
            rows[1990, where["flow.value"]] = (
                far * np.abs(stream.rows[:, where["flow.value"]]).max()
            )
            scored, _ = run(spec, rows, outputs, [500] * 4)
            found.append(scored["odd.probability"][1990])
        assert found[1] < 0.2 * found[0], found


def test_an_outlier_does_not_hide_what_follows_it() -> None:
    """Fewer usual events are as unusual as noise of several deviations, although one value before
    was thousands of deviations away."""
    spec = fitted_to_events(normalised(["flow"], 10_000))
    assert spec.events is not None
    rows, outputs = events_with_values(np.random.default_rng(17), spec, 1500)
    values = rows[:, spec.events.column_index["flow.value"]]
    values[300] += 30.0
    values[1400:1440:2] += 0.15
    probability = run(spec, rows, outputs, [500] * 3)[0]["odd.probability"]
    anomalous = np.median(probability[1410:1440])
    assert (probability[900:1400] <= anomalous).mean() < 0.1, anomalous


def test_the_cause_of_an_alarm_has_the_unit_of_a_raw_level() -> None:
    spec = fitted_to_events(normalised(["flow"], 10_000, close_above=0.05, false_alarms_per_day=5))
    rows, outputs = events_with_values(np.random.default_rng(16), spec, 400)
    assert spec.events is not None
    values = rows[:, spec.events.column_index["flow.value"]]
    values[399] = 5.3
    scored, state = run(spec, rows, outputs, [400])
    assert scored["odd.alarm"][399] > 0
    channel, excess = state[detection_columns(spec)["alarm_cause"]]
    assert channel == 1
    assert excess == pytest.approx(0.3, rel=0.01)


def test_the_cause_of_an_alarm_has_the_unit_of_a_forecast() -> None:
    spec = fitted_to_events(normalised(["flow"], 10_000, close_above=0.05, false_alarms_per_day=5))
    rows, outputs = events_with_values(np.random.default_rng(16), spec, 400)
    assert spec.events is not None
    where = spec.events.column_index
    rows[:, [where["flow.mean"], where["flow.std"]]] = 3.0, 2.0
    # of the stream's deviations: 50 x 2 + 3 in the field's unit, where the value is 5
    outputs[399, parameters_of(spec)] = 50.0, 0.0
    scored, state = run(spec, rows, outputs, [400])
    assert scored["odd.alarm"][399] == 1
    channel, excess = state[detection_columns(spec)["alarm_cause"]]
    assert channel == 0
    assert excess == pytest.approx(5.0 - 103.0, rel=0.01)


def test_a_constant_stream_has_no_level(as_they_come: ModelSpec) -> None:
    rows, outputs = events_with_values(np.random.default_rng(15), as_they_come, 300)
    assert as_they_come.events is not None
    rows[:, as_they_come.events.column_index["flow.value"]] = np.float32(1e6 / 3)
    shares = []
    for cuts in ([300], [1] * 300):
        scored, state = run(as_they_come, rows, outputs, cuts)
        # those of the three forecasts come first
        peak = state[detection_columns(as_they_come)["peak"]]
        assert peak[3] < 1e-3, peak
        shares.append(scored["odd.share"])
    np.testing.assert_array_equal(shares[0], shares[1])


@pytest.mark.parametrize("cuts", [[150], [1] * 150, [30, 35, 32, 53]])
def test_runs_of_equal_values_are_the_oracles_for_any_chunks(
    every_target: ModelSpec, cuts: list[int]
) -> None:
    check_against_oracle(every_target, cuts, runs=((10, 30), (40, 58), (70, 90), (100, 140)))


def test_a_model_without_a_numeric_target_has_one_tail() -> None:
    check_against_oracle(fitted_to_events(NO_NUMERIC_TARGET), [40, 110])


def test_a_new_stream_has_the_pooled_tail_between_levels_far_apart() -> None:
    spec = ONE_TARGET.model_dump()
    spec["detection"] |= {"tail_levels": [0, 39.5, 42], "outputs": ["nats", "share"]}
    check_against_oracle(fitted_to_events(ModelSpec.model_validate(spec)), [150])


def test_a_category_that_is_no_number_gives_a_probability() -> None:
    spec = fitted_to_events(spec_of(["mode", "open"]))
    rows, outputs = events(np.random.default_rng(3), spec, 9)
    assert spec.events is not None
    rows[4, spec.events.column_index["mode"]] = np.nan
    scored, _ = run(spec, rows, outputs, [9])
    assert ((scored["odd.probability"] > 0) & (scored["odd.probability"] <= 1)).all()


def test_events_without_any_target_count_in_no_tail(optional_targets: ModelSpec) -> None:
    check_against_oracle(optional_targets, [40, 110])


@pytest.mark.parametrize("season", [None, 7, 40])
def test_outputs_and_states_are_bit_identical_for_any_chunks(season: int | None) -> None:
    """Alone or beside another stream, padded or not, whatever has happened."""
    alarm = {"close_above": 0.1, "backoff_nats": 0.3, "false_alarms_per_day": 5.0, "hold_events": 2}
    names = ["share", "deviation", "severity", "since", "nats", "pit"]
    options = {"memory_events": MEMORY, "season_events": season, "outputs": names}
    spec = fitted_to_events(spec_of(["flow", "mode", "heat", "open"], alarm=alarm, **options))
    rows, outputs = events_with_values(np.random.default_rng(18), spec, 700)
    assert spec.events is not None
    flow = rows[:, spec.events.column_index["flow"]]
    flow[200:230], flow[400], flow[500:] = flow[200], 1e6, flow[500:] + 9
    whole, state = run(spec, rows, outputs, [700])
    assert set(whole["odd.alarm"].tolist()) == {0, 1, 2, 3}
    for cuts in ([1] * 700, [BLOCK] * 21 + [28], [BLOCK - 1] * 22 + [18], [30, 3, 32, 75] * 5):
        again, after = run(spec, rows, outputs, cuts, more=len(cuts) % 3)
        np.testing.assert_array_equal(after, state)
        for name, values in whole.items():
            np.testing.assert_array_equal(again[name], values, err_msg=name)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_probabilities_become_the_streams_own(scale: float) -> None:
    """Of a stream whose quantity is larger or smaller than those of others. Where it is smaller,
    the pooled tail is forgotten slowly, and probabilities are too large, not too small."""
    spec, random = spec_of(["open"]), np.random.default_rng(3)
    assert spec.events is not None
    # the quantity is exponential, with the mean 24^(-1/4)
    linear = Tail(threshold=0.1, exceeded=np.exp(-0.1), scale=1.0, shape=0.0)
    slope = scale * 24**0.25
    tail = linear.model_copy(update={"threshold": 0.1 / slope, "scale": 1 / slope})
    spec = with_tails(spec, tail, linear)
    rows, outputs = random_forecasts(random, spec, 20_000)
    column = spec.events.column_index["open.missing"]
    late = np.flatnonzero(rows[:, column] == 0)[9000:]
    probability = run(spec, rows, all_outputs(spec, outputs), [25] * 800)[0]["odd.probability"]
    share = (probability[late] <= 0.01).mean()
    assert (0.002 if scale < 1 else 0.006) < share < 0.016
    state = detection_state(spec).zero().floats[np.newaxis]
    kernel = Kernel(spec)
    found = kernel.zeros(1, 20_000)
    kernel.follow(rows[np.newaxis], [20_000], outputs[np.newaxis], 0, state, kept=found)
    nats = Tails([tail]).nats(found.quantities[..., 0])[0]
    pooled = (nats[late] >= -np.log(0.01)).mean()
    assert scale == 1.0 or not 0.006 < pooled < 0.016


def with_tails(spec: ModelSpec, tail: Tail, combined: Tail) -> ModelSpec:
    """A model with one quantity, and these tails."""
    assert spec.detection is not None
    fit = DetectionFit(
        tails=(tail,), combined=combined, rates=(0.05,), thresholds=(1e-6,), events_per_day=100.0
    )
    return spec.model_copy(update={"detection": spec.detection.model_copy(update={"fit": fit})})


def random_forecasts(
    random: np.random.Generator, spec: ModelSpec, steps: int
) -> tuple[FloatRows, FloatRows]:
    """Events of a boolean, a tenth of them missing, whose errors are exponential."""
    assert spec.events is not None
    rows = np.zeros((steps, len(spec.events.column_index)), np.float32)
    missing = random.random(steps) < 0.1
    rows[:, spec.events.column_index["open.missing"]] = missing
    rows[:, spec.events.column_index["open"]] = ~missing
    logits = -np.log(np.expm1(random.exponential(1.0, (steps, 1)) ** 2 / 2))
    return rows, logits.astype(np.float32)


def all_outputs(spec: ModelSpec, parameters: FloatRows) -> FloatRows:
    """Outputs of the network with these parameters."""
    outputs = np.zeros((len(parameters), network_outputs(spec).size), np.float32)
    outputs[:, parameters_of(spec)] = parameters
    return outputs


def test_larger_deviations_are_never_more_probable() -> None:
    """Whatever a stream's own past is."""
    spec = fitted_to(ONE_TARGET, heavy_streams(4, 9, 2000))
    assert spec.events is not None
    for stream in heavy_streams(5, 3, 3000):
        outputs = np.zeros((len(stream.rows), network_outputs(spec).size), np.float32)
        _, state = run(spec, stream.rows, outputs, [500] * 6)
        rows = np.tile(stream.rows[-1:], (2000, 1))
        values = stream.rows[:, spec.events.column_index["flow"]]
        least, most = max(values[-1], values.mean(), 0.0), 3 * np.abs(values).max()
        rows[:, spec.events.column_index["flow"]] = np.linspace(least + 0.01, most, 2000)
        scored, _ = Detector(spec).step(
            *(rows[:, np.newaxis], np.ones(2000, np.int64), outputs[:2000, np.newaxis]),
            np.tile(state, (2000, 1)),
        )
        probability = scored[:, 0, output_spec(spec).slices["odd.probability"].start]
        assert (np.diff(probability) <= 0).all()
        assert probability[-1] < 0.01 * probability[0]


def test_any_restored_state_gives_probabilities(every_target: ModelSpec) -> None:
    rows, outputs = events(np.random.default_rng(12), every_target, 3 * BLOCK)
    detector, columns = Detector(every_target), detection_columns(every_target)
    size = detection_state(every_target).float_size
    # each chunk has a rate of its own
    names = [name for name in columns if name != ALARM_RATE]
    for number, parts in product(NUMBERS, (*([name] for name in names), names)):
        state = np.zeros((1, size), np.float32)
        for name in parts:
            state[:, columns[name]] = number
        for at in range(0, len(rows), 8):
            part = np.newaxis, slice(at, at + 8)
            scored, state = detector.step(rows[part], np.array([8]), outputs[part], state)
            assert np.isfinite(scored).all(), (number, parts)
            assert np.isfinite(state).all(), (number, parts)


def test_a_restored_count_is_no_more_than_the_events_of_its_block(every_target: ModelSpec) -> None:
    rows, outputs = events(np.random.default_rng(12), every_target, 1)
    columns = detection_columns(every_target)
    state = detection_state(every_target).zero().floats[np.newaxis]
    # four counts of 63 in each number
    state[:, columns["tail_pending"]], state[:, columns["tail_filled"]] = 2**24 - 1, 5
    _, after = Detector(every_target).step(
        rows[np.newaxis], np.array([1]), outputs[np.newaxis], state
    )
    packed = after[0, columns["tail_pending"], np.newaxis].astype(np.int64)
    assert set((packed >> [0, 6, 12, 18] & 63).ravel().tolist()) == {5, 6}


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_forecast_that_is_no_number_leaves_no_finite_state(
    every_target: ModelSpec, number: float
) -> None:
    """So that the service refuses the chunk, however the stream is cut into chunks. A mean that is
    infinite has the largest error."""
    assert every_target.detection is not None
    detection = every_target.detection.model_copy(update={"outputs": ()})
    spec = every_target.model_copy(update={"detection": detection})
    rows, outputs = events(np.random.default_rng(12), spec, 40)
    for parameter in range(parameters_of(spec).start, parameters_of(spec).stop):
        changed = outputs.copy()
        changed[20, parameter] = number
        states = [run(spec, rows, changed, cuts)[1] for cuts in ([40], [21, 19])]
        np.testing.assert_array_equal(states[0], states[1])
        assert not np.isnan(number) or not np.isfinite(states[0]).all(), parameter


def test_arrays_may_have_any_layout(every_target: ModelSpec) -> None:
    rows, outputs = events(np.random.default_rng(12), every_target, 30)
    state = np.tile(detection_state(every_target).zero().floats, (30, 1))
    detector, lengths = Detector(every_target), np.ones(30, np.int32)
    expected, after = detector.step(rows[:, np.newaxis], lengths, outputs[:, np.newaxis], state)
    for change in (
        lambda array: np.ascontiguousarray(array.transpose(1, 0, 2)).transpose(1, 0, 2),
        lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
        lambda array: array.astype(np.float64),
    ):
        given = change(rows[:, np.newaxis]), lengths, change(outputs[:, np.newaxis])
        found, states = detector.step(*given, np.asfortranarray(state))
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(states, after)


def test_the_fit_is_in_the_artifact(tmp_path: Path) -> None:
    artifact = sensor_model(tmp_path / "sensors", units=4, memory_events=200)
    detection = artifact.spec.detection
    assert detection is not None
    assert detection.fit is not None
    # levels and changes with an average of each; forecasts; runs
    assert len(detection.fit.tails) == 6
    with pytest.raises(ValidationError, match="expected ascending ones from 0"):
        DetectionSpec(head="surprise", tail_levels=(0.0, 3.0, 1.5))
    earlier = {**detection.model_dump(), "fit": {"spreads": [1.0], "tails": []}}
    with pytest.raises(ValidationError, match="train the model again"):
        DetectionSpec.model_validate(earlier)


def heavy_streams(seed: int, count: int, steps: int) -> list[Stream]:
    """Streams of noise without anomalies, whose tails differ: some have outliers all the time."""
    random = np.random.default_rng(seed)
    assert ONE_TARGET.events is not None
    streams = []
    for number in range(count):
        rows, _ = events(random, ONE_TARGET, steps)
        degrees = (1.5, 3.0, 30.0)[number % 3]
        rows[:, ONE_TARGET.events.column_index["flow"]] = random.standard_t(degrees, steps)
        counted = np.arange(steps) >= 500
        parameters = np.zeros((steps, 2), np.float32)
        streams.append(Stream(rows, parameters, counted, counted.sum() / 100))
    return streams


def test_events_behind_the_counted_ones_do_not_change_the_fit() -> None:
    streams = heavy_streams(3, 4, 1200)
    changed = [
        stream._replace(
            rows=np.concatenate([stream.rows, 50 * stream.rows]),
            parameters=np.concatenate([stream.parameters, stream.parameters]),
            counted=np.concatenate([stream.counted, np.zeros_like(stream.counted)]),
        )
        for stream in streams
    ]
    # a session without a counted event counts for nothing
    changed.append(streams[0]._replace(counted=np.zeros(1200, np.bool_), days=0.0))
    assert fit_detection(ONE_TARGET, changed) == fit_detection(ONE_TARGET, streams)


def test_probabilities_hold_for_each_stream_whatever_its_tail() -> None:
    fitted_streams, others = heavy_streams(1, 18, 2500), heavy_streams(2, 9, 6000)
    spec, shares = fitted_to(ONE_TARGET, fitted_streams), []
    for stream in others:
        outputs = np.zeros((len(stream.rows), network_outputs(spec).size), np.float32)
        scored, _ = run(spec, stream.rows, outputs, [500] * 12)
        shares.append((scored["odd.probability"][3000:] < 0.01).mean() / 0.01)
    assert max(shares) < 2.5, shares


def test_full_chunks_leave_the_state_of_padded_ones() -> None:
    """The run of equal values ends with the first chunk; in the second one no value repeats."""
    spec = fitted_to_events(ONE_TARGET)
    rows, outputs = events(np.random.default_rng(7), spec, 40)
    rows[10:20] = rows[10]
    _, padded = run(spec, rows, outputs, [20, 20])
    state = detection_state(spec).zero().floats[np.newaxis]
    for part in (np.s_[np.newaxis, :20], np.s_[np.newaxis, 20:]):
        _, state = Detector(spec).step(rows[part], np.array([20]), outputs[part], state)
    assert 8.9 < state[0, detection_columns(spec)["longest"]] < 9
    np.testing.assert_array_equal(state[0], padded)
