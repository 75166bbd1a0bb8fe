"""Resets: where a stream's state becomes the model's initial state again, before an event.

    explicit   the client marks an event or row
    periodic   `reset_every`: the position is a multiple of it
    session    `session_gap_s`: more than that many seconds have passed since the latest timestamp

A reset concerns the whole state, the encoder's clock included: the event after it has no gap. The
position goes on counting. Between two resets nothing differs from a stream of its own, so that the
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
        for start, stop in segments_of(steps, sorted(resets)):
            last_ms = None if start in resets else times.last_ms
            gaps = _gaps_ms(times, start, stop, last_ms)
            resets.update((np.flatnonzero(gaps > policy.session_gap_ms) + start).tolist())
    return tuple(sorted(resets))


def segments_of(steps: int, resets: Sequence[int]) -> list[tuple[int, int]]:
    """Cut T events at resets: the ranges [start, stop) between them, none of them empty.

    Args:
        resets: ascending indexes below T.
    """
    inner = resets[1:] if resets and resets[0] == 0 else resets
    return list(pairwise([0, *inner, steps]))


def _gaps_ms(times: EventTimes, start: int, stop: int, last_ms: int | None) -> IntArray:
    """Milliseconds since the latest timestamp before each event of a range, int64; 0 for an event
    without a timestamp, and for the first with one if there is none before it."""
    gaps = np.zeros(stop - start, np.int64)
    present = times.present[start:stop]
    own_ms = times.times_ms[start:stop][present]
    if len(own_ms):
        first_ms = int(own_ms[0]) if last_ms is None else last_ms
        latest_ms = np.maximum.accumulate(np.concatenate(([np.int64(first_ms)], own_ms)))
        gaps[present] = own_ms - latest_ms[:-1]
    return gaps
