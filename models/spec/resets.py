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

from collections.abc import Sequence
from itertools import pairwise
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
    many segments there are.

    Args:
        times_ms: int64 [T].
        segments: int64 [T], the number of each timestamp's segment, not decreasing.
        last_ms: the latest timestamp before them in segment 0; None if there is none.
    """
    if last_ms is not None:
        times_ms = np.concatenate(([np.int64(last_ms)], times_ms))
        segments = np.concatenate(([np.int64(0)], segments))
    values, ranks = np.unique(times_ms, return_inverse=True)
    # a later segment's key is always greater, so that the maximum is that of the segment
    before = segments * len(values)
    latest = values[np.maximum.accumulate(before + ranks) - before]
    gaps = np.zeros(len(times_ms), np.int64)
    np.subtract(times_ms[1:], latest[:-1], out=gaps[1:], where=segments[1:] == segments[:-1])
    return gaps if last_ms is None else gaps[1:]


def segment_numbers(steps: int, resets: Sequence[int]) -> IntArray:
    """The number of each event's segment, int64 [T]; 0 for the events before the first reset."""
    marks = np.zeros(steps, np.int64)
    marks[list(resets)] = 1
    return np.cumsum(marks)
