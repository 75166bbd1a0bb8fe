"""Scores of unusual events by other methods, to compare detection with.

Each gives every event a number that is larger for what is more unusual, and sees the event and
those before it in its stream. What is fitted is fitted to the training part alone.

    raw nats             of the network's head, as they come
    running level        the value minus the mean of the last `LONG` events
    change               the value minus the value before it
    seasonal naive       the value minus the value one season before, of a model with a season
    k nearest neighbours the distance of the last events from the `NEIGHBOURS`-th nearest of the
                         stream's training part
    PCA                  the distance of the last events from the principal components of the
                         stream's training part
    isolation forest     of the last events (Liu, Ting and Zhou, 2008), fitted to all streams
    random               of independent uniform numbers

The first four have a second form, averaged over the last `AVERAGED` events (nats by the mean, the
others by the root mean square), which is better for long anomalies. Values of several targets are
in standard deviations of the stream's training part, and the score is the norm over the targets.
The last events of the others are as many as have `WINDOW` values, standardised by
the stream's past.

Alarms follow from the scores by a tail of the stream's own past (`own_past_nats`), those of raw
nats by the pooled validation set: one threshold for all streams, at which as many alarms open in
the validation set as the model's detection is specified to have. The labels are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import AlarmState, follow_alarm
from models.detection.fit import MIN_EVENTS, alarm_threshold
from models.detection.tails import EXCEEDED, Tails, fit_tail
from models.events.schema import NumericField
from models.spec.layout import detection_of
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, without_normalisation

Floats = NDArray[np.float64]
Windows = NDArray[np.float32]
Bools = NDArray[np.bool_]
Scorer = Callable[[Windows], Floats]

LONG: Final = 5000
AVERAGED: Final = 12
RAW_NATS: Final = "raw nats"
LAST: Final = f" (last {AVERAGED})"
"""The name of a form that is averaged."""
WINDOW: Final = 36
"""Values of the last events, of all targets together."""
NEIGHBOURS: Final = 5
NEIGHBOUR_WINDOWS: Final = 2000
"""Most windows of a stream's training part that neighbours and components are fitted to."""
NEIGHBOUR_PRODUCTS: Final = 10**11
"""Most products of numbers for the distances of all events, which limits the windows further."""
MIN_WINDOWS: Final = 100
"""With fewer events in its training part, a stream is compared with those of all streams."""
EXPLAINED: Final = 0.9
"""Share of the variance that the principal components explain."""
TREES: Final = 100
FOREST_WINDOWS: Final = 20_000
"""Most windows that the isolation forest is fitted to."""
Z_LIMIT: Final = 30.0
GROWTH: Final = 1.25
"""A tail of a stream's past is fitted again when the past is so many times as long."""


class Parts(NamedTuple):
    """Which rows of a table are of which set.

    Attributes:
        train: bool [rows], that the network and the baselines are fitted to.
        validate: bool [rows], that alarms are calibrated on.
        days: duration of the validation part, of all streams together.
    """

    train: Bools
    validate: Bools
    days: float


class Scored(NamedTuple):
    """What a method says of every event.

    Attributes:
        score: [rows], larger for what is more unusual.
        alarm: [rows], of `ALARM_STATES`; None without a validation set.
        windows: most windows that it was fitted to, of a stream or of all of them.
    """

    score: Floats
    alarm: Floats | None
    windows: int = 0


def detection_baselines(
    spec: ModelSpec, streams: Streams, nats: NDArray[Any], parts: Parts, seed: int = 0
) -> Iterator[tuple[str, Scored]]:
    """The name of each baseline, with its scores and alarms.

    Those that are fitted are left out of a table with less than `MIN_WINDOWS` training events.

    Args:
        spec: a model with detection.
        nats: [rows], of its anomaly head.
        seed: of what is random.
    """
    alarm = detection_of(spec)[0].alarm
    is_calibrated = parts.validate.sum() >= MIN_EVENTS and parts.days > 0
    for name, score, windows in _scores(spec, streams, nats.astype(np.float64), parts, seed):
        if not is_calibrated:
            yield name, Scored(score, None, windows)
            continue
        if name.startswith(RAW_NATS):
            usual = np.sort(score[parts.validate])
            probability = 1 - np.searchsorted(usual, score, side="left") / (len(usual) + 1)
        else:
            tails = [own_past_nats(score[start:stop]) for start, stop in streams.spans]
            probability = np.exp(-np.concatenate(tails))
        counted = [probability[a:b][parts.validate[a:b]] for a, b in streams.spans]
        expected = alarm.false_alarms_per_day * parts.days
        per_event = expected / float(parts.validate.sum())
        threshold = alarm_threshold(alarm, counted, expected)
        codes = [
            follow_alarm(alarm, probability[a:b], threshold, AlarmState(), per_event)
            for a, b in streams.spans
        ]
        yield name, Scored(score, np.concatenate(codes).astype(np.float64), windows)


