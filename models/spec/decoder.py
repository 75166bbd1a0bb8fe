"""The decoder of an encoder/decoder model, as a specification describes it.

The encoder is the model's own stack: it consumes events and its state is what a stream keeps.
The decoder starts from a copy of that state and looks ahead, one step at a time:

    step(previous values [B,D], known columns of the coming step [B,K], state [B,M])
        -> (parameters of the coming values' distribution [B,P], state' [B,M])

What it gives is fed back as the next step's previous values (Sutskever et al. 2014; Cho et al.
2014). Both see encoded columns: a target standardised, a category as its code.

One such step is itself a small network, and is described as one: `network_data` gives its
specification, from which runtimes, weights and state layout follow as they do for any other.
Descriptions only: `models.decoding.forecasts` has the numbers around a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from models.events.schema import (
    TIMESTAMP_FEATURES,
    EventSchema,
    FieldName,
    Frozen,
    TimestampField,
)
from models.spec.layers import GruLayer, Layer, LayerName, LstmLayer, returned_state

if TYPE_CHECKING:
    from models.spec.model import ModelSpec

T = TypeVar("T")

DECODER = "decoder"
"""Of the encoder/decoder: its section, the beginning of its weights' names, its graph."""
LAST = "decoder.last"
"""State part float32 [D]: the last observed value of each target, as encoded; 0 (the mean)
where none was observed yet. It is the decoder's first input."""
DISTRIBUTION = "distribution"
"""The name of the step network's one head."""
MEDIAN = 0.5
CALENDAR = TIMESTAMP_FEATURES[1:]
"""What a timestamp tells of a coming step; its gap is the same at every step."""
STEPWISE_KINDS = (
    "lstm",
    "gru",
    "dense",
    "activation",
    "dropout",
    "layer_normalization",
    "batch_normalization",
    "add",
    "multiply",
    "average",
    "concatenate",
)
"""Kinds of layers that need nothing but the step and their own state."""

Quantile = Annotated[float, Field(gt=0, lt=1)]


class _DistributionHead(Frozen):
    """Quantiles that a forecast shows; the median is its point."""

    quantiles: Annotated[tuple[Quantile, ...], Field(min_length=2)] = (0.1, MEDIAN, 0.9)

    @model_validator(mode="after")
    def _rising_around_the_median(self) -> _DistributionHead:
        levels = list(self.quantiles)
        if levels != sorted(set(levels)) or MEDIAN not in levels:
            raise ValueError(f"expected rising quantiles with {MEDIAN} among them, got {levels}")
        return self


class QuantilesHead(_DistributionHead):
    """The network gives the quantiles of each target themselves."""

    kind: Literal["quantiles"] = "quantiles"


class GaussianHead(_DistributionHead):
    """The network gives mean and log deviation of each target, independent of each other."""

    kind: Literal["gaussian"] = "gaussian"


DistributionHead = QuantilesHead | GaussianHead


class DecoderSpec(Frozen):
    """The section `decoder` of a specification.

    A layer with `starts_from` begins a forecast in the state of the encoder's layer of that
    name; written on the layer, it is kept in `starts_from` here. Other recurrent layers begin
    in the zero state.

    Attributes:
        targets: numeric event fields, D of them, that are decoded and fed back.
        known: event fields that are known of coming steps, beside the timestamp's calendar.
        step_s: seconds between one timestamp and the next; without it a forecast has to be
            told the timestamps of the coming steps.
        layers: read what the step knows under `features`: previous values, calendar, known.
        starts_from: decoder layer -> encoder layer.
        head: the distribution of the coming values.
        max_horizon: most steps of one forecast.
    """

    targets: Annotated[tuple[FieldName, ...], Field(min_length=1)]
    known: tuple[FieldName, ...] = ()
    step_s: Annotated[float, Field(ge=0.001, le=366 * 86_400)] | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=128)]
    starts_from: dict[LayerName, LayerName]
    head: Annotated[DistributionHead, Field(discriminator="kind")] = QuantilesHead()
    max_horizon: Annotated[int, Field(ge=1, le=10_000)]

    @property
    def step_ms(self) -> int | None:
        """Milliseconds from one timestamp to the next, where that is regular."""
        return None if self.step_s is None else round(self.step_s * 1000)


