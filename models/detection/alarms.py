"""Alarms: one for each period of unusual events, with hysteresis and a hold time.

An alarm opens after `min_events` consecutive events whose tail probability is at most the
threshold. It closes after `hold_events` consecutive events above the lower threshold, which is
`hysteresis` times as probable: so it does not flicker, and one cause opens it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.spec.detection import AlarmSpec

Floats = NDArray[np.float64]

NONE, OPENED, CONTINUING, CLOSED = range(4)


class AlarmState:
    """The state of one stream's alarm.

    Attributes:
        is_open: whether there is an alarm.
        unusual: consecutive events beyond the threshold, up to the latest.
        usual: consecutive events of an open alarm above the lower threshold, up to the latest.
    """

    __slots__ = ("is_open", "unusual", "usual")

    def __init__(self, values: NDArray[Any]):
        self.is_open = bool(values[0] > 0)
        self.unusual, self.usual = int(values[1]), int(values[2])

    def values(self) -> tuple[float, float, float]:
        """The state as numbers."""
        return float(self.is_open), float(self.unusual), float(self.usual)


def follow_alarm(
    spec: AlarmSpec, probability: Floats, threshold: float, state: AlarmState
) -> NDArray[np.int64]:
    """The alarm at each of T events, of `ALARM_STATES`; updates the state.

    Args:
        probability: [T], tail probabilities.
    """
    codes = np.zeros(len(probability), np.int64)
    release = min(threshold * spec.hysteresis, 1.0)
    beyond = probability <= threshold
    at = 0
    while at < len(probability):
        if not state.is_open and not beyond[at]:
            state.unusual = 0
            rest = np.flatnonzero(beyond[at:])
            if not len(rest):
                break
            at += int(rest[0])
        if not state.is_open:
            state.unusual = min(state.unusual + 1, spec.min_events)
            if state.unusual >= spec.min_events:
                state.is_open, state.unusual, state.usual = True, 0, 0
                codes[at] = OPENED
        else:
            state.usual = state.usual + 1 if probability[at] > release else 0
            codes[at] = CONTINUING
            if state.usual >= spec.hold_events:
                state.is_open, state.usual = False, 0
                codes[at] = CLOSED
        at += 1
    return codes


def count_alarms(spec: AlarmSpec, streams: Sequence[Floats], threshold: float) -> tuple[int, int]:
    """How many alarms open in streams of tail probabilities, and for how many events in all."""
    opened = events = 0
    for probability in streams:
        codes = follow_alarm(spec, probability, threshold, AlarmState(np.zeros(3)))
        opened += int((codes == OPENED).sum())
        events += int((codes != NONE).sum())
    return opened, events
