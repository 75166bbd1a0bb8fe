"""Fits `detection` to the validation set, and compares it with baselines without the network.

The network was not trained on the validation set. Each baseline is a series of numbers. Detection
with the channel `level` alone is fitted to it: each stream's own mean and spread, the time scales,
the tails, the threshold for the same number of false alarms on the same validation set, and the
same rules of opening and closing.

    level             the value
    change            the value minus the value before it
    seasonal naive    the value minus the value one season before
    rolling z         the deviation from the mean of the last 36 events, in their standard
                      deviations
    isolation forest  of windows of 36 events, standardised by the stream's past (Liu, Ting and
                      Zhou, 2008)
    nats              of the network, calibrated in the same way
    raw nats          of the network, with one threshold for all streams and no calibration

The labels of anomalies are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import AlarmState, follow_alarm
from models.detection.fit import Stream, alarm_threshold, check_size, fit_detection
from models.detection.scoring import with_intervals
from models.events.schema import EventSchema, NumericField
from models.spec.detection import DetectionSpec
from models.spec.heads import AnomalyHead
from models.spec.layers import LstmLayer
from models.spec.layout import anomaly_size, detection_of, network_outputs, output_spec
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, without_normalisation
from models.training.evaluate import MS_PER_DAY, detect_rows, run_network, scores_from


def fitted_detection(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    streams: Streams,
    from_key: int,
    to_key: int,
) -> ModelSpec:
    """Fit the detection of a spec to the events with keys of the split in [from_key, to_key).

    Args:
        spec: a trained model, with or without detection.
        weights: its weights.
        streams: the data it was trained on.

    Raises:
        DataError: there are too few events.
    """
    if spec.detection is None:
        return spec
    return fitted_to_outputs(spec, streams, run_network(spec, weights, streams), from_key, to_key)


def fitted_to_outputs(
    spec: ModelSpec, streams: Streams, outputs: NDArray[np.float32], from_key: int, to_key: int
) -> ModelSpec:
    """Fit the detection of a spec, given the network's outputs from each stream's start."""
    detection, head, _ = detection_of(spec)
    first = network_outputs(spec).slices[head.name].stop
    parameters = outputs[:, first : first + anomaly_size(spec, head)]
    rows = streams.encoded(schema_of(spec))
    parts = [slice(start, stop) for start, stop in streams.sessions]
    counted, days = counted_events(streams, from_key, to_key)
    followed = [
        Stream(rows[part], parameters[part], events, duration)
        for part, events, duration in zip(parts, counted, days, strict=True)
    ]
    fit = fit_detection(spec, followed)
    return spec.model_copy(update={"detection": detection.model_copy(update={"fit": fit})})


def check_detection(spec: ModelSpec, streams: Streams, from_key: int, to_key: int) -> None:
    """Reject a table with too few events in [from_key, to_key) to fit the spec's detection to.

    Raises:
        DataError: there are too few.
    """
    if spec.detection is not None:
        check_size(*counted_events(streams, from_key, to_key))


def counted_events(
    streams: Streams, from_key: int, to_key: int
) -> tuple[list[NDArray[np.bool_]], list[float]]:
    """Which events of each session are in [from_key, to_key), and the days from its first to its
    last one."""
    moments, keys = streams.moments_ms, streams.split_keys
    counted = (keys >= from_key) & (keys < to_key)
    days = []
    for start, stop in streams.sessions:
        within = moments[start:stop][counted[start:stop]]
        days.append(float(np.ptp(within)) / MS_PER_DAY if len(within) else 0.0)
    return [counted[start:stop] for start, stop in streams.sessions], days


Floats = NDArray[np.float64]

WINDOW: Final = 36
TREES: Final = 100
FOREST_WINDOWS: Final = 20_000
"""Most windows that the isolation forest is fitted to."""
Z_LIMIT: Final = 30.0


class Scored(NamedTuple):
    """The score [rows] of each event, larger for what is more unusual, and the alarm [rows]."""

    score: Floats
    alarm: NDArray[np.float64]


class Run(NamedTuple):
    """A model's run over a table: its streams, and the nats [rows] of its anomaly head."""

    streams: Streams
    nats: NDArray[np.float32]


