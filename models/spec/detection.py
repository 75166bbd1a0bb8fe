"""Specification of detection: calibrated anomaly scores and alarms from an anomaly head.

The head's nats depend on how well the network predicts a stream: 12 nats may be usual for one
stream and an anomaly for another. Detection compares each event with the stream's own past, in
several channels of each target:

    forecast   the error of the network's forecast, in its predicted deviations; for a categorical
               or boolean target the square root of twice its nats
    level      the value as it comes, minus its long mean; of a model with a season, minus the mean
               or the usual value at this phase, whichever was closer before
    change     the value minus the value before it
    run        for how many events the value has been the same

Level and change are compared twice: the event alone, and an average over some events.
`models/detection/kernel.c` has the equations. The fitted parameters (`DetectionFit`) are in the
artifact's specification, like the means of an event schema.
"""

from __future__ import annotations

from bisect import bisect_right
from math import ceil, exp, log
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import Field, model_validator

from models.events.schema import CategoricalField, Frozen, NumericField
from models.spec.state import StatePart

if TYPE_CHECKING:
    from models.events.schema import EventSchema
    from models.spec.heads import AnomalyHead

ChannelKind = Literal["forecast", "level", "change", "run"]
CHANNEL_KINDS: Final[tuple[ChannelKind, ...]] = get_args(ChannelKind)
AVERAGED_KINDS: Final = 2
"""Of these, `level` and `change`."""
ALARM_STATES = ("none", "opened", "continuing", "closed")
"""Values of the output `<head>.alarm`: 0 to 3."""
MAX_SEASON_EVENTS: Final = 4096
MAX_ALARM_RATE: Final = 1000.0
"""Largest expected number of false alarms of one stream in a day."""
AVERAGED_EVENTS: Final = 12
"""Events over which errors are averaged, beside the single event."""
PACKED_COUNTS: Final = 4
"""Pending counts of tails in one float of the state, as digits of base 64."""
ALARM_RATE: Final = "alarm_rate"
"""The state part `<head>.alarm_rate`: the rate that the chunk asks for; 0 is the model's."""

