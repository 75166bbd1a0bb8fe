"""Specification of detection: calibrated anomaly scores and alarms from an anomaly head.

The head's nats depend on how well the network predicts a stream: 12 nats may be usual for one
stream and an anomaly for another. Detection compares each event with the stream's own past. Each
target has several channels:

    forecast   the error of the network's forecast, in its predicted deviations; for a categorical
               or boolean target the square root of twice its nats
    level      the value itself
    change     the value minus the value before it
    season     the value minus the value `season_events` before it

Each channel has the stream's own mean and spread of recent events, and is tested at several time
scales: the event alone, and the mean square over some events, which may be too large or too small
(a sensor that is stuck). `models.detection` has the equations. The fitted parameters
(`DetectionFit`) are in the artifact's specification, like the means of an event schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field, model_validator

from models.events.schema import Frozen, NumericField
from models.spec.state import StatePart

if TYPE_CHECKING:
    from models.events.schema import EventSchema
    from models.spec.heads import AnomalyHead

ChannelKind = Literal["forecast", "level", "change", "season"]
Scale = Annotated[int, Field(ge=2, le=4096)]

ROOT_OF_NORMAL: Final = 0.82217902
"""E sqrt|x| of a standard normal x: 2^(1/4) Gamma(3/4) / sqrt(pi)."""
ALARM_STATES = ("none", "opened", "continuing", "closed")
"""Values of the output `<head>.alarm`: 0 to 3."""


class Channel(Frozen):
    """One channel of one target."""

    target: str
    kind: ChannelKind

    @property
    def label(self) -> str:
        """`pressure.level`, for example."""
        return f"{self.target}.{self.kind}"


class AlarmSpec(Frozen):
    """When an alarm opens and closes.

    Attributes:
        false_alarms_per_day: the expected number of false alarms of one stream in a day, from which
            the threshold is fitted.
        min_events: consecutive events beyond the threshold that open an alarm.
        hold_events: consecutive events below the lower threshold that close it: alarms that follow
            each other within as many events are one.
        hysteresis: the factor between the probabilities of the threshold and the lower threshold.
    """

    false_alarms_per_day: Annotated[float, Field(gt=0, le=1000)] = 0.05
    min_events: Annotated[int, Field(ge=1, le=4096)] = 1
    hold_events: Annotated[int, Field(ge=1, le=65536)] = 24
    hysteresis: Annotated[float, Field(ge=1, le=1000)] = 5.0


class Tail(Frozen):
    """The upper tail of a statistic that is not negative: a generalised Pareto distribution.

    Attributes:
        threshold: u, exceeded with probability `exceeded`.
        exceeded: P(value > u).
        scale: of the excess over u.
        shape: of the excess over u; 0 is an exponential tail.
    """

    threshold: Annotated[float, Field(gt=0)]
    exceeded: Annotated[float, Field(gt=0, lt=1)]
    scale: Annotated[float, Field(gt=0)]
    shape: Annotated[float, Field(ge=0, lt=1)]


class DetectionFit(Frozen):
    """Parameters that are fitted to streams without known anomalies.

    Attributes:
        spreads: by channel, the usual spread.
        tails: by statistic, in the order of `DetectionSpec.statistics`.
        combined: the tail of all of them together.
        threshold: the tail probability below which an event is unusual enough for an alarm.
    """

    spreads: tuple[Annotated[float, Field(gt=0)], ...]
    tails: tuple[Tail, ...]
    combined: Tail
    threshold: Annotated[float, Field(gt=0, lt=1)]


class DetectionSpec(Frozen):
    """Detection on the events of a model with an anomaly head.

    Attributes:
        head: the anomaly head.
        memory_events: time constant of the statistics: after this many events the past weighs 1/e.
        prior_events: weight of the usual spread in a new stream's, as a pseudo-count of events.
        scales: time scales in events, beside the single event.
        channels: kinds of channels of each numeric target.
        season_events: events per season; adds the channel `season`.
        minimum_spread: the smallest spread, as a share of the usual one; bounds the deviations of a
            constant stream.
    """

    head: str
    memory_events: Annotated[int, Field(ge=10, le=10_000_000)] = 1000
    prior_events: Annotated[float, Field(gt=0)] = 50.0
    scales: tuple[Scale, ...] = (12, 36)
    channels: Annotated[tuple[Literal["forecast", "level", "change"], ...], Field(min_length=1)] = (
        "forecast",
        "level",
        "change",
    )
    season_events: Annotated[int, Field(ge=2, le=4096)] | None = None
    minimum_spread: Annotated[float, Field(gt=0, lt=1)] = 0.05
    alarm: AlarmSpec = AlarmSpec()
    fit: DetectionFit | None = None

    @model_validator(mode="after")
    def _check_distinct(self) -> DetectionSpec:
        for name in ("scales", "channels"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected distinct values, got {list(values)}")
        return self

    def channels_of(self, targets: tuple[str, ...], events: EventSchema) -> tuple[Channel, ...]:
        """Every channel, target by target: a target that is not numeric has its forecast only."""
        kinds: tuple[ChannelKind, ...] = self.channels
        if self.season_events is not None:
            kinds = (*kinds, "season")
        return tuple(
            Channel(target=target, kind=kind)
            for target in targets
            for kind in kinds
            if kind == "forecast" or isinstance(events.field(target), NumericField)
        )

    def statistics(self, channels: int) -> int:
        """Number of statistics: per channel the event alone, and each scale's large and small."""
        return channels * (1 + 2 * len(self.scales))


def detection_parts(
    spec: DetectionSpec, head: AnomalyHead, events: EventSchema
) -> tuple[StatePart, ...]:
    """The state of detection."""
    targets, channels = len(head.targets), len(spec.channels_of(head.targets, events))
    numeric = sum(isinstance(events.field(name), NumericField) for name in head.targets)
    shapes: dict[str, tuple[int, ...]] = {
        "events": (1,),
        "weight": (targets,),
        "last": (numeric,),
        "mean": (channels,),
        "spread": (channels,),
        "energy": (len(spec.scales), channels),
        "alarm": (3,),
    }
    if spec.season_events is not None:
        shapes["season"] = (spec.season_events, numeric)
    return tuple(
        StatePart(f"{spec.head}.{name}", shape, "float32") for name, shape in shapes.items()
    )