def detection_baselines(
    spec: ModelSpec, fitted_to: Run, run: Run, from_key: int, to_key: int
) -> Iterator[tuple[str, Scored]]:
    """The name of each baseline, and what it finds in a run.

    Args:
        spec: a model with detection.
        fitted_to: the run whose events in [from_key, to_key) the baselines are fitted to; the
            isolation forest is fitted to the events before.
    """
    past = _series(spec, fitted_to, None, from_key)
    present = past if run is fitted_to else _series(spec, run, fitted_to, from_key)
    counted, days = counted_events(fitted_to.streams, from_key, to_key)
    for name, values in past.items():
        own = _level_spec(spec, values.shape[1])
        rows = _rows(values)
        parameters = np.zeros((len(rows), 2 * values.shape[1]), np.float32)
        parts = zip(fitted_to.streams.sessions, counted, days, strict=True)
        fit = fit_detection(
            own, [Stream(rows[a:b], parameters[a:b], kept, each) for (a, b), kept, each in parts]
        )
        detection = detection_of(own)[0].model_copy(update={"fit": fit})
        yield name, _detect(own.model_copy(update={"detection": detection}), run, present[name])
    yield "raw nats", _raw_nats(spec, fitted_to, run, counted, days)


def compare_detection(
    spec: ModelSpec,
    streams: Streams,
    outputs: Mapping[str, NDArray[np.float32]],
    anomalous: NDArray[np.bool_],
    fit_keys: tuple[int, int],
    since_ms: int,
) -> dict[str, Any]:
    """Score a model's alarms and those of the baselines against labels.

    Args:
        outputs: by name, as `run_chunks` gives them.
        anomalous: bool [rows], the labels.
        fit_keys: keys of the split, from which and until which the baselines are fitted.
        since_ms: from when events are scored.

    Returns:
        `detection`, as from `with_intervals`, and `detection_baselines`, the same by name.
    """
    head = detection_of(spec)[1].name

    def scores(scored: Scored) -> dict[str, Any]:
        return with_intervals(scores_from(streams, scored.alarm, scored.score, anomalous, since_ms))

    run = Run(streams, outputs[head])
    baselines = detection_baselines(spec, run, run, *fit_keys)
    return {
        "detection": scores(scored_by(head, outputs)),
        "detection_baselines": {name: scores(scored) for name, scored in baselines},
    }


def _level_spec(spec: ModelSpec, count: int) -> ModelSpec:
    """A model of so many numeric targets with the same detection on their levels alone."""
    detection, _, _ = detection_of(spec)
    names = tuple(f"value_{at}" for at in range(count))
    changed = {"channels": ("level",), "season_events": None, "fit": None, "head": "anomaly"}
    return ModelSpec(
        name=spec.name,
        events=EventSchema(
            fields=tuple(NumericField(name=n, optional=True, mean=0.0, std=1.0) for n in names)
        ),
        layers=(LstmLayer(name="unused", units=1),),
        heads=(AnomalyHead(name="anomaly", input="unused", targets=names),),
        detection=DetectionSpec.model_validate({**detection.model_dump(), **changed}),
    )


def _rows(values: Floats) -> NDArray[np.float32]:
    """Events as the schema of `_level_spec` encodes them: each value, and whether it is missing."""
    missing = np.isnan(values)
    pairs = np.stack([np.where(missing, 0.0, values), missing], axis=-1)
    return pairs.reshape(len(values), -1).astype(np.float32)


def _detect(own: ModelSpec, run: Run, values: Floats) -> Scored:
    outputs = np.zeros((len(values), network_outputs(own).size), np.float32)
    by_name = output_spec(own).by_name(
        detect_rows(own, run.streams.sessions, _rows(values), outputs)
    )
    return scored_by("anomaly", by_name)


def scored_by(head: str, outputs: Mapping[str, NDArray[np.float32]]) -> Scored:
    """Scores and alarms of a head with detection, from the outputs by name."""
    return Scored(
        -outputs[f"{head}.probability"].astype(np.float64),
        outputs[f"{head}.alarm"].astype(np.float64),
    )


def _raw_nats(
    spec: ModelSpec,
    fitted_to: Run,
    run: Run,
    counted: list[NDArray[np.bool_]],
    days: list[float],
) -> Scored:
    """The probability is the share of the validation set's nats that are at least as large."""
    detection, _, _ = detection_of(spec)
    parts = [
        fitted_to.nats[a:b][own]
        for (a, b), own in zip(fitted_to.streams.sessions, counted, strict=True)
    ]
    usual = np.sort(np.concatenate(parts))

    def probability(nats: NDArray[np.float32]) -> Floats:
        return np.asarray(1 - np.searchsorted(usual, nats, side="left") / (len(usual) + 1))

    expected = detection.alarm.false_alarms_per_day * sum(days)
    threshold = alarm_threshold(detection.alarm, [probability(part) for part in parts], expected)
    alarms = [
        follow_alarm(
            detection.alarm, probability(run.nats[a:b]), threshold, AlarmState(np.zeros(3))
        )
        for a, b in run.streams.sessions
    ]
    return Scored(run.nats.astype(np.float64), np.concatenate(alarms).astype(np.float64))