class DecoderTraining(Frozen):
    """How `carry train` fits a decoder; see `models.training.decoder_training`.

    Attributes:
        horizon: steps that it is unrolled over; `max_horizon` by default.
        anchor_steps: events between two points of a window at which it is unrolled.
        feedback: what falls over the training is the share of true values fed back; `teacher`
            feeds back nothing else throughout.
        half_at: share of the training (of all `epochs`) at which that is one half.
        floor: least share of true values.
    """

    horizon: Annotated[int, Field(ge=1, le=10_000)] | None = None
    anchor_steps: Annotated[int, Field(ge=1, le=4096)] = 12
    feedback: Literal["teacher", "inverse_sigmoid", "linear"] = "inverse_sigmoid"
    half_at: Annotated[float, Field(gt=0, le=1)] = 0.5
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0


def collect_starts_from(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of the section with each layer's `starts_from` moved into the section's own.

    Args:
        decoder: as it was written, its layers named.
    """
    starts = decoder.get("starts_from", {})
    layers = []
    for layer in decoder["layers"]:
        if isinstance(layer, dict) and isinstance(starts, dict) and layer.get("starts_from"):
            starts = {**starts, layer["name"]: layer["starts_from"]}
        layers.append(
            {key: value for key, value in layer.items() if key != "starts_from"}
            if isinstance(layer, dict)
            else layer
        )
    return {**decoder, "layers": layers, "starts_from": starts}


def check_decoder(spec: ModelSpec, decoder: DecoderSpec) -> None:
    """Raise ValueError where the section does not fit the rest of the specification."""
    if spec.events is None:
        raise ValueError("decoder: targets are event fields, and the model has no `events`")
    if decoder.step_s is not None and spec.events.timestamp is None:
        raise ValueError("decoder.step_s: it is between timestamps, and no field is a timestamp")
    for name in (*(layer.name for layer in spec.layers), *(head.name for head in spec.heads)):
        if name == DECODER:
            raise ValueError(f"decoder: expected no layer or head of that name, got {name!r}")
    _check_fields(spec.events, decoder)
    for layer in decoder.layers:
        if layer.kind not in STEPWISE_KINDS:
            raise ValueError(
                f"decoder: layer {layer.name!r}: expected one that goes forward step by step "
                f"({', '.join(STEPWISE_KINDS)}), got {layer.kind}"
            )
    _check_starts(spec, decoder)


def _check_fields(schema: EventSchema, decoder: DecoderSpec) -> None:
    kinds = {field.name: field.kind for field in schema.fields}
    for part, names in (("targets", decoder.targets), ("known", decoder.known)):
        if len(set(names)) != len(names):
            raise ValueError(f"decoder.{part}: expected distinct {part}, got {list(names)}")
        for name in names:
            if name not in kinds:
                raise ValueError(
                    f"decoder.{part}: expected {part} among the event fields {list(kinds)}, "
                    f"got {name!r}"
                )
    for name in decoder.targets:
        if kinds[name] != "numeric":
            raise ValueError(
                f"decoder.targets: expected a numeric target, {name!r} is {kinds[name]}"
            )
    for name in decoder.known:
        if name in decoder.targets:
            raise ValueError(
                f"decoder.known: {name!r} is decoded; expected it not to be known as well"
            )
        if kinds[name] == "timestamp":
            raise ValueError(f"decoder.known: the timestamp {name!r} need not be named")


def _check_starts(spec: ModelSpec, decoder: DecoderSpec) -> None:
    own = {layer.name: layer for layer in decoder.layers}
    encoder = {
        layer.name: layer
        for layer in spec.layers
        if isinstance(layer, LstmLayer | GruLayer) and layer.starts_from is None
    }
    for name, source in decoder.starts_from.items():
        layer = own.get(name)
        if not isinstance(layer, LstmLayer | GruLayer):
            raise ValueError(
                f"decoder: starts_from: expected recurrent layers of the decoder, got {name!r}"
            )
        if source not in encoder:
            raise ValueError(
                f"decoder: layer {name!r} starts from {source!r}, expected one of the encoder's "
                f"layers that keep a state: {sorted(encoder)}"
            )
        if returned_state(layer) != returned_state(encoder[source]):
            raise ValueError(
                f"decoder: layer {name!r} starts from {source!r}: expected the same kind and "
                f"units, got {_shown(layer)} and {_shown(encoder[source])}"
            )
    if not decoder.starts_from:
        raise ValueError(
            "decoder.layers: expected at least one layer with `starts_from`, naming one of the "
            f"encoder's: {sorted(encoder)}"
        )


def _shown(layer: LstmLayer | GruLayer) -> str:
    width = returned_state(layer)["hidden"]
    projected = "" if width == layer.units else f" to {width}"
    return f"{layer.kind} of {layer.units}{projected}"


def network_data(spec: ModelSpec, decoder: DecoderSpec) -> dict[str, Any]:
    """The specification of the network of one decoder step, as plain data.

    Its rows are the D previous values, the calendar of the coming step where there is a
    timestamp, and the columns of the known fields; all of them encoded already, so numbers
    stand there with mean 0 and deviation 1.
    """
    schema = spec.events
    if schema is None:
        raise ValueError("decoder: expected `events`")
    used = {field.name for field in schema.fields}
    fields: list[dict[str, Any]] = [_encoded_number(name) for name in decoder.targets]
    if schema.timestamp is not None:
        for feature in CALENDAR:
            name = feature
            while name in used:
                name += "_"
            fields.append(_encoded_number(name))
    known = [schema.field(name).model_dump(exclude={"description"}) for name in decoder.known]
    count = len(decoder.targets)
    head: dict[str, Any] = (
        {"kind": "forecast", "targets": decoder.targets, "quantiles": decoder.head.quantiles}
        if isinstance(decoder.head, QuantilesHead)
        else {"kind": "dense", "units": 2 * count}
    )
    return {
        "name": spec.name,
        "events": {"timezone": schema.timezone, "fields": [*fields, *known]},
        "layers": [layer.model_dump() for layer in decoder.layers],
        "heads": [{"name": DISTRIBUTION, **head}],
    }


def _encoded_number(name: str) -> dict[str, Any]:
    return {"kind": "numeric", "name": name, "mean": 0.0, "std": 1.0}


def known_columns(spec: ModelSpec, decoder: DecoderSpec) -> tuple[str, ...]:
    """The encoder's columns that hold what a step network reads after the previous values."""
    schema = spec.events
    if schema is None:
        return ()
    names: list[str] = []
    if schema.timestamp is not None:
        names += [f"{schema.timestamp.name}.{feature}" for feature in CALENDAR]
    for name in decoder.known:
        names += [column.name for column in schema.columns if column.field == name]
    return tuple(names)


def known_schema(schema: EventSchema, decoder: DecoderSpec, *, timed: bool) -> EventSchema | None:
    """The schema of what a forecast is told of a coming step; None where there is nothing.

    Args:
        timed: whether the timestamp has to be there; otherwise it may be left out.
    """
    fields: list[Any] = [schema.field(name) for name in decoder.known]
    time = schema.timestamp
    if time is not None:
        told = TimestampField(name=time.name, optional=not timed, gap_mean=0.0, gap_std=1.0)
        fields.insert(0, told)
    return EventSchema(timezone=schema.timezone, fields=tuple(fields)) if fields else None


def strip_decoder_prefix(weights: Mapping[str, T]) -> dict[str, T]:
    """The step network's weights, under the names that its own specification gives them."""
    lead = f"{DECODER}."
    return {n.removeprefix(lead): value for n, value in weights.items() if n.startswith(lead)}


def add_decoder_prefix(weights: Mapping[str, T]) -> dict[str, T]:
    """The same the other way round: under the names that the whole model gives them."""
    return {f"{DECODER}.{name}": value for name, value in weights.items()}
