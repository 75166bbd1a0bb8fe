"""Resets: where a stream's state becomes the model's initial state again, before an event.

    explicit   the client marks an event or row
    periodic   `reset_every`: the position is a multiple of it
    session    `session_gap_s`: more than that many seconds have passed since the latest timestamp

A reset concerns the whole state, the encoder's clock included: the event after it has no gap. The
position keeps counting. Between two resets nothing differs from a separate stream, so that the
segments of a chunk are independent of each other.

Whether an event is preceded by a reset depends on the events before it in its stream, on its
position and on its own mark, never on how the stream is cut into chunks. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

NO_RESETS: tuple[int, ...] = ()


class ResetPolicy(NamedTuple):
    """When a model resets the states of its streams by itself.

    Attributes:
        every: N, resets before the events at the positions 0, N, 2N, ...; None: never.
        session_gap_ms: a longer time between two timestamps separates sessions; None: never.
    """

    every: int | None = None
    session_gap_ms: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether the model resets states by itself at all."""
        return self.every is not None or self.session_gap_ms is not None


class EventTimes(NamedTuple):
    """The timestamps of T events.

    Attributes:
        times_ms: int64 [T], epoch milliseconds; any value where there is none.
        present: bool [T], whether an event has a timestamp.
        last_ms: the latest timestamp before them since the last reset; None if there is none.
    """

    times_ms: IntArray
    present: BoolArray
    last_ms: int | None = None


def find_resets(
    policy: ResetPolicy,
    steps: int,
    position: int,
    explicit: Sequence[int] = NO_RESETS,
    times: EventTimes | None = None,
) -> tuple[int, ...]:
    """The indexes, ascending, of the events that the state is reset before.

    Args:
        steps: T, number of consecutive events.
        position: the position of the first of them.
        explicit: ascending indexes of the events that are marked.
        times: their timestamps; None for rows, which have none, so that no session ends.
    """
    resets = set(explicit)
    if policy.every is not None:
        resets.update(range(-position % policy.every, steps, policy.every))
    if policy.session_gap_ms is not None and times is not None and steps:
        there = np.flatnonzero(times.present)
        segments = segment_numbers(steps, sorted(resets))[there]
        gaps = gaps_since_latest_ms(times.times_ms[there], segments, times.last_ms)
        resets.update(there[gaps > policy.session_gap_ms].tolist())
    return tuple(sorted(resets))


def segments_of(steps: int, resets: Sequence[int]) -> list[tuple[int, int]]:
    """Cut T events at resets: the ranges [start, stop) between them, none of them empty.

    Args:
        resets: ascending indexes below T.
    """
    inner = resets[1:] if resets and resets[0] == 0 else resets
    return list(pairwise([0, *inner, steps]))


def gaps_since_latest_ms(times_ms: IntArray, segments: IntArray, last_ms: int | None) -> IntArray:
    """Milliseconds since the latest timestamp before each one in its segment, int64 [T].

    0 for the first of a segment; negative for one that is out of order. In time T log T, however
    many segments there are, and in time T if the timestamps are in order.

    Args:
        times_ms: int64 [T].
        segments: int64 [T], the number of each timestamp's segment, not decreasing.
        last_ms: the latest timestamp before them in segment 0; None if there is none.
    """
    if last_ms is not None:
        times_ms = np.concatenate(([np.int64(last_ms)], times_ms))
        segments = np.concatenate(([np.int64(0)], segments))
    gaps = np.zeros(len(times_ms), np.int64)
    np.subtract(times_ms[1:], times_ms[:-1], out=gaps[1:], where=segments[1:] == segments[:-1])
    if np.min(gaps, initial=0) < 0:
        # elsewhere the latest timestamp is the one before
        unordered = np.zeros(int(segments[-1]) + 1, np.bool_)
        unordered[segments[gaps < 0]] = True
        which = np.flatnonzero(unordered[segments])
        gaps[which] = _gaps_of_unordered(times_ms[which], segments[which])
    return gaps if last_ms is None else gaps[1:]