def own_past_nats(score: Floats) -> Floats:
    """-log P(a score of the stream's past is at least as large) of scores [T] >= 0; 0 at the first.

    A tail is fitted to all scores before, again whenever they are `GROWTH` times as many.
    """
    nats = np.zeros(len(score))
    start = MIN_WINDOWS
    while start < len(score):
        stop = round(start * GROWTH)
        tails = Tails([fit_tail(score[:start], EXCEEDED)])
        nats[start:stop] = tails.nats(score[np.newaxis, start:stop])[0]
        start = stop
    return nats


def _scores(
    spec: ModelSpec, streams: Streams, nats: Floats, parts: Parts, seed: int
) -> Iterator[tuple[str, Floats, int]]:
    """The name and scores [rows] of each baseline, and most windows that it was fitted to."""
    detection, head, events = detection_of(spec)
    numeric = [name for name in head.targets if isinstance(events.field(name), NumericField)]
    yield "random", np.random.default_rng(seed).uniform(size=streams.events), 0
    yield RAW_NATS, nats, 0
    yield f"{RAW_NATS}{LAST}", _by_stream(streams, nats, mean_of_last), 0
    if not numeric:
        return
    values = _values(spec, streams, numeric)

    def by_stream(score: Callable[[Floats], Floats]) -> Floats:
        found = np.zeros(streams.events)
        for start, stop in streams.spans:
            own = values[start:stop]
            deviation = score(own) / _deviation(own[parts.train[start:stop]])
            found[start:stop] = np.sqrt(np.nansum(np.square(deviation), axis=1))
        return found

    methods: dict[str, Callable[[Floats], Floats]] = {
        "running level": lambda own: own - past_moments(own, LONG)[0],
        "change": lambda own: own - _before(own, 1),
    }
    season = detection.season_events
    if season is not None:
        methods["seasonal naive"] = lambda own: own - _before(own, season)
    for name, method in methods.items():
        single = by_stream(method)
        yield name, single, 0
        yield f"{name}{LAST}", np.sqrt(_by_stream(streams, np.square(single), mean_of_last)), 0
    if parts.train.sum() >= MIN_WINDOWS:
        yield from _fitted_scores(streams, values, parts.train)


def _fitted_scores(
    streams: Streams, values: Floats, train: Bools
) -> Iterator[tuple[str, Floats, int]]:
    """The scores of the methods that are fitted to windows of the training part."""
    width = values.shape[1] * max(1, WINDOW // values.shape[1])
    most = NEIGHBOUR_PRODUCTS // (len(values) * width)
    most = max(MIN_WINDOWS, min(NEIGHBOUR_WINDOWS, most))
    sampled = _sample(np.flatnonzero(train), FOREST_WINDOWS)
    windows = [windows_of(values[start:stop]) for start, stop in streams.spans]
    pooled = np.concatenate(
        [
            own[sampled[(sampled >= start) & (sampled < stop)] - start]
            for own, (start, stop) in zip(windows, streams.spans, strict=True)
        ]
    )
    yield "isolation forest", fit_forest(pooled)(np.concatenate(windows)), len(pooled)
    for name, fit, limit in (
        ("k nearest neighbours", fit_neighbours, most),
        ("PCA", fit_components, NEIGHBOUR_WINDOWS),
    ):
        score_of_all = fit(_sample(pooled, limit))
        found = []
        for own, (start, stop) in zip(windows, streams.spans, strict=True):
            fitted = _sample(own[train[start:stop]], limit)
            found.append((fit(fitted) if len(fitted) >= MIN_WINDOWS else score_of_all)(own))
        yield name, np.concatenate(found), limit


def fit_forest(fitted: Windows) -> Scorer:
    """The isolation forest."""
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=TREES, random_state=0).fit(fitted)
    return lambda windows: np.asarray(-forest.score_samples(windows), np.float64)


