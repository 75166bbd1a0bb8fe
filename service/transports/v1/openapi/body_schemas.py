"""The request bodies of each model, as the API document describes them.

The types that decode bodies are those of `service.codec.body_types`; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.json_schema import SkipJsonSchema

from models.events.parse import event_type
from models.spec.detection import MAX_ALARM_RATE
from service.codec.body_types import known_future_schema
from service.codec.field_rules import EPOCH, MAX_POSITION
from service.codec.model import CodecModel
from service.codec.schema_fields import (
    EXAMPLE_EPOCH,
    EXAMPLE_STREAM,
    EXAMPLE_TAG,
    FeedName,
    Fingerprint,
    PositionNumber,
    StateValues,
)
from service.codec.settings import RequestSettings
from service.core.values import STREAM_NAME

Resets = list[Annotated[int, Field(ge=0, le=MAX_POSITION)]]


class RequestBody(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="forbid")


class StepsBody(RequestBody):
    """Events or rows: exactly one of the two."""

    events: list[dict[str, Any]] | None = None
    inputs: Any = None
    resets: Resets | None = Field(
        None,
        description="Ascending indexes of the events or rows before which the state is reset to "
        "the model's initial state; in events the member `reset` has the same effect.",
        examples=[[0, 12]],
    )
    false_alarms_per_day: Annotated[float, Field(gt=0, le=MAX_ALARM_RATE)] | None = Field(
        None,
        description="For a model with `detection`: the expected false alarms per stream and day, "
        "which set the threshold of the alarms of these events; by default the model's.",
        examples=[0.2],
    )


class SequenceBody(StepsBody):
    """A sequence to predict."""

    state_token: Any = None


class ChunkBody(StepsBody):
    """One chunk of the stream that the address names."""

    position: Annotated[int, Field(ge=0, le=MAX_POSITION)] | None = Field(
        None,
        description="Index of the chunk's first event, for delivery exactly once. Without it "
        "the chunk is appended at the stream's current position, and a retry appends it again.",
        examples=[0],
    )
    epoch: Annotated[str, Field(pattern=f"^{EPOCH}$")] | None = Field(
        None,
        description="The epoch of the stream that the client expects.",
        examples=[EXAMPLE_EPOCH],
    )
    final: bool = Field(
        False,
        description="For a model with `blocks`: no event follows; the waiting events are computed, "
        "and the stream is closed. A final chunk may be empty.",
    )
    dry_run: bool = Field(
        False,
        description="Compute the outputs from the stream's current state, and apply nothing.",
    )


class ItemBody(ChunkBody):
    """One chunk in a request for many streams."""

    stream: str = Field(
        description="The stream's name: 1 to 256 characters of `A-Z a-z 0-9 . _ : @ -`.",
        examples=[EXAMPLE_STREAM],
        json_schema_extra={"pattern": STREAM_NAME},
    )
    if_match: str | None = Field(
        None,
        description="As the header If-Match; a single ETag needs no quotes.",
        examples=[f"{EXAMPLE_EPOCH}-{EXAMPLE_TAG}"],
    )


class ManyBody(RequestBody):
    """Chunks of many streams."""

    chunks: list[ItemBody]


class PredictBody(RequestBody):
    """Whole sequences."""

    sequences: list[SequenceBody]


class ForecastBody(RequestBody):
    """The horizon of a forecast, and the known future covariates."""

    horizon: Annotated[int, Field(ge=1, le=MAX_POSITION)] = Field(
        description="Steps ahead.", examples=[24]
    )
    samples: Annotated[int, Field(ge=0, le=MAX_POSITION)] = Field(
        0, description="Paths to draw.", examples=[100]
    )
    seed: Annotated[int, Field(ge=0, le=MAX_POSITION)] = Field(
        0, description="Of the draws: the same seed gives the same paths of the same state."
    )
    position: Annotated[int, Field(ge=0, le=MAX_POSITION)] | None = Field(
        None, description="The position that the stream is expected to have.", examples=[48]
    )
    future: list[dict[str, Any]] | None = None


class StateBody(RequestBody):
    """What `GET .../state` gave. Only fingerprint, feed, position and state are read."""

    fingerprint: Fingerprint
    feed: FeedName
    position: PositionNumber
    state: StateValues
    model: str | None = None
    version: str | None = None
    stream: str | None = None
    epoch: str | None = None
    tag: str | None = None
    updated_ms: int | None = None


class ForkBody(RequestBody):
    """The stream to begin."""

    to: str = Field(
        description="Name of the new stream.",
        examples=[f"{EXAMPLE_STREAM}:what-if"],
        json_schema_extra={"pattern": STREAM_NAME},
    )


B = TypeVar("B", bound=RequestBody)


@dataclass(frozen=True, slots=True)
class BodySchemas:
    """The bodies of one model."""

    chunk: type[ChunkBody]
    item: type[ItemBody]
    sequence: type[SequenceBody]
    many: type[ManyBody]
    predict: type[PredictBody]
    forecast: type[ForecastBody] | None


def build_body_schemas(served: CodecModel, limits: RequestSettings) -> BodySchemas:
    """Build the types of one model's bodies."""
    steps: dict[str, Any] = {
        "events": (_events(served, limits), _steps_field(served, "events", limits)),
        "inputs": (_inputs(served, limits), _steps_field(served, "inputs", limits)),
    }
    name = served.name
    feeds = ["inputs"] if served.events is None else ["events", "inputs"]
    one_of = {"oneOf": [{"required": [feed]} for feed in feeds]}

    def build(kind: type[B], title: str, **more: Any) -> type[B]:
        return create_model(
            f"{name}-{title}",
            __base__=kind,
            __cls_kwargs__={"json_schema_extra": one_of},
            **steps,
            **more,
        )

    token = Field(
        None,
        description="The `state_token` of a prediction, whose sequence this one continues.",
    )
    item = build(ItemBody, "Item")
    sequence = build(SequenceBody, "Sequence", state_token=(str | None, token))
    chunk = build(ChunkBody, "Chunk")
    most: dict[str, Any] = {"maxItems": limits.max_items}
    many = create_model(
        f"{name}-Many",
        __base__=ManyBody,
        chunks=(list[item], Field(json_schema_extra=most)),  # type: ignore[valid-type]
    )
    predict = create_model(
        f"{name}-Predict",
        __base__=PredictBody,
        sequences=(list[sequence], Field(json_schema_extra=most)),  # type: ignore[valid-type]
    )
    return BodySchemas(chunk, item, sequence, many, predict, _forecast(served, limits, f"{name}-"))