def _series(spec: ModelSpec, run: Run, forest_of: Run | None, from_key: int) -> dict[str, Floats]:
    """The numbers of each baseline [rows, targets]; NaN where an event has none."""
    detection, head, events = detection_of(spec)
    numeric = [name for name in head.targets if isinstance(events.field(name), NumericField)]
    series = {"nats": run.nats[:, np.newaxis].astype(np.float64)}
    if not numeric:
        return series
    values = _values(spec, run.streams, numeric)
    sessions = run.streams.sessions
    lags = {"change": 1}
    if detection.season_events is not None:
        lags["seasonal naive"] = detection.season_events
    series["level"] = values
    for name, lag in lags.items():
        series[name] = np.full(values.shape, np.nan)
        for start, stop in sessions:
            own = values[start:stop]
            series[name][start + lag : stop] = own[lag:] - own[:-lag]
    series["rolling z"] = np.concatenate([rolling_z(values[a:b]) for a, b in sessions])
    windows = windows_of(values, sessions)
    source = run if forest_of is None else forest_of
    fitted = windows
    if forest_of is not None:
        fitted = windows_of(_values(spec, source.streams, numeric), source.streams.sessions)
    series["isolation forest"] = _isolation(fitted[source.streams.split_keys < from_key], windows)
    return series


def _values(spec: ModelSpec, streams: Streams, names: list[str]) -> Floats:
    schema = schema_of(without_normalisation(spec))
    rows, columns = streams.encoded(schema), schema.column_index
    values = rows[:, [columns[name] for name in names]].astype(np.float64)
    for at, name in enumerate(names):
        if f"{name}.missing" in columns:
            values[rows[:, columns[f"{name}.missing"]] == 1, at] = np.nan
    return values


def rolling_z(values: Floats) -> Floats:
    """The deviation of values [T, D] from the mean of the `WINDOW` events before."""
    mean, deviation = _past_moments(values, WINDOW)
    return np.clip((values - mean) / deviation, -Z_LIMIT, Z_LIMIT)


def _past_moments(values: Floats, window: int | None) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the events before each, of the last `window` or all of them;
    NaN with fewer than two."""
    present = ~np.isnan(values)
    # relative to the first, so that squares of a large level keep digits
    first = values[np.argmax(present, axis=0), np.arange(values.shape[1])]
    kept = np.where(present, values - first, 0.0)
    sums = [
        np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(each, axis=0)])[:-1]
        for each in (present.astype(np.float64), kept, np.square(kept))
    ]
    if window is not None:
        sums = [each - each[np.maximum(np.arange(len(each)) - window, 0)] for each in sums]
    count, total, squares = sums
    some = np.where(count >= 2, count, np.nan)
    mean = total / some
    variance = np.maximum(squares / some - np.square(mean), 0.0)
    return mean + first, np.sqrt(np.maximum(variance, 1e-12))


def windows_of(values: Floats, sessions: tuple[tuple[int, int], ...]) -> NDArray[np.float32]:
    """The last `WINDOW` events of every row, [rows, WINDOW * D], oldest first, in standard
    deviations of the stream's past; 0 where there is no event."""
    windows = np.zeros((len(values), WINDOW, values.shape[1]), np.float32)
    for start, stop in sessions:
        own = values[start:stop]
        mean, deviation = _past_moments(own, None)
        for lag in range(min(WINDOW, len(own))):
            shifted = np.full(own.shape, np.nan)
            shifted[lag:] = own[: len(own) - lag]
            standard = np.clip((shifted - mean) / deviation, -Z_LIMIT, Z_LIMIT)
            windows[start:stop, WINDOW - 1 - lag] = np.nan_to_num(standard)
    return windows.reshape(len(values), -1)


def _isolation(fitted: NDArray[np.float32], windows: NDArray[np.float32]) -> Floats:
    from sklearn.ensemble import IsolationForest

    step = max(1, len(fitted) // FOREST_WINDOWS)
    forest = IsolationForest(n_estimators=TREES, random_state=0).fit(fitted[::step])
    return np.asarray(-forest.score_samples(windows), np.float64)[:, np.newaxis]
