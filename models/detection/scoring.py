"""Scores alarms and tail probabilities against labelled anomalies.

An anomaly is a run of labelled events in a stream. An alarm, from opening to closing, is true if
it overlaps an anomaly, and false otherwise; an anomaly is found if an alarm overlaps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Spans = list[tuple[int, int]]


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
        average_precision: mean precision over all thresholds of the tail probability, event by
            event (the area below the precision-recall curve).
    """

    anomalies: int
    recall: float
    alarms: int
    precision: float
    false_per_day: float
    delay_events: float
    average_precision: float


def score_alarms(
    alarm: Floats,
    score: Floats,
    anomalous: NDArray[np.bool_],
    streams: Spans,
    days: Sequence[float],
) -> AlarmScores:
    """Score all streams together.

    Args:
        alarm: [n], not 0 where an alarm is open.
        score: [n], larger for what is more unusual.
        anomalous: bool [n], the labels.
        streams: the first row of each stream and one past its last.
        days: how long each stream took, anomalies included.
    """
    anomalies = alarms = found = true = 0
    delays: list[int] = []
    normal_days = 0.0
    for (start, stop), own_days in zip(streams, days, strict=True):
        labelled = runs(anomalous[start:stop])
        opened = runs(alarm[start:stop] > 0)
        anomalies, alarms = anomalies + len(labelled), alarms + len(opened)
        for first, last in labelled:
            hits = [a for a, b in opened if a < last and b > first]
            found += bool(hits)
            delays += [max(0, min(hits) - first)] if hits else []
        true += sum(any(a < last and b > first for first, last in labelled) for a, b in opened)
        normal_days += own_days * (1.0 - float(anomalous[start:stop].mean()))
    return AlarmScores(
        anomalies,
        found / anomalies if anomalies else float("nan"),
        alarms,
        true / alarms if alarms else float("nan"),
        (alarms - true) / normal_days if normal_days else float("nan"),
        float(np.median(delays)) if delays else float("nan"),
        average_precision(score, anomalous),
    )


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
