"""Scores alarms and tail probabilities against labelled anomalies, with intervals over streams.

An anomaly is a run of labelled events in a stream. An alarm, from opening to closing, is true if it
overlaps an anomaly, and false otherwise; an anomaly is found if an alarm overlaps it. An alarm that
is always open finds every anomaly and is never false, so these two come with what they hide: the
share of the time in alarm, the recall that the same alarms would have at another time, and the
anomalies in which an alarm opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.alarms import CLOSED, CONTINUING
from models.detection.vus import Floats, Spans, average_precision, runs, vus_pr

DRAWS: Final = 1000
MANY: Final = 10_000_000
"""Streams of all draws together, which bounds the memory that they take."""
WORST: Final = 10
LONGEST_BUFFER: Final = 256
"""Longest buffer of VUS-PR in events."""
ECHO_EVENTS: Final = 100
"""An alarm that opens within so many events after an anomaly is an echo."""
FAR_ABOVE: Final = 3.0
"""A stream is far above a specified rate or share if it has more than so many times as much."""


@dataclass(frozen=True, slots=True)
class AlarmScores:
    """Scores of the alarms of several streams; a share is NaN without what it is a share of.

    Attributes:
        anomalies: labelled.
        recall: share of them that were found.
        recall_by_chance: the mean share, if each stream's alarms were at any other time.
        opening_recall: share of them in which an alarm opens.
        openings_per_anomaly: alarms that open in one of these, the mean.
        alarms: that were open at some event.
        precision: share of them that are true.
        merged: share of the true alarms that overlap several anomalies.
        echoes: alarms that open within `ECHO_EVENTS` after an anomaly, per anomaly.
        false_per_day: false alarms per stream and day without an anomaly.
        median_false_per_day: the median over the streams.
        time_in_alarm: share of the events at which an alarm is open.
        normal_time_in_alarm: the same of the events in no anomaly.
        delay_events: median number of events from the start of a found anomaly to its alarm.
        average_precision: of single events over all thresholds (the area below the
            precision-recall curve), the mean over the streams with an anomaly.
        vus_pr: the same with buffers of up to the median length of an anomaly.
    """

    anomalies: int
    recall: float
    recall_by_chance: float
    opening_recall: float
    openings_per_anomaly: float
    alarms: int
    precision: float
    merged: float
    echoes: float
    false_per_day: float
    median_false_per_day: float
    time_in_alarm: float
    normal_time_in_alarm: float
    delay_events: float
    average_precision: float
    vus_pr: float


COUNTS: Final = ("anomalies", "alarms")
"""Members of `AlarmScores` that have no interval."""


@dataclass(frozen=True, slots=True)
class StreamScores:
    """What `AlarmScores` are computed from, of one stream.

    Attributes:
        anomalies, detected, opened: labelled ones, those that an alarm overlaps, and those in which
            one opens.
        by_chance: detected ones on average, if the alarms were shifted by any number of events.
        openings: alarms that open in an anomaly.
        alarms, true, merged, echoes: all alarms, those that overlap an anomaly, those that overlap
            several, and those that open soon after one.
        events, normal, open, normal_open: events, those in no anomaly, and those of both at which
            an alarm is open.
        normal_days: days without an anomaly.
        delays: of the detected anomalies.
    """

    stream: str
    anomalies: int
    detected: int
    opened: int
    by_chance: float
    openings: int
    alarms: int
    true: int
    merged: int
    echoes: int
    events: int
    normal: int
    open: int
    normal_open: int
    normal_days: float
    delays: tuple[int, ...]
    average_precision: float
    vus_pr: float

    @property
    def false_per_day(self) -> float:
        """False alarms per day without an anomaly; NaN without such a day."""
        return (self.alarms - self.true) / self.normal_days if self.normal_days else np.nan


def score_streams(
    alarm: Floats,
    score: Floats,
    anomalous: NDArray[np.bool_],
    streams: Spans,
    days: Sequence[float],
    names: Sequence[str] | None = None,
) -> list[StreamScores]:
    """Score each stream.

    Args:
        alarm: [n], of `ALARM_STATES`: not 0 where an alarm is open.
        score: [n], larger for what is more unusual.
        anomalous: bool [n], the labels.
        streams: the first row of each stream and one past its last.
        days: how long each stream took, anomalies included.
        names: of the streams; their numbers by default.
    """
    names = names or [str(number) for number in range(len(streams))]
    lengths = [b - a for first, last in streams for a, b in runs(anomalous[first:last])]
    buffer = min(int(np.median(lengths)), LONGEST_BUFFER) if lengths else 0
    return [
        _score_stream(name, alarm[part], score[part], anomalous[part], own_days, buffer)
        for name, part, own_days in zip(names, (slice(*s) for s in streams), days, strict=True)
    ]


def _score_stream(
    name: str,
    alarm: Floats,
    score: Floats,
    anomalous: NDArray[np.bool_],
    days: float,
    buffer_events: int,
) -> StreamScores:
    anomalies, alarms, is_open = runs(anomalous), alarm_spans(alarm), alarm > 0
    hits = [[a for a, b in alarms if a < last and b > first] for first, last in anomalies]
    true = [start for each in hits for start in each]
    openings = np.array([a for a, _ in alarms if a > 0 or alarm[0] != CONTINUING], np.int64)
    within = openings[anomalous[openings]]
    ends = np.array([stop for _, stop in anomalies], np.int64)
    outside = openings[~anomalous[openings]]
    before = np.searchsorted(ends, outside, side="right")
    since_end = outside[before > 0] - ends[before[before > 0] - 1]
    return StreamScores(
        stream=name,
        anomalies=len(anomalies),
        detected=sum(map(bool, hits)),
        opened=sum(bool(((within >= a) & (within < b)).any()) for a, b in anomalies),
        by_chance=sum(share_of_shifts(is_open, stop - start) for start, stop in anomalies),
        openings=len(within),
        alarms=len(alarms),
        true=len(set(true)),
        merged=len({start for start in true if true.count(start) > 1}),
        echoes=int((since_end < ECHO_EVENTS).sum()),
        events=len(alarm),
        normal=int((~anomalous).sum()),
        open=int(is_open.sum()),
        normal_open=int((is_open & ~anomalous).sum()),
        normal_days=days * (1.0 - float(anomalous.mean())),
        delays=tuple(
            max(0, min(each) - first)
            for (first, _), each in zip(anomalies, hits, strict=True)
            if each
        ),
        average_precision=average_precision(score, anomalous),
        vus_pr=vus_pr(score, anomalous, buffer_events),
    )


def alarm_spans(alarm: NDArray[Any]) -> Spans:
    """The first event of each alarm and one past its last; one may open where another closed."""
    is_open, closes = alarm > 0, alarm == CLOSED
    goes_on = is_open[:-1] & is_open[1:] & ~closes[:-1]
    starts = np.flatnonzero(is_open & ~np.append(False, goes_on))
    stops = np.flatnonzero(is_open & ~np.append(goes_on, False)) + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def share_of_shifts(is_open: NDArray[np.bool_], events: int) -> float:
    """The share of a stream's cyclic shifts after which an alarm is open in a window of events."""
    if not is_open.any():
        return 0.0
    first = int(np.argmax(is_open))
    gaps = [b - a for a, b in runs(~np.roll(is_open, -first))]
    missed = sum(max(0, gap - events + 1) for gap in gaps)
    return 1.0 - missed / len(is_open)


