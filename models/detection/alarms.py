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

import ctypes
from collections.abc import Sequence
from functools import cache
from math import log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.library import address_of, load_library
from models.spec.detection import AlarmSpec
from models.spec.layout import detection_of, detection_state, state_spec
from models.spec.model import ModelSpec

Floats = NDArray[np.float64]

NONE, OPENED, CONTINUING, CLOSED = range(4)
MUTED_EVENTS: Final = 64
"""Events after an acknowledgement in which no alarm opens: what the stream does now is learned."""
_MUTED: Final = 1 << 20


class Rule(ctypes.Structure):
    """`rule_t` of `alarms.h`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("min_events", "hold_events", "has_record")),
        *((name, ctypes.c_double) for name in ("usual_nats", "hysteresis_nats", "backoff_nats")),
    )

    @classmethod
    def of(cls, spec: AlarmSpec) -> Rule:
        """The rule of a specification."""
        return cls(
            min_events=spec.min_events,
            hold_events=spec.hold_events,
            has_record=spec.close_above is not None,
            usual_nats=-log(spec.close_above or 1.0),
            hysteresis_nats=log(spec.hysteresis),
            backoff_nats=spec.backoff_nats or 0.0,
        )


class Columns(ctypes.Structure):
    """`columns_t` of `alarms.h`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("size", "probability", "alarm", "severity", "since")),
        *(("source", ctypes.c_void_p), ("thresholds", ctypes.c_double * 2)),
    )


class AlarmState(ctypes.Structure):
    """The state of one stream's alarm, `alarm_t` of `alarms.h`; zero for a new stream.

    Attributes:
        number: the consecutive unusual events if there is no alarm; -1 - the consecutive usual ones
            if there is one; or `_MUTED` + the next events that open none.
        since: events since the latest alarm opened.
        excess: excess alarms right after it opened, see above.
        events: since an alarm opened, up to its last one.
        peak: the most nats of them.
        latest: nats of the last of them.
    """

    _fields_ = tuple(
        (name, ctypes.c_float) for name in ("number", "since", "excess", "events", "peak", "latest")
    )


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
    nats, rule = -np.log(np.maximum(probability, np.finfo(np.float64).tiny)), Rule.of(spec)
    if per_event is None:
        rule.backoff_nats = 0.0
    codes = np.empty(len(nats), np.int64)
    _function()(
        *(ctypes.byref(rule), -log(threshold), per_event or 0.0, len(nats), address_of(nats)),
        *(ctypes.byref(state), address_of(codes)),
    )
    return codes


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
        codes = follow_alarm(spec, probability, threshold, AlarmState(), per_event)
        opened += int((codes == OPENED).sum())
        events += int((codes != NONE).sum())
    return opened, events


@cache
def _function() -> Any:
    """`follow_alarms` of the library."""
    function, real, size = load_library().follow_alarms, ctypes.c_double, ctypes.c_int64
    function.restype = None
    function.argtypes = [
        *(ctypes.POINTER(Rule), real, real, size, ctypes.c_void_p),
        *(ctypes.POINTER(AlarmState), ctypes.c_void_p),
    ]
    return function
