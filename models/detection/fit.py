"""Fits detection to streams without known anomalies: tails, and the threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import count_alarms
from models.detection.kernel import FloatRows, Floats, Kernel, KernelOutputs
from models.detection.tails import EXCEEDED, Tails, fit_tail
from models.errors import DataError
from models.spec.detection import AlarmSpec, DetectionFit, DetectionSpec, Tail
from models.spec.layout import detection_columns, detection_of, detection_state
from models.spec.model import ModelSpec

RUN_NATS: Final = 4.0
"""Most nats of a run of equal values that is as long as the longest one before."""
MIN_EVENTS: Final = 200
FEW_ALARMS: Final = 10
"""Fewer alarms than this are assumed to be proportional in number to the threshold."""
LONGEST: Final = 3.0
"""Most open events, as a multiple of those of the expected alarms; see `alarm_threshold`."""
LONGEST_UNUSUAL: Final = 10.0
"""The same of alarms that stay open while events are unusual (`close_above`)."""
LEFT_OUT: Final = 0.05
"""Share of the streams, those with the most alarms, that do not count in a model with
`backoff_nats`: they may have anomalies, and the bound limits their alarms."""
SMALLEST_THRESHOLD: Final = 1e-9
STEP: Final = 1.1
"""Between the thresholds that are tried."""
RATES: Final = tuple(
    mantissa * 10.0**exponent for exponent in range(-3, 3) for mantissa in (1.0, 2.0, 5.0)
)
"""Rates of which the thresholds are stored, besides the model's own."""


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

    def part(self, steps: slice) -> Stream:
        """Some of its events."""
        rows, parameters, counted, days = self
        return Stream(rows[steps], parameters[steps], counted[steps], days)


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
    """Fit tails and the threshold to streams, each up to its last counted event.

    Raises:
        DataError: they are too short.
    """
    detection = detection_of(spec)[0]
    check_size([stream.counted for stream in streams], [stream.days for stream in streams])
    streams = [_until_last_counted(stream) for stream in streams if stream.counted.any()]
    new = np.tile(detection_state(spec).zero().floats, (len(streams), 1))
    quantities = _follow(Kernel(spec), streams, new.copy(), lambda found: found.quantities)
    *tails, of_runs = (fit_tail(column, EXCEEDED) for column in quantities.T)
    # a model without a numeric target has one tail, and no runs
    tails.append(_tail_of_runs(of_runs) if tails else of_runs)
    kernel, states = Kernel(spec, tails), new.copy()
    _follow(kernel, streams, states, lambda found: found.nats)
    # by tails as they are when the model is served, rather than those of new streams
    columns = detection_columns(spec)
    for name in ("tail_counts", "tail_pending", "tail_filled"):
        new[:, columns[name]] = states[:, columns[name]]
    nats = _follow(kernel, streams, new, lambda found: found.nats)
    combined = fit_tail(nats, EXCEEDED)
    probability = np.exp(-Tails([combined]).nats(nats[np.newaxis])[0])
    rates, thresholds = _thresholds(detection, streams, probability)
    return DetectionFit(
        tails=tuple(tails),
        combined=combined,
        rates=rates,
        thresholds=thresholds,
        events_per_day=sum(int(each.counted.sum()) for each in streams)
        / sum(each.days for each in streams),
    )


def _tail_of_runs(tail: Tail) -> Tail:
    """The tail of runs of equal values: not lighter than `RUN_NATS` for each 1 of the quantity,
    since streams without runs say nothing about them."""
    return Tail(
        threshold=max(tail.threshold, -np.log(EXCEEDED) / RUN_NATS),
        exceeded=EXCEEDED,
        scale=max(tail.scale, 1.0 / RUN_NATS),
        shape=0.0,
    )


def _until_last_counted(stream: Stream) -> Stream:
    return stream.part(slice(int(np.flatnonzero(stream.counted)[-1]) + 1))


