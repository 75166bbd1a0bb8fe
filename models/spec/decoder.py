"""Specification of the decoder of an encoder/decoder model.

The encoder consists of the model's layers: it consumes events, and its state is the stream's state.
The decoder starts from a copy of that state and forecasts one step at a time:

    step(previous values [B,D], known future covariates of the step [B,K], state [B,M])
        -> (distribution parameters of the step's values [B,P], state' [B,M])

Its values are fed back as the previous values of the next step (Sutskever et al. 2014; Cho et al.
2014). Encoder and decoder read encoded columns: targets standardised, categories as codes.

One decoder step is a small network with a specification of its own (`network_data`), from which
runtimes, weights and state layout are derived as for any other network.
`models.decoding.forecasts` computes the values around a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from models.events.schema import (
    EventSchema,
    FieldName,
    Frozen,
    NumericField,
    TimestampField,
)
from models.spec.layers import Cell, Layer, LayerName

if TYPE_CHECKING:
    from models.spec.model import ModelSpec

T = TypeVar("T")

DECODER = "decoder"
"""Name of the decoder's section and graph, and prefix of its weights."""
LAST = "decoder.last"
"""State part float32 [D]: the last observed encoded value of each target; 0 (the mean) if none was
observed yet. It is the first input of the decoder."""
DISTRIBUTION = "distribution"
"""Name of the only head of the step network."""
MEDIAN = 0.5
Quantile = Annotated[float, Field(gt=0, lt=1)]


class _DistributionHead(Frozen):
    """Quantiles of a forecast; the median is the point forecast."""

    quantiles: Annotated[tuple[Quantile, ...], Field(min_length=2)] = (0.1, MEDIAN, 0.9)

    @model_validator(mode="after")
    def _check_quantiles(self) -> _DistributionHead:
        levels = list(self.quantiles)
        if levels != sorted(set(levels)) or MEDIAN not in levels:
            raise ValueError(f"expected rising quantiles with {MEDIAN} among them, got {levels}")
        return self


class QuantilesHead(_DistributionHead):
    """The network predicts the quantiles of each target directly."""

    kind: Literal["quantiles"] = "quantiles"


class GaussianHead(_DistributionHead):
    """The network predicts mean and log deviation of each target, independently."""

    kind: Literal["gaussian"] = "gaussian"


DistributionHead = QuantilesHead | GaussianHead


