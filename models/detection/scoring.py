"""Scores alarms and tail probabilities against labelled anomalies, with intervals over streams.

An anomaly is a run of labelled events in a stream. An alarm, from opening to closing, is true if
it overlaps an anomaly, and false otherwise; an anomaly is found if an alarm overlaps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.detection.measures import Floats, Spans, average_precision, runs, vus_pr

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
    """What `AlarmScores` are computed from, for one stream: numbers of anomalies, of those found,
    of alarms and of true ones; days without an anomaly; and each found anomaly's delay."""

    stream: str
    anomalies: int
    found: int
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
    anomalies, found = sum(s.anomalies for s in streams), sum(s.found for s in streams)
    alarms, true = sum(s.alarms for s in streams), sum(s.true for s in streams)
    days = sum(s.normal_days for s in streams)
    delays = [delay for stream in streams for delay in stream.delays]
    labelled = [stream for stream in streams if stream.anomalies]
    return AlarmScores(
        anomalies,
        found / anomalies if anomalies else np.nan,
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
        {"stream": s.stream, "missed": s.anomalies - s.found, "false_alarms": s.alarms - s.true}
        for s in sorted(streams, key=lambda s: s.found - s.anomalies + s.true - s.alarms)
        if s.anomalies > s.found or s.alarms > s.true
    ]
    return {
        **plain,
        "intervals": {name: intervals[name] for name in scores if name in intervals},
        "worst": wrong[:WORST],
    }