def fit_neighbours(fitted: Windows) -> Scorer:
    """The distance from the `NEIGHBOURS`-th nearest window."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(fitted)
    return lambda windows: np.asarray(nearest.kneighbors(windows)[0][:, -1], np.float64)


def fit_components(fitted: Windows) -> Scorer:
    """The distance from the principal components that explain `EXPLAINED` of the variance."""
    mean = fitted.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(fitted, rowvar=False).reshape(len(mean), -1))
    explained = np.cumsum(variances[::-1]) / max(variances.sum(), 1e-12)
    others = axes[:, : len(mean) - 1 - int(np.searchsorted(explained, EXPLAINED))]

    def score(windows: Windows) -> Floats:
        return np.asarray(np.linalg.norm((windows - mean) @ others, axis=1), np.float64)

    return score


def _sample(rows: NDArray[Any], limit: int) -> NDArray[Any]:
    """At most so many rows at equal distances."""
    return rows[:: max(1, -(-len(rows) // limit))]


def _values(spec: ModelSpec, streams: Streams, names: list[str]) -> Floats:
    """Values [rows, D] in deviations of the training data; NaN where an event has none."""
    schema = schema_of(without_normalisation(spec))
    rows, columns = streams.encoded(schema), schema.column_index
    values = rows[:, [columns[name] for name in names]].astype(np.float64)
    for at, name in enumerate(names):
        if f"{name}.missing" in columns:
            values[rows[:, columns[f"{name}.missing"]] == 1, at] = np.nan
    return values


def _deviation(train: Floats) -> Floats:
    """The deviation [D] of a stream's training part [n, D]; 1 where there is none."""
    count = (~np.isnan(train)).sum(axis=0)
    mean = np.nansum(train, axis=0) / np.maximum(count, 1)
    deviation = np.sqrt(np.nansum(np.square(train - mean), axis=0) / np.maximum(count, 1))
    return np.where(deviation > 1e-9, deviation, 1.0)


def _by_stream(streams: Streams, values: Floats, change: Callable[[Floats], Floats]) -> Floats:
    """Values [rows] that are changed stream by stream."""
    return np.concatenate([change(values[start:stop]) for start, stop in streams.spans])


def mean_of_last(values: Floats) -> Floats:
    """The mean of the last `AVERAGED` of values [T], of fewer at the start."""
    sums = values.copy()
    # not by differences of cumulative sums, which lose digits after a large value
    for lag in range(1, AVERAGED):
        sums[lag:] += values[:-lag]
    return np.asarray(sums / np.minimum(np.arange(1, len(values) + 1), AVERAGED))


def _before(values: Floats, events: int) -> Floats:
    """The values so many events before; NaN where there is no such event."""
    before = np.full(values.shape, np.nan)
    before[events:] = values[: max(0, len(values) - events)]
    return before


def past_moments(values: Floats, window: int | None) -> tuple[Floats, Floats]:
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


def windows_of(values: Floats) -> Windows:
    """The last events of every event of a stream [T, D], oldest first, in standard deviations of
    the stream's past; 0 where there is no event.

    Returns:
        [T, events * D], as many events as have `WINDOW` values.
    """
    events = max(1, WINDOW // values.shape[1])
    windows = np.zeros((len(values), events, values.shape[1]), np.float32)
    mean, deviation = past_moments(values, None)
    for lag in range(min(events, len(values))):
        shifted = np.full(values.shape, np.nan)
        shifted[lag:] = values[: len(values) - lag]
        standard = np.clip((shifted - mean) / deviation, -Z_LIMIT, Z_LIMIT)
        windows[:, events - 1 - lag] = np.nan_to_num(standard)
    return windows.reshape(len(values), -1)
