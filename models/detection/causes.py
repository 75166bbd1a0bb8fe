"""What was unusual in an event, or in an alarm, in words that a person reads.

The cause is the channel with the largest share. How far its value was off is in the field's unit;
what comes from the outputs of one event is in deviations, except a forecast with `residual`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.events.schema import NumericField
from models.spec.detection import ALARM_RATE, ChannelKind, ordered_targets
from models.spec.layout import detection_of, state_spec
from models.spec.model import ModelSpec

SMALL_Z: Final = 2.0
"""A channel with a smaller deviation was unusual over its last events, not at this one."""
_KINDS: Final[dict[ChannelKind, tuple[str, str, str]]] = {
    "level": ("level of {}", "its usual", "its usual"),
    "forecast": ("{}", "its forecast", "its forecast"),
    "change": ("{}", "the value before", "its usual changes"),
    "run": ("{}", "", "its usual runs of equal values"),
}
"""By kind: what was unusual, compared with what, and the same for the last events together."""


class Cause(NamedTuple):
    """What was unusual: a channel, and words such as `level of pressure 6.1 above its usual`."""

    target: str
    kind: ChannelKind
    words: str


class Alarm(NamedTuple):
    """The latest alarm of a stream.

    Attributes:
        is_open: false once it has closed.
        events: from the one that opened it to the stream's last one, or to the one that closed it.
        severity: nats of its most unusual event, as a multiple of those of the latest threshold.
        probability: tail probability of its last event.
        cause: of the event that opened it.
    """

    is_open: bool
    events: int
    severity: float
    probability: float
    cause: Cause


class Causes:
    """The causes and alarms of a model with detection."""

    def __init__(self, spec: ModelSpec):
        detection, head, events = detection_of(spec)
        self._channels = detection.channels_of(head.targets, events)
        self._residuals = ordered_targets(head.targets, events)
        fields = [events.field(name) for name in head.targets]
        numeric = [field for field in fields if isinstance(field, NumericField)]
        self._numeric = {field.name for field in numeric}
        self._unitless = {field.name for field in numeric if field.normalisation is not None}
        self._fit, self._rate = detection.fit, detection.alarm.false_alarms_per_day
        slices = state_spec(spec).slices
        self._parts = [
            slices.get(f"{head.name}.{name}")
            for name in ("alarm", "alarm_events", "alarm_nats", "alarm_cause")
        ]
        self._rate_at = slices[f"{head.name}.{ALARM_RATE}"].start

    def of_event(
        self,
        share: Sequence[float] | NDArray[Any],
        deviation: Sequence[float] | NDArray[Any] | None = None,
        residual: Sequence[float] | NDArray[Any] | None = None,
        stream: str = "",
    ) -> Cause:
        """The cause of an event, from its outputs of these names.

        Args:
            stream: in the words before the target.
        """
        place = int(np.argmax(share))
        channel = self._channels[place]
        excess, is_deviation = 0.0, True
        has_order = channel.target in self._numeric
        if has_order and deviation is not None and abs(deviation[place]) >= SMALL_Z:
            excess = 0.0 if channel.kind == "run" else float(deviation[place])
            if channel.kind == "forecast" and residual is not None:
                excess = float(residual[self._residuals.index(channel.target)])
                is_deviation = channel.target in self._unitless
        return self._cause(place, excess, is_deviation, stream)

    def severity_of(self, probability: float) -> float:
        """The nats of a tail probability, as a multiple of those of the model's threshold."""
        return -math.log(max(probability, sys.float_info.min)) / self._threshold_nats(0)

    def of_state(self, floats: NDArray[np.float32], stream: str = "") -> Alarm | None:
        """The latest alarm of a stream, by the packed floats of its complete state.

        Returns:
            None if there was no alarm, or alarms have no record (`close_above`).
        """
        alarm, events, nats, cause = self._parts
        if alarm is None or events is None or nats is None or cause is None:
            return None
        peak, latest = (float(value) for value in floats[nats])
        if not peak > 0:
            return None
        place, excess = floats[cause]
        place = int(min(max(place, 0), len(self._channels) - 1))
        return Alarm(
            is_open=bool(floats[alarm.start] < 0),
            events=int(floats[events.start]),
            severity=peak / self._threshold_nats(float(floats[self._rate_at])),
            probability=math.exp(-max(latest, 0.0)),
            cause=self._cause(place, float(excess), is_deviation=False, stream=stream),
        )

    def _threshold_nats(self, rate: float) -> float:
        """Nats of the threshold for a chunk's rate; of the model's if it asked for none."""
        if self._fit is None:
            return 1.0
        return -math.log(self._fit.threshold(rate if rate > 0 else self._rate))

    def _cause(self, place: int, excess: float, is_deviation: bool, stream: str) -> Cause:
        channel = self._channels[place]
        subject, beside, unlike = _KINDS[channel.kind]
        what = subject.format(f"{stream}.{channel.target}" if stream else channel.target)
        if excess == 0:
            return Cause(channel.target, channel.kind, f"{what} unlike {unlike}")
        if channel.kind == "run" and not is_deviation:
            return Cause(channel.target, channel.kind, f"{what} the same for {excess:,.0f} events")
        size = abs(excess)
        number = f"{size:.3g}" if size < 1000 else f"{size:,.0f}"
        unit = " deviations" if is_deviation else ""
        side = "above" if excess > 0 else "below"
        return Cause(channel.target, channel.kind, f"{what} {number}{unit} {side} {beside}")