TailLevel = Annotated[float, Field(ge=0, le=50)]
OutputName = Literal[
    "deviation",
    "share",
    "mean",
    "spread",
    "residual",
    "z",
    "pit",
    "nats",
    "severity",
    "since",
]
OF_THE_ALARM: Final = ("severity", "since")
"""Outputs that are one number, of an alarm with `close_above`."""
AlarmRate = Annotated[float, Field(gt=0, le=MAX_ALARM_RATE)]


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
            the threshold follows. A deployment or a request may set another one.
        min_events: consecutive events beyond the threshold that open an alarm.
        hold_events: consecutive usual events that close it: alarms that follow each other within
            as many events are one.
        close_above: events with a larger tail probability are usual again, if it is also above the
            threshold. An alarm with it has a severity and a cause, in the state. None:
            `hysteresis` decides.
        hysteresis: the factor by which events have to be more probable than the threshold to be
            usual again; 1 is one threshold.
        backoff_nats: each excess alarm of a stream but the first multiplies its threshold by
            exp(-backoff_nats) (`models.detection.alarms`). None: the threshold stays.
    """

    false_alarms_per_day: AlarmRate = 0.05
    min_events: Annotated[int, Field(ge=1, le=4096)] = 1
    hold_events: Annotated[int, Field(ge=1, le=65536)] = 24
    close_above: Annotated[float, Field(gt=0, lt=1)] | None = None
    hysteresis: Annotated[float, Field(ge=1, le=1000)] = 1.0
    backoff_nats: Annotated[float, Field(gt=0, le=60)] | None = None

    @model_validator(mode="after")
    def _check_closing(self) -> AlarmSpec:
        if self.close_above is not None and self.hysteresis != 1.0:
            raise ValueError("expected `close_above` or `hysteresis`, got both")
        return self


class Tail(Frozen):
    """The upper tail of a quantity that is not negative: a generalised Pareto distribution.

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
        tails: of the quantities of `models/detection/kernel.c`, which a new stream's own tails
            start from.
        combined: the tail of the norm of their nats.
        rates: ascending, false alarms of one stream in a day.
        thresholds: for each of them, the tail probability below which an event is unusual enough
            for an alarm.
        events_per_day: of the mean stream that was fitted to.
    """

    tails: Annotated[tuple[Tail, ...], Field(min_length=1)]
    combined: Tail
    rates: Annotated[tuple[AlarmRate, ...], Field(min_length=1)]
    thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    events_per_day: Annotated[float, Field(gt=0)]

    @model_validator(mode="before")
    @classmethod
    def _reject_earlier_versions(cls, data: Any) -> Any:
        if isinstance(data, dict) and "spreads" in data:
            raise ValueError(
                "expected the fit of this version, got one of an earlier version: "
                "train the model again"
            )
        return data

    @model_validator(mode="after")
    def _check_rates(self) -> DetectionFit:
        if len(self.thresholds) != len(self.rates) or list(self.rates) != sorted(set(self.rates)):
            raise ValueError("rates: expected ascending ones, with as many thresholds")
        return self

    def threshold(self, rate: float) -> float:
        """The tail probability below which an event is unusual enough for an alarm.

        Interpolated between the logarithms; proportional to the rate below the smallest of `rates`,
        and constant above the largest.

        Args:
            rate: false alarms of one stream in a day.
        """
        rates, thresholds = self.rates, self.thresholds
        if rate <= rates[0]:
            return thresholds[0] * rate / rates[0]
        if rate >= rates[-1]:
            return thresholds[-1]
        at = bisect_right(rates, rate)
        share = log(rate / rates[at - 1]) / log(rates[at] / rates[at - 1])
        return thresholds[at - 1] * exp(share * log(thresholds[at] / thresholds[at - 1]))


class DetectionSpec(Frozen):
    """Detection on the events of a model with an anomaly head.

    Attributes:
        head: the anomaly head.
        memory_events: time constant of what a stream is compared with, and of its own tails: after
            this many events the past weighs 1/e.
        prior_events: deviations count by half after as many events of a new stream.
        tail_levels: ascending nats, from 0 on, above which a stream's own tails count its events.
        season_events: events per season: levels are compared with its usual values or the mean,
            whichever were closer before.
        outputs: which outputs each event has behind `probability` and `alarm`; no other one is
            computed.
    """

    head: str
    memory_events: Annotated[int, Field(ge=10, le=1_000_000)] = 10_000
    prior_events: Annotated[float, Field(gt=0)] = 50.0
    tail_levels: Annotated[tuple[TailLevel, ...], Field(min_length=3, max_length=32)] = (
        0.0,
        1.5,
        3.0,
        4.5,
        6.0,
        8.0,
        11.0,
        15.0,
        21.0,
    )
    season_events: Annotated[int, Field(ge=2, le=MAX_SEASON_EVENTS)] | None = None
    alarm: AlarmSpec = AlarmSpec()
    outputs: tuple[OutputName, ...] = ()
    fit: DetectionFit | None = None

    @model_validator(mode="before")
    @classmethod
    def _reject_earlier_options(cls, data: Any) -> Any:
        earlier = {"channels", "minimum_spread", "scales", "tail_memory_events"}
        if isinstance(data, dict) and (named := earlier & data.keys()):
            raise ValueError(
                f"expected options of this version, got {sorted(named)} of an earlier one: remove "
                "them, and train the model again"
            )
        return data

    @model_validator(mode="after")
    def _check_outputs(self) -> DetectionSpec:
        if len(set(self.outputs)) < len(self.outputs):
            raise ValueError(f"outputs: expected distinct values, got {list(self.outputs)}")
        if self.alarm.close_above is None and (named := set(self.outputs) & set(OF_THE_ALARM)):
            raise ValueError(
                f"outputs: expected `alarm.close_above` with {sorted(named)}, got none"
            )
        return self

    @model_validator(mode="after")
    def _check_tails(self) -> DetectionSpec:
        levels = self.tail_levels
        if levels[0] != 0 or list(levels) != sorted(set(levels)):
            raise ValueError(f"tail_levels: expected ascending ones from 0, got {list(levels)}")
        return self

    def channels_of(self, targets: tuple[str, ...], events: EventSchema) -> tuple[Channel, ...]:
        """Every channel, target by target: a target that is not numeric has its forecast only."""
        return tuple(
            Channel(target=target, kind=kind)
            for target in targets
            for kind in CHANNEL_KINDS
            if kind == "forecast" or isinstance(events.field(target), NumericField)
        )

    def with_alarm_rate(self, rate: float) -> DetectionSpec:
        """A copy with another expected number of false alarms."""
        alarm = self.alarm.model_copy(update={"false_alarms_per_day": rate})
        return self.model_copy(update={"alarm": alarm})

    def labels(
        self, name: OutputName, targets: tuple[str, ...], events: EventSchema
    ) -> tuple[str, ...]:
        """The names of an output's values."""
        match name:
            case "deviation" | "share":
                return tuple(each.label for each in self.channels_of(targets, events))
            case "nats":
                return targets
            case "severity" | "since":
                return (name,)
            case _:
                return ordered_targets(targets, events)