def summarise(streams: Sequence[StreamScores]) -> AlarmScores:
    """The scores of streams together."""
    scores = _weighted(streams, np.ones((1, len(streams))))
    values = {name: float(value[0]) for name, value in scores.items()}
    counts = {name: int(values.pop(name)) for name in COUNTS}
    return AlarmScores(**counts, **values)  # type: ignore[arg-type]


def _weighted(streams: Sequence[StreamScores], weights: Floats) -> dict[str, Floats]:
    """The members of `AlarmScores` [draws], with weights [draws, streams] of the streams."""

    def of_streams(name: str) -> Floats:
        return np.array([getattr(stream, name) for stream in streams], np.float64)

    def total(name: str) -> Floats:
        return np.asarray(weights @ of_streams(name))

    def share(part: Floats, whole: Floats) -> Floats:
        return np.asarray(np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0))

    def mean(name: str) -> Floats:
        values = of_streams(name)
        known = ~np.isnan(values)
        return share(weights[:, known] @ values[known], weights[:, known].sum(axis=1))

    anomalies, opened = total("anomalies"), total("opened")
    alarms, true = total("alarms"), total("true")
    delays = [(delay, at) for at, stream in enumerate(streams) for delay in stream.delays]
    late, own = np.array(delays, np.int64).reshape(-1, 2).T
    return {
        "anomalies": anomalies,
        "recall": share(total("detected"), anomalies),
        "recall_by_chance": share(total("by_chance"), anomalies),
        "opening_recall": share(opened, anomalies),
        "openings_per_anomaly": share(total("openings"), opened),
        "alarms": alarms,
        "precision": share(true, alarms),
        "merged": share(total("merged"), true),
        "echoes": share(total("echoes"), anomalies),
        "false_per_day": share(alarms - true, total("normal_days")),
        "median_false_per_day": _medians(of_streams("false_per_day"), weights),
        "time_in_alarm": share(total("open"), total("events")),
        "normal_time_in_alarm": share(total("normal_open"), total("normal")),
        "delay_events": _medians(late.astype(np.float64), weights[:, own]),
        "average_precision": mean("average_precision"),
        "vus_pr": mean("vus_pr"),
    }