def _thresholds(
    detection: DetectionSpec, streams: Sequence[Stream], probability: Floats
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rates of false alarms and their thresholds, given the probabilities of all counted events."""
    sizes = [int(stream.counted.sum()) for stream in streams]
    days = sum(stream.days for stream in streams)
    by_stream = np.split(probability, np.cumsum(sizes)[:-1])
    return alarm_thresholds(detection.alarm, by_stream, days)


def _follow(
    kernel: Kernel,
    streams: Sequence[Stream],
    states: FloatRows,
    numbers: Callable[[KernelOutputs], Floats],
) -> Floats:
    """Some numbers [n, ...] of the counted events, stream by stream.

    Args:
        states: of each stream; updated.
        numbers: [1, T, ...], of what is known of T events.
    """
    found = []
    for at, (rows, parameters, counted, _) in enumerate(streams):
        of_one = rows[np.newaxis], [len(rows)], parameters[np.newaxis], 0
        kernel.follow(*of_one, states[at : at + 1], kept=(kept := kernel.zeros(1, len(rows))))
        found.append(numbers(kept)[0, counted])
    return np.concatenate(found)


def alarm_thresholds(
    alarm: AlarmSpec, streams: Sequence[Floats], days: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rates of false alarms of a stream and day, and the threshold of each; both ascend.

    Rates above the model's own are left out where alarms cannot be so frequent. The own one is not:
    its threshold is then the largest that `alarm_threshold` allows.

    Args:
        streams: tail probabilities of each.
        days: of all streams together.
    """
    own, largest = alarm.false_alarms_per_day, SMALLEST_THRESHOLD
    rates: list[float] = []
    thresholds: list[float] = []
    for rate in sorted({*RATES, own}):
        target = max(rate * days, FEW_ALARMS)
        largest, is_reached = _largest_threshold(alarm, streams, target, largest)
        threshold = largest * rate * days / target
        smaller = thresholds[-1] if thresholds else 0.0
        if rate == own or (threshold > smaller and (is_reached or rate < own)):
            rates.append(rate)
            thresholds.append(max(threshold, smaller))
    return tuple(rates), tuple(thresholds)


def alarm_threshold(alarm: AlarmSpec, streams: Sequence[Floats], expected: float) -> float:
    """The tail probability at which as many alarms open as are expected, as they are served: with
    the bound of `backoff_nats`.

    A larger threshold can open fewer alarms, each of them longer. So until there are as many, they
    may be open for at most `LONGEST` (`LONGEST_UNUSUAL`) times as many events as `hold_events`
    keeps the expected ones. Few alarms depend on chance: so a threshold for fewer than `FEW_ALARMS`
    is in proportion to the one for these.

    Args:
        streams: tail probabilities of each.
    """
    target = max(expected, FEW_ALARMS)
    largest, _ = _largest_threshold(alarm, streams, target, SMALLEST_THRESHOLD)
    return largest * expected / target


def _largest_threshold(
    alarm: AlarmSpec, streams: Sequence[Floats], expected: float, start: float
) -> tuple[float, bool]:
    """The last of ascending thresholds from `start` on up to the expected number of alarms, and
    whether the next one exceeds it."""
    longest = LONGEST if alarm.close_above is None else LONGEST_UNUSUAL
    limit = min(longest * expected * (alarm.hold_events + 1), sum(map(len, streams)) / 2)
    threshold = largest = max(start, SMALLEST_THRESHOLD)
    while threshold < 0.5:
        opened, events = _count(alarm, streams, threshold, expected)
        if opened > expected:
            is_first = threshold == SMALLEST_THRESHOLD
            return (threshold * expected / opened if is_first else largest), True
        if events > limit:
            break
        largest, threshold = threshold, threshold * STEP
    return largest, False


def _count(
    alarm: AlarmSpec, streams: Sequence[Floats], threshold: float, expected: float
) -> tuple[float, float]:
    """The alarms that open, and the events for which they are open, as they are served at the rate
    of the expected ones."""
    sizes = np.array([len(each) for each in streams], np.float64)
    per_event = expected / float(sizes.sum())
    each_count = [count_alarms(alarm, [each], threshold, per_event) for each in streams]
    counts = np.array(each_count, np.float64)
    kept = np.argsort(-counts[:, 0] / sizes, kind="stable")
    if alarm.backoff_nats is not None:
        kept = kept[int(LEFT_OUT * len(kept)) :]
    opened, events = counts[kept].sum(axis=0) * (sizes.sum() / sizes[kept].sum())
    return float(opened), float(events)