def _gaps_of_unordered(times_ms: IntArray, segments: IntArray) -> IntArray:
    """`gaps_since_latest_ms` by the ranks of the timestamps, of which maxima can be accumulated
    across segments: a later segment's key is always greater."""
    values, ranks = np.unique(times_ms, return_inverse=True)
    before = segments * len(values)
    latest = values[np.maximum.accumulate(before + ranks) - before]
    gaps = np.zeros(len(times_ms), np.int64)
    np.subtract(times_ms[1:], latest[:-1], out=gaps[1:], where=segments[1:] == segments[:-1])
    return gaps


def gaps_of_segments_ms(
    times_ms: IntArray, present: BoolArray, starts: IntArray, last_ms: Mapping[int, int]
) -> IntArray:
    """`gaps_since_latest_ms` of events of many segments, int64 [T]; 0 without a timestamp.

    Args:
        times_ms, present: [T], as in `EventTimes`.
        starts: int64 [G], ascending, the first event of each segment; the first is 0.
        last_ms: by segment, the latest timestamp before it in its stream.
    """
    segments = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(times_ms)))
    there: IntArray | slice = slice(None)
    if not present.all():
        there = np.flatnonzero(present)
        times_ms, segments = times_ms[there], segments[there]
    gaps = np.zeros(len(present), np.int64)
    if not last_ms:
        gaps[there] = gaps_since_latest_ms(times_ms, segments, None)
        return gaps
    known = np.array(sorted(last_ms), np.int64)
    places = np.searchsorted(segments, known)
    earlier = np.array([last_ms[at] for at in known.tolist()], np.int64)
    found = gaps_since_latest_ms(
        np.insert(times_ms, places, earlier), np.insert(segments, places, known), None
    )
    gaps[there] = np.delete(found, places + np.arange(len(places)))
    return gaps


def find_segments(
    policy: ResetPolicy,
    starts: IntArray,
    positions: IntArray,
    marks: IntArray,
    steps: int,
    times: EventTimes | None = None,
    last_ms: Mapping[int, int] = MappingProxyType({}),
) -> tuple[IntArray, BoolArray]:
    """Where the segments of S streams start, by the same rules as `find_resets`.

    Args:
        starts: int64 [S], ascending, the first event of each stream; the first is 0.
        positions: int64 [S], of those events.
        marks: ascending indexes of the events that are marked.
        steps: T, number of events of all streams.
        times: their timestamps; `last_ms` of it is not read.
        last_ms: by stream, the latest timestamp before its events since the last reset.

    Returns:
        The first event of each segment, ascending, int64 [G]; and bool [G], whether the state is
        reset before it (otherwise it starts a stream).
    """
    is_start, is_reset = np.zeros(steps, np.bool_), np.zeros(steps, np.bool_)
    is_start[starts] = True
    is_reset[marks] = True
    if policy.every is not None:
        first = np.repeat(positions - starts, np.diff(starts, append=steps))
        is_reset |= (np.arange(steps) + first) % policy.every == 0
    if policy.session_gap_ms is not None and times is not None:
        segments = np.flatnonzero(is_start | is_reset)
        known = {
            int(np.searchsorted(segments, starts[stream])): latest
            for stream, latest in last_ms.items()
            if not is_reset[starts[stream]]
        }
        gaps = gaps_of_segments_ms(times.times_ms, times.present, segments, known)
        is_reset |= gaps > policy.session_gap_ms
    segments = np.flatnonzero(is_start | is_reset)
    return segments, is_reset[segments]


def segment_numbers(steps: int, resets: Sequence[int]) -> IntArray:
    """The number of each event's segment, int64 [T]; 0 for the events before the first reset."""
    marks = np.zeros(steps, np.int64)
    marks[list(resets)] = 1
    return np.cumsum(marks)
