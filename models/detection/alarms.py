"""Alarms: one for each period of unusual events, with hysteresis and a hold time.

An alarm opens after `min_events` consecutive events whose tail probability is at most the
threshold. It closes after `hold_events` consecutive events above the lower threshold, which is
`hysteresis` times as probable: so it does not flicker, and one cause opens it once. The hold time
alone suffices for most streams; the default of `hysteresis` is 1, one threshold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.spec.detection import AlarmSpec

Floats = NDArray[np.float64]

NONE, OPENED, CONTINUING, CLOSED = range(4)


class AlarmState:
    """The state of one stream's alarm.

    Stored as one number, the first of `values`: the consecutive unusual events if there is no
    alarm; otherwise -1 - the consecutive usual ones.

    Attributes:
        is_open: whether there is an alarm.
        unusual: consecutive events beyond the threshold, up to the latest.
        usual: consecutive events of an open alarm above the lower threshold, up to the latest.
    """

    __slots__ = ("is_open", "unusual", "usual")

    def __init__(self, values: NDArray[Any]):
        stored = int(values[0])
        self.is_open = stored < 0
        self.unusual, self.usual = max(stored, 0), max(-1 - stored, 0)

    def values(self) -> tuple[float]:
        """The state as one number."""
        return (float(-1 - self.usual if self.is_open else self.unusual),)


def follow_alarm(
    spec: AlarmSpec, probability: Floats, threshold: float, state: AlarmState
) -> NDArray[np.int64]:
    """The alarm at each of T events, of `ALARM_STATES`; updates the state.

    Args:
        probability: [T], tail probabilities.
        threshold: of these events; an alarm that earlier ones opened also follows it.
    """
    codes = np.zeros(len(probability), np.int64)
    # a restored state may have any number
    state.usual = min(state.usual, spec.hold_events - 1)
    end, at = len(probability), 0
    beyond = np.flatnonzero(probability <= threshold).tolist()
    unusual = np.flatnonzero(probability <= min(threshold * spec.hysteresis, 1.0)).tolist()
    while at < end:
        if state.is_open:
            following = _first_from(unusual, at, end)
            closing = at + spec.hold_events - state.usual - 1
            codes[at : min(closing, following)] = CONTINUING
            if closing < min(following, end):
                codes[closing] = CLOSED
                state.is_open, state.usual, at = False, 0, closing + 1
                continue
            state.usual += following - at
            if following < end:
                codes[following], state.usual = CONTINUING, 0
            at = following + 1
            continue
        following = _first_from(beyond, at, end)
        if following > at:
            state.unusual, at = 0, following
            continue
        state.unusual += 1
        if state.unusual >= spec.min_events:
            state.is_open, state.unusual, codes[at] = True, 0, OPENED
        at += 1
    return codes


def _first_from(indexes: list[int], at: int, end: int) -> int:
    """The first of ascending indexes from `at` on; `end` if there is none."""
    place = bisect_left(indexes, at)
    return indexes[place] if place < len(indexes) else end


def count_alarms(spec: AlarmSpec, streams: Sequence[Floats], threshold: float) -> tuple[int, int]:
    """How many alarms open in streams of tail probabilities, and for how many events in all."""
    opened = events = 0
    for probability in streams:
        codes = follow_alarm(spec, probability, threshold, AlarmState(np.zeros(3)))
        opened += int((codes == OPENED).sum())
        events += int((codes != NONE).sum())
    return opened, events