class DecoderSpec(Frozen):
    """The section `decoder` of a specification.

    The initial state of a layer with `starts_from` is the state of that encoder layer; in the file
    it is an option of the layer, here it is collected in `starts_from`. Other recurrent layers
    start from the zero state.

    Attributes:
        targets: D numeric event fields that are forecast and fed back.
        known: event fields that are known future covariates, besides the timestamp's calendar.
        step_s: seconds between two timestamps; without it, a forecast request must contain the
            timestamps of the future steps.
        layers: their input `features` has the previous values, calendar, and known covariates.
        starts_from: decoder layer -> encoder layer.
        head: the predictive distribution.
        max_horizon: largest number of steps of a forecast.
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
        """Milliseconds between two timestamps; None if they are irregular."""
        return None if self.step_s is None else round(self.step_s * 1000)


class DecoderTraining(Frozen):
    """Training options of a decoder; see `models.training.decoder_training`.

    Attributes:
        horizon: number of steps that the decoder is unrolled; `max_horizon` by default.
        anchor_steps: events between two forecast origins in a window.
        feedback: schedule of scheduled sampling, the share of true values that are fed back;
            `teacher` is pure teacher forcing.
        half_at: share of the training (of all `epochs`) after which the share is one half.
        floor: smallest share of true values.
    """

    horizon: Annotated[int, Field(ge=1, le=10_000)] | None = None
    anchor_steps: Annotated[int, Field(ge=1, le=4096)] = 12
    feedback: Literal["teacher", "inverse_sigmoid", "linear"] = "inverse_sigmoid"
    half_at: Annotated[float, Field(gt=0, le=1)] = 0.5
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0


def collect_starts_from(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Move the `starts_from` of each layer into that of the section, in plain data.

    Args:
        decoder: the section, with resolved layer names.
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
    """Check the section against the rest of the specification; raises ValueError."""
    if spec.events is None:
        raise ValueError("decoder: targets are event fields, and the model has no `events`")
    if decoder.step_s is not None and spec.events.timestamp is None:
        raise ValueError("decoder.step_s: it is between timestamps, and no field is a timestamp")
    for name in (*(layer.name for layer in spec.layers), *(head.name for head in spec.heads)):
        if name == DECODER:
            raise ValueError(f"decoder: expected no layer or head of that name, got {name!r}")
    _check_fields(spec.events, decoder)
    for layer in decoder.layers:
        if not (isinstance(layer, Cell) or layer.is_stepwise):
            raise ValueError(
                f"decoder: layer {layer.name!r}: expected a layer that works step by step, not a "
                f"bidirectional, conv1d or attention one, got {layer.kind}"
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
                f"decoder.known: {name!r} is a target; expected a field that is not forecast"
            )
        if kinds[name] == "timestamp":
            raise ValueError(f"decoder.known: the timestamp {name!r} need not be named")
    for name in (*decoder.targets, *decoder.known):
        field = schema.field(name)
        if isinstance(field, NumericField) and field.has_statistics:
            raise ValueError(
                f"decoder: expected fields without `normalisation` and `season_events`, {name!r} "
                "has one: their statistics are those of observed events"
            )


def _check_starts(spec: ModelSpec, decoder: DecoderSpec) -> None:
    own = {layer.name: layer for layer in decoder.layers}
    encoder = {
        layer.name: layer
        for layer in spec.layers
        if isinstance(layer, Cell) and layer.starts_from is None
    }
    for name, source in decoder.starts_from.items():
        layer = own.get(name)
        if not isinstance(layer, Cell):
            raise ValueError(
                f"decoder: starts_from: expected recurrent layers of the decoder, got {name!r}"
            )
        if source not in encoder:
            raise ValueError(
                f"decoder: layer {name!r} starts from {source!r}, expected one of the encoder's "
                f"layers that keep a state: {sorted(encoder)}"
            )
        if layer.returned_state != encoder[source].returned_state:
            raise ValueError(
                f"decoder: layer {name!r} starts from {source!r}: expected the same kind and "
                f"units, got {_describe(layer)} and {_describe(encoder[source])}"
            )
    if not decoder.starts_from:
        raise ValueError(
            "decoder.layers: expected at least one layer with `starts_from`, naming one of the "
            f"encoder's: {sorted(encoder)}"
        )


def _describe(layer: Cell) -> str:
    width = layer.returned_state["hidden"]
    projected = "" if width == layer.units else f" to {width}"
    return f"{layer.kind} of {layer.units}{projected}"


def network_data(spec: ModelSpec, decoder: DecoderSpec) -> dict[str, Any]:
    """The specification of the network of one decoder step, as plain data.

    Its rows contain the D previous values, the calendar features of the step if there is a
    timestamp, and the columns of the known covariates. All are encoded already, so numbers have
    mean 0 and deviation 1.
    """
    schema = spec.events
    if schema is None:
        raise ValueError("decoder: expected `events`")
    used = {field.name for field in schema.fields}
    fields: list[dict[str, Any]] = [_encoded_number(name) for name in decoder.targets]
    if schema.timestamp is not None:
        for feature in schema.timestamp.calendar_features:
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
    """The encoder's columns of calendar features and known covariates."""
    schema = spec.events
    if schema is None:
        return ()
    names: list[str] = []
    if schema.timestamp is not None:
        # the gap is the same at every step
        time = schema.timestamp
        names += [f"{time.name}.{feature}" for feature in time.calendar_features]
    for name in decoder.known:
        names += [column.name for column in schema.columns if column.field == name]
    return tuple(names)


def known_schema(schema: EventSchema, decoder: DecoderSpec, *, timed: bool) -> EventSchema | None:
    """The schema of the known future covariates of a step; None if there are none.

    Args:
        timed: whether the timestamp is required.
    """
    fields: list[Any] = [schema.field(name) for name in decoder.known]
    time = schema.timestamp
    if time is not None:
        timestamp = TimestampField(
            name=time.name,
            optional=not timed,
            gap_mean=0.0,
            gap_std=1.0,
            calendar=time.calendar,
        )
        fields.insert(0, timestamp)
    return EventSchema(timezone=schema.timezone, fields=tuple(fields)) if fields else None


def strip_decoder_prefix(weights: Mapping[str, T]) -> dict[str, T]:
    """The weights of the step network, without the prefix that they have in the model."""
    prefix = f"{DECODER}."
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def add_decoder_prefix(weights: Mapping[str, T]) -> dict[str, T]:
    """The weights of a step network, with the prefix that they have in the model."""
    return {f"{DECODER}.{name}": value for name, value in weights.items()}