def _medians(values: Floats, weights: Floats) -> Floats:
    """The median of values [n] that are not NaN, each as often as weights [draws, n] say."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    counts = np.cumsum(weights[:, order], axis=1)
    medians = np.full(len(weights), np.nan)
    for draw in np.flatnonzero(counts[:, -1] > 0) if len(order) else ():
        half = counts[draw, -1] / 2
        middle = [np.searchsorted(counts[draw], half, side=side) for side in ("left", "right")]
        medians[draw] = values[order[middle]].mean()
    return medians


def draw_streams(streams: int, seed: int = 0) -> Floats:
    """How often each draw has each stream, float64 [draws, streams]; `DRAWS` draws, fewer of more
    than `MANY / DRAWS` streams."""
    random = np.random.default_rng(seed)
    draws = max(DRAWS // 10, min(DRAWS, MANY // streams))
    counts = random.multinomial(streams, np.full(streams, 1 / streams), size=draws)
    return counts.astype(np.float64)


def middle_95(draws: Floats) -> list[float] | None:
    """The middle 95% of draws that are not NaN; None if there are none."""
    known = draws[~np.isnan(draws)]
    return np.quantile(known, [0.025, 0.975]).tolist() if len(known) else None


def with_intervals(streams: Sequence[StreamScores], seed: int = 0) -> dict[str, Any]:
    """The scores of streams as plain data.

    Returns:
        The members of `AlarmScores`; `intervals`: the 95% interval of each that is not a count, by
        resampling streams; `worst`: up to `WORST` streams with anomalies that were missed or false
        alarms, the most of both first; and `most_false`: up to `WORST` with the most false alarms a
        day. None where there is no value.
    """
    scores = asdict(summarise(streams))
    draws = _weighted(streams, draw_streams(len(streams), seed))
    wrong = sorted(streams, key=lambda s: s.detected - s.anomalies + s.true - s.alarms)
    false = sorted(streams, key=lambda s: -s.false_per_day if s.normal_days else 0.0)
    return {
        **{name: None if np.isnan(value) else value for name, value in scores.items()},
        "intervals": {
            each.name: middle_95(draws[each.name])
            for each in fields(AlarmScores)
            if each.name not in COUNTS
        },
        "worst": [
            {
                "stream": s.stream,
                "missed": s.anomalies - s.detected,
                "false_alarms": s.alarms - s.true,
            }
            for s in wrong[:WORST]
            if s.anomalies > s.detected or s.alarms > s.true
        ],
        "most_false": [
            {
                "stream": s.stream,
                "false_per_day": s.false_per_day,
                "false_alarms": s.alarms - s.true,
                "time_in_alarm": s.open / s.events,
            }
            for s in false[:WORST]
            if s.alarms > s.true and s.normal_days
        ],
    }


def vus_difference(
    streams: Sequence[StreamScores], others: Sequence[StreamScores], seed: int = 0
) -> dict[str, Any]:
    """VUS-PR of some streams minus that of others, stream by stream: `value` and `interval`."""
    differences = np.array([a.vus_pr - b.vus_pr for a, b in zip(streams, others, strict=True)])
    known = differences[~np.isnan(differences)]
    if not len(known):
        return {"value": None, "interval": None}
    weights = draw_streams(len(known), seed)
    return {"value": float(known.mean()), "interval": middle_95(weights @ known / len(known))}