def _forecast(served: CodecModel, limits: RequestSettings, lead: str) -> type[ForecastBody] | None:
    decoder = served.spec.decoder
    if decoder is None:
        return None
    schema = known_future_schema(served)
    future: Any = None
    if schema is not None:
        event: Any = event_type(schema, f"{lead}Coming")
        most: dict[str, Any] = {"minItems": 1, "maxItems": decoder.max_horizon}
        future = Annotated[list[event], Field(json_schema_extra=most)] | None
    about = "The known future covariates of each step, as many as `horizon`."
    ranges = {
        "horizon": {"maximum": decoder.max_horizon},
        "samples": {"maximum": limits.max_forecast_samples},
    }

    def add_ranges(schema: dict[str, Any]) -> None:
        for name, range_ in ranges.items():
            schema["properties"][name].update(range_)

    return create_model(
        f"{lead}Forecast",
        __base__=ForecastBody,
        __cls_kwargs__={"json_schema_extra": add_ranges},
        future=(future, Field(None, description=about)),
    )


def _events(served: CodecModel, limits: RequestSettings) -> Any:
    if served.events is None:
        hidden: Any = SkipJsonSchema
        return hidden[Any]
    event: Any = event_type(served.events, f"{served.name}-Event", marks_resets=True)
    return Annotated[list[event], Field(json_schema_extra=_lengths(limits))] | None


def _inputs(served: CodecModel, limits: RequestSettings) -> Any:
    features = served.spec.input_features
    width = {"minItems": features, "maxItems": features}
    row = Annotated[list[float], Field(json_schema_extra=width)]
    return Annotated[list[row], Field(json_schema_extra=_lengths(limits))] | None


def _lengths(limits: RequestSettings) -> dict[str, Any]:
    return {"minItems": 1, "maxItems": limits.max_chunk_steps}


def _steps_field(served: CodecModel, name: str, limits: RequestSettings) -> Any:
    if name == "events":
        return Field(None, description="Events under the model's schema.")
    columns = ", ".join(column.name for column in served.spec.columns[:64])
    return Field(
        None,
        description=f"Rows of {served.spec.input_features} values, in place of events: {columns}. "
        "In "
        "MessagePack one binary string of float32, little-endian, row by row.",
    )
