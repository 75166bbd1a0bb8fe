"""Fits detection to streams without known anomalies: usual spreads, tails, and the threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import count_alarms
from models.detection.statistics import SMALLEST, Channels
from models.detection.tails import Tails, combine, fit_tail
from models.errors import DataError
from models.spec.detection import ROOT_OF_NORMAL, AlarmSpec, DetectionFit
from models.spec.layout import detection_of, detection_state
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]
FloatRows = NDArray[np.float32]

EXCEEDED: Final = 0.05
"""Share of the events beyond the threshold of a tail."""
STEPS: Final = 256
"""Events that are computed in one call."""
MIN_EVENTS: Final = 200
FEW_ALARMS: Final = 10
"""Up to this many alarms, their number is assumed to be proportional to the threshold."""
LONGEST: Final = 3.0
"""Most open events, as a multiple of those of the expected alarms; see `alarm_threshold`."""
SMALLEST_THRESHOLD: Final = 1e-9


class Stream(NamedTuple):
    """One stream, or session, from its beginning.

    Attributes:
        rows: [T, F], encoded.
        parameters: [T, P], the forecast of each event, made before it.
        counted: bool [T], the events to fit to: those that the network was not trained on.
        days: duration of these.
    """

    rows: FloatRows
    parameters: FloatRows
    counted: NDArray[np.bool_]
    days: float


def check_size(counted: Iterable[NDArray[np.bool_]], days: Iterable[float]) -> None:
    """Reject streams, or sessions, of which too little is counted.

    Args:
        counted, days: as in `Stream`, of each.

    Raises:
        DataError: they are too short.
    """
    events, total_days = sum(int(rows.sum()) for rows in counted), sum(days)
    if events < MIN_EVENTS or total_days <= 0:
        raise DataError(
            expected=f"at least {MIN_EVENTS} events with timestamps from `validate_from` on, to "
            "fit `detection` to",
            got=f"{events} in {total_days:.3g} days",
        )


def fit_detection(spec: ModelSpec, streams: Sequence[Stream]) -> DetectionFit:
    """Fit spreads, tails and the threshold to streams.

    Raises:
        DataError: they are too short.
    """
    detection, head, events = detection_of(spec)
    check_size([stream.counted for stream in streams], [stream.days for stream in streams])
    days = sum(stream.days for stream in streams)
    count = len(detection.channels_of(head.targets, events))
    _, states = _follow(spec, streams, np.ones(count))
    spreads = _usual_spreads(spec, states)
    statistics, _ = _follow(spec, streams, spreads)
    tails = tuple(fit_tail(column, EXCEEDED) for column in statistics.T)
    combined = combine(np.exp(Tails(tails).nats(statistics)))
    tail = fit_tail(combined, EXCEEDED)
    probability = np.exp(-Tails([tail]).nats(combined[:, np.newaxis])[:, 0])
    sizes = np.cumsum([stream.counted.sum() for stream in streams])[:-1]
    expected = detection.alarm.false_alarms_per_day * days
    return DetectionFit(
        spreads=tuple(spreads.tolist()),
        tails=tails,
        combined=tail,
        threshold=alarm_threshold(detection.alarm, np.split(probability, sizes), expected),
    )


def _usual_spreads(spec: ModelSpec, states: FloatRows) -> Floats:
    """By channel, the median of the streams' spreads, from their last states [streams, S]."""
    detection, head, events = detection_of(spec)
    slices = detection_state(spec).slices
    targets = [head.targets.index(c.target) for c in detection.channels_of(head.targets, events)]
    exact = states.astype(np.float64)
    weight = exact[:, slices[f"{head.name}.weight"]][:, targets]
    roots = exact[:, slices[f"{head.name}.spread"]] / np.maximum(weight, SMALLEST)
    spreads = np.square(np.median(roots, axis=0) / ROOT_OF_NORMAL)
    return np.asarray(np.maximum(spreads, SMALLEST))


def _follow(
    spec: ModelSpec, streams: Sequence[Stream], spreads: Floats
) -> tuple[Floats, FloatRows]:
    """The statistics [n, K] of the counted events, stream by stream, and the last states."""
    channels = Channels(spec, spreads)
    initial = detection_state(spec).zero().floats
    statistics, states = [], []
    for stream in streams:
        state = initial[np.newaxis]
        for at in range(0, len(stream.rows), STEPS):
            part = slice(at, at + STEPS)
            rows = stream.rows[np.newaxis, part]
            parameters = stream.parameters[np.newaxis, part]
            followed = channels.follow(rows, np.array([rows.shape[1]]), parameters, state)
            state = followed.state
            statistics.append(followed.statistics[0, stream.counted[part]])
        states.append(state[0])
    return np.concatenate(statistics), np.stack(states)


def alarm_threshold(alarm: AlarmSpec, streams: Sequence[Floats], expected: float) -> float:
    """The tail probability at which as many alarms open as are expected.

    A larger threshold can open fewer alarms, each of them longer. So alarms may be open for at most
    `LONGEST` times as many events as `hold_events` keeps the expected ones open.

    Args:
        streams: tail probabilities of each.
    """
    threshold = best = SMALLEST_THRESHOLD
    while threshold < 0.5:
        count, events = count_alarms(alarm, streams, threshold)
        if events > LONGEST * expected * (alarm.hold_events + 1):
            return best
        if count > expected:
            few = count <= FEW_ALARMS or best == SMALLEST_THRESHOLD
            return threshold * expected / count if few else best
        threshold, best = threshold * 1.25, threshold
    return best
