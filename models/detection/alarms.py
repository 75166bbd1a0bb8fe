"""Alarms that open where the tail probability of events is below a threshold.

An alarm opens after `min_events` consecutive events whose tail probability is at most the
threshold. It closes after `hold_events` consecutive usual events: those whose probability is above
`close_above`, or else above `hysteresis` times the threshold. So it does not flicker, and one cause
opens it once. An alarm with `close_above` has a record: how long it has been open, how unusual its
most unusual event was, and what was unusual in the event that opened it.

With `backoff_nats` b, the alarms of a stream have an upper bound. Its excess alarms x, a leaky
bucket, grow by one with each alarm and fall with each event by r, the specified alarms per event:

    d_t = max(x_(t-1) - r, 0),    x_t = d_t + 1 if an alarm opens at t, else d_t

An alarm opens at event t only if its probability is at most the threshold times
exp(-b max(d_t - 1, 0)). Since no event has more than `MAX_NATS`, at most r n + MAX_NATS / b + 2
alarms open over any n events, whatever the probabilities are. This controls a rate online, as
adaptive conformal inference does (Gibbs & Candes, 2021), but only makes the threshold stricter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import exp
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.detection.recurrences import MAX_COUNT
from models.spec.detection import AlarmSpec
from models.spec.layout import detection_of, detection_state, state_spec
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]

NONE, OPENED, CONTINUING, CLOSED = range(4)
MUTED_EVENTS: Final = 64
"""Events after an acknowledgement in which no alarm opens: what the stream does now is learned."""
_MUTED: Final = 1 << 20


class AlarmState:
    """The state of one stream's alarm.

    Stored as one number, the first of `values`: the consecutive unusual events if there is no
    alarm; -1 - the consecutive usual ones if there is one; or `_MUTED` + the muted ones.

    Args:
        values: as stored.
        since, excess: as stored.

    Attributes:
        is_open: whether there is an alarm.
        muted: next events that open none.
        unusual: consecutive events beyond the threshold, up to the latest.
        usual: consecutive usual events of an open alarm, up to the latest.
        since: events since the latest alarm opened.
        excess: excess alarms right after it opened, see above.
    """

    __slots__ = ("excess", "is_open", "muted", "since", "unusual", "usual")

    def __init__(self, values: NDArray[Any], since: float = 0.0, excess: float = 0.0):
        stored = int(values[0])
        self.is_open = stored < 0
        # a restored state may have any number
        self.muted = stored - _MUTED if 0 < stored - _MUTED <= MUTED_EVENTS else 0
        self.unusual, self.usual = 0 if self.muted else max(stored, 0), max(-1 - stored, 0)
        self.since, self.excess = max(since, 0.0), max(excess, 0.0)

    def values(self) -> tuple[float]:
        """The state as one number."""
        if self.is_open:
            return (float(-1 - self.usual),)
        return (float(_MUTED + self.muted if self.muted else self.unusual),)

    def excess_at(self, at: int, per_event: float) -> float:
        """The excess alarms before one opens at the event `at` of the next ones."""
        return max(self.excess - per_event * (self.since + at + 1), 0.0)


def acknowledge_alarm(spec: ModelSpec, floats: NDArray[np.float32]) -> NDArray[np.float32]:
    """The packed floats of a state after its alarm was acknowledged: detection restarts, as in a
    new stream, and opens no alarm over `MUTED_EVENTS`; all else is as it was."""
    after, slices = floats.copy(), state_spec(spec).slices
    for part in detection_state(spec).parts:
        after[slices[part.name]] = 0.0
    _, head, _ = detection_of(spec)
    after[slices[f"{head.name}.alarm"]] = _MUTED + MUTED_EVENTS
    return after


def follow_alarm(
    spec: AlarmSpec,
    probability: Floats,
    threshold: float,
    state: AlarmState,
    per_event: float | None = None,
) -> NDArray[np.int64]:
    """The alarm at each of T events, of `ALARM_STATES`; updates the state.

    Args:
        probability: [T], tail probabilities.
        threshold: of these events; an alarm that earlier ones opened also follows it.
        per_event: the specified alarms per event; None: no upper bound of alarms.
    """
    backoff = None if per_event is None else spec.backoff_nats
    codes = np.zeros(len(probability), np.int64)
    # a restored state may have any number
    state.usual = min(state.usual, spec.hold_events - 1)
    end, at = len(probability), min(state.muted, len(probability))
    state.muted -= at
    beyond = np.flatnonzero(probability <= threshold).tolist()
    unusual = np.flatnonzero(probability <= spec.usual_above(threshold)).tolist()
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
        excess = 0.0
        if backoff is not None and per_event is not None:
            excess = state.excess_at(at, per_event)
            if probability[at] > threshold * exp(-backoff * max(excess - 1.0, 0.0)):
                state.unusual, at = 0, at + 1
                continue
        state.unusual += 1
        if state.unusual >= spec.min_events:
            state.is_open, state.unusual, codes[at] = True, 0, OPENED
            state.excess, state.since = excess + 1.0, -at - 1.0
        at += 1
    state.since += end
    return codes


class AlarmRecord(NamedTuple):
    """The events of an alarm.

    Attributes:
        events: int [n], their places in the chunk.
        since: int [n], events from the one that opened it to each.
        peaks: float32 [n], the most nats of it up to each.
        opened_at: the place of the event that opened the alarm, None if it is of an earlier chunk.
    """

    events: NDArray[np.int64]
    since: NDArray[np.int64]
    peaks: NDArray[np.float32]
    opened_at: int | None


def record_alarm(codes: NDArray[np.int64], nats: Floats, since: float, peak: float) -> AlarmRecord:
    """What T events add to the record of an alarm.

    Args:
        codes: [T], as `follow_alarm` gives them, some of them not `NONE`.
        nats: [T].
        since, peak: of the alarm that earlier events opened.
    """
    events = np.flatnonzero(codes)
    # as it is stored, wherever a chunk ends
    own = nats[events].astype(np.float32)
    counts, peaks = np.empty(len(events), np.int64), np.empty(len(events), np.float32)
    opened_at: int | None = None
    count, largest = int(min(max(since, 0), MAX_COUNT)), np.float32(peak)
    for at, event in enumerate(events.tolist()):
        count = min(count + 1, MAX_COUNT)
        if codes[event] == OPENED:
            count, largest, opened_at = 0, np.float32(-1.0), event
        largest = max(largest, own[at])
        counts[at], peaks[at] = count, largest
    return AlarmRecord(events, counts, peaks, opened_at)


def _first_from(indexes: list[int], at: int, end: int) -> int:
    """The first of ascending indexes from `at` on; `end` if there is none."""
    place = bisect_left(indexes, at)
    return indexes[place] if place < len(indexes) else end


def count_alarms(
    spec: AlarmSpec,
    streams: Sequence[Floats],
    threshold: float,
    per_event: float | None = None,
) -> tuple[int, int]:
    """How many alarms open in streams of tail probabilities, and for how many events in all.

    Args:
        per_event: as in `follow_alarm`.
    """
    opened = events = 0
    for probability in streams:
        codes = follow_alarm(spec, probability, threshold, AlarmState(np.zeros(1)), per_event)
        opened += int((codes == OPENED).sum())
        events += int((codes != NONE).sum())
    return opened, events
