"""Scores alarms and tail probabilities against labelled anomalies, with intervals over streams.

VUS-PR tolerates scores that are high some events before or after an anomaly, since labels rarely
say exactly where an anomaly starts and ends. With a buffer of w events, an event at distance d <= w
/ 2 from an anomaly is a true positive of weight sqrt(1 - d / w). For the events with a score of at
least a threshold, where A of them are in anomalies and the weights of the others add up to B,

    precision = (A + B) / events
    recall    = (A + B) / (anomalous events + B / 2), at most 1,
                times the share of the anomalies, with their buffers, that have such an event

The area under precision over recall (each step of recall times the precision after it) is averaged
over w = 0 .. W: the volume under the surface (Paparrizos et al., VLDB 2022), as in the authors'
implementation, but over all thresholds. W = 0 is close to average precision.

An anomaly is a run of labelled events in a stream. An alarm, from opening to closing, is true if it
overlaps an anomaly, and false otherwise; an anomaly is found if an alarm overlaps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Spans = list[tuple[int, int]]


def runs(values: NDArray[np.bool_]) -> Spans:
    """The runs of true values: first index and one past the last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], values, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def average_precision(score: Floats, positive: NDArray[np.bool_]) -> float:
    """The mean precision at each positive, in falling order of the score; NaN without any.

    Equal scores count as one threshold.
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    precision, gained = hits[last] / (last + 1), np.diff(hits[last], prepend=0)
    return float((precision * gained).sum() / hits[-1])


def vus_pr(
    score: Floats, anomalous: NDArray[np.bool_], buffer_events: int, streams: Spans | None = None
) -> float:
    """The volume under the surface of precision and recall; NaN without an anomaly.

    Args:
        score: [n], larger for what is more unusual; compared over all streams.
        anomalous: bool [n], the labels.
        buffer_events: W, the largest buffer.
        streams: the first row of each stream and one past its last, which buffers do not cross.
    """
    if not anomalous.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(order) - 1)
    inside = np.cumsum(anomalous[order])[last]
    anomalies = [
        (start, stop, start + first, start + end)
        for start, stop in streams or [(0, len(score))]
        for first, end in runs(anomalous[start:stop])
    ]
    areas = []
    for buffer in range(buffer_events + 1):
        weights, extended = _add_buffers(anomalies, anomalous, buffer)
        beside = np.cumsum(weights[order])[last]
        highest = np.sort([float(np.max(score[first:end])) for first, end in extended])
        touched = len(extended) - np.searchsorted(highest, ordered[last], side="left")
        true = inside + beside
        recall = np.minimum(true / (anomalous.sum() + beside / 2), 1.0) * touched / len(extended)
        areas.append(float((np.diff(recall, prepend=0.0) * true / (last + 1)).sum()))
    return float(np.mean(areas))


def _add_buffers(
    anomalies: list[tuple[int, int, int, int]], anomalous: NDArray[np.bool_], buffer: int
) -> tuple[Floats, Spans]:
    """The weights [n] of events that are in no anomaly, and the anomalies with their buffers:
    those of one stream whose buffers overlap are one."""
    weights, extended = np.zeros(len(anomalous)), Spans()
    reach = buffer // 2
    falling = np.sqrt(1.0 - np.arange(1, reach + 1) / max(buffer, 1))
    for start, stop, first, end in anomalies:
        after = weights[end : min(end + reach, stop)]
        after += falling[: len(after)]
        before = weights[max(first - reach, start) : first]
        before += falling[: len(before)][::-1]
        span = max(first - reach, start), min(end + reach, stop)
        if extended and span[0] < extended[-1][1]:
            span = extended.pop()[0], span[1]
        extended.append(span)
    return np.where(anomalous, 0.0, np.minimum(weights, 1.0)), extended


DRAWS = 1000
WORST = 10
LONGEST_BUFFER = 256
"""Largest buffer of VUS-PR in events, which bounds the time that it takes."""


@dataclass(frozen=True, slots=True)
class AlarmScores:
    """Scores of the alarms of several streams.

    Attributes:
        anomalies: labelled.
        recall: share of them that were found; NaN without any.
        alarms: that were open at some event.
        precision: share of them that are true; NaN without any.
        false_per_day: false alarms per stream and day without an anomaly.
        delay_events: median number of events from the start of a found anomaly to its alarm.
        average_precision: of single events over all thresholds (the area below the
            precision-recall curve), the mean over the streams with an anomaly.
        vus_pr: the same with buffers of up to the median length of an anomaly.
    """

    anomalies: int
    recall: float
    alarms: int
    precision: float
    false_per_day: float
    delay_events: float
    average_precision: float
    vus_pr: float


@dataclass(frozen=True, slots=True)
class StreamScores:
    """Counts of one stream, from which `AlarmScores` are computed: anomalies, detected ones, alarms
    and true ones; days without an anomaly; and each found anomaly's delay."""

    stream: str
    anomalies: int
    detected: int
    alarms: int
    true: int
    normal_days: float
    delays: tuple[int, ...]
    average_precision: float
    vus_pr: float


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
        alarm: [n], not 0 where an alarm is open.
        score: [n], larger for what is more unusual.
        anomalous: bool [n], the labels.
        streams: the first row of each stream and one past its last.
        days: how long each stream took, anomalies included.
        names: of the streams; their numbers by default.
    """
    names = names or [str(number) for number in range(len(streams))]
    lengths = [b - a for first, last in streams for a, b in runs(anomalous[first:last])]
    buffer = min(int(np.median(lengths)), LONGEST_BUFFER) if lengths else 0
    scored = []
    for name, (start, stop), own_days in zip(names, streams, days, strict=True):
        own, labels = score[start:stop], anomalous[start:stop]
        labelled, opened = runs(labels), runs(alarm[start:stop] > 0)
        hits = [[a for a, b in opened if a < last and b > first] for first, last in labelled]
        delays = tuple(
            max(0, min(each) - first)
            for (first, _), each in zip(labelled, hits, strict=True)
            if each
        )
        scored.append(
            StreamScores(
                name,
                len(labelled),
                len(delays),
                len(opened),
                len({a for each in hits for a in each}),
                own_days * (1.0 - float(labels.mean())),
                delays,
                average_precision(own, labels),
                vus_pr(own, labels, buffer),
            )
        )
    return scored


def summarise(streams: Sequence[StreamScores]) -> AlarmScores:
    """The scores of streams together."""
    anomalies, detected = sum(s.anomalies for s in streams), sum(s.detected for s in streams)
    alarms, true = sum(s.alarms for s in streams), sum(s.true for s in streams)
    days = sum(s.normal_days for s in streams)
    delays = [delay for stream in streams for delay in stream.delays]
    labelled = [stream for stream in streams if stream.anomalies]
    return AlarmScores(
        anomalies,
        detected / anomalies if anomalies else np.nan,
        alarms,
        true / alarms if alarms else np.nan,
        (alarms - true) / days if days else np.nan,
        float(np.median(delays)) if delays else np.nan,
        float(np.mean([s.average_precision for s in labelled])) if labelled else np.nan,
        float(np.mean([s.vus_pr for s in labelled])) if labelled else np.nan,
    )


def with_intervals(streams: Sequence[StreamScores], seed: int = 0) -> dict[str, Any]:
    """The members of `AlarmScores`; `intervals`: the 95% interval of each that is not a count, by
    resampling streams; and `worst`: up to `WORST` streams with anomalies that were missed or false
    alarms, the most of both first. None where there is no value."""
    scores = asdict(summarise(streams))
    random = np.random.default_rng(seed)
    chosen = random.integers(len(streams), size=(DRAWS, len(streams)))
    draws = [asdict(summarise([streams[at] for at in draw])) for draw in chosen]
    intervals: dict[str, list[float] | None] = {}
    for name in scores.keys() - {"anomalies", "alarms"}:
        values = np.array([draw[name] for draw in draws])
        known = values[~np.isnan(values)]
        intervals[name] = np.quantile(known, [0.025, 0.975]).tolist() if len(known) else None
    plain = {name: None if np.isnan(value) else value for name, value in scores.items()}
    wrong = [
        {"stream": s.stream, "missed": s.anomalies - s.detected, "false_alarms": s.alarms - s.true}
        for s in sorted(streams, key=lambda s: s.detected - s.anomalies + s.true - s.alarms)
        if s.anomalies > s.detected or s.alarms > s.true
    ]
    return {
        **plain,
        "intervals": {name: intervals[name] for name in scores if name in intervals},
        "worst": wrong[:WORST],
    }
