"""Areas under precision and recall: of single events, and tolerant of their place (VUS-PR).

VUS-PR tolerates scores that are high some events before or after an anomaly, since labels rarely
say exactly where an anomaly starts and ends. With a buffer of w events, an event at distance d <= w
/ 2 from an anomaly is a true positive of weight sqrt(1 - d / w). For the events with a score of at
least a threshold, where A of them are in anomalies and the weights of the others add up to B,

    precision = (A + B) / events
    recall    = (A + B) / (anomalous events + B / 2), at most 1,
                times the share of the anomalies, with their buffers, that have such an event

The area under precision over recall (each step of recall times the precision after it) is averaged
over w = 0 .. W: the volume under the surface (Paparrizos et al., VLDB 2022), as in the authors'
implementation, but over all thresholds, and over at most `BUFFERS` lengths at equal distances. W =
0 is close to average precision.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Spans = list[tuple[int, int]]

BUFFERS: Final = 33
"""Most lengths of a buffer that the volume is averaged over, which bounds the time it takes."""


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
        buffer_events: W, the longest buffer.
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
    lengths = np.linspace(0, buffer_events, min(buffer_events + 1, BUFFERS)).round().astype(int)
    for buffer in lengths.tolist():
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