def ordered_targets(targets: tuple[str, ...], events: EventSchema) -> tuple[str, ...]:
    """The targets whose values have an order: all but the categorical ones."""
    return tuple(name for name in targets if not isinstance(events.field(name), CategoricalField))


def detection_parts(
    spec: DetectionSpec, head: AnomalyHead, events: EventSchema
) -> tuple[StatePart, ...]:
    """The state of detection."""
    targets = len(head.targets)
    numeric = sum(isinstance(events.field(name), NumericField) for name in head.targets)
    kinds = AVERAGED_KINDS if numeric else 0
    tails = 2 * kinds + (numeric > 0) + 1
    shapes: dict[str, tuple[int, ...]] = {
        "events": (1,),
        "weight": (targets,),
        "last": (numeric,),
        "mean": (numeric,),
        "rest": (numeric,),
        "distance": (targets + kinds * numeric,),
        "spread": (kinds, numeric),
        "peak": (2, targets + (kinds - (numeric > 1)) * numeric),
        "average": (kinds,),
        "run": (numeric,),
        "longest": (numeric,),
        "tail_counts": (len(spec.tail_levels), tails),
        "tail_pending": (ceil(len(spec.tail_levels) * tails / PACKED_COUNTS),),
        "tail_filled": (1,),
        "alarm": (1,),
        ALARM_RATE: (1,),
    }
    if spec.season_events is not None:
        shapes |= {"season": (numeric, spec.season_events)}
        shapes |= {"season_weight": (numeric,), "season_gain": (numeric,)}
    if spec.alarm.close_above is not None:
        shapes |= {"alarm_events": (1,), "alarm_nats": (2,), "alarm_cause": (2,)}
    if spec.alarm.backoff_nats is not None:
        shapes |= {"alarm_since": (1,), "alarm_excess": (1,)}
    return tuple(
        StatePart(f"{spec.head}.{name}", shape, "float32") for name, shape in shapes.items()
    )


def parse_alarm_rates(value: str) -> dict[str, float]:
    """Parse rates of false alarms per stream and day by model: `MODEL=RATE,MODEL=RATE`.

    Raises:
        ValueError: a part is no such pair, or names a model again.
    """
    rates: dict[str, float] = {}
    for part in value.split(",") if value.strip() else []:
        model, _, text = part.strip().partition("=")
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        if not model or model in rates or not 0 < rate <= MAX_ALARM_RATE:
            raise ValueError(
                f"expected MODEL=RATE, each model once, with a rate above 0, at most "
                f"{MAX_ALARM_RATE:g} (at {part.strip()!r})"
            )
        rates[model] = rate
    return rates
