"""The types of a model's request bodies, which decoders check while they decode.

The API document describes bodies by the types of JSON, so bounds, descriptions and examples are
written once. Each served model has its own types, because its events have their own schema and its
rows their own width. JSON and MessagePack differ in two members: `inputs` is a list of rows in JSON
and one binary string of float32 in MessagePack, and a `state_token` is base64 in JSON. Unknown
members are rejected, and nothing is converted: no number from a string, no integer from 48.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from models.events.reader import EXPECTED, EventReader
from models.events.schema import EventSchema
from models.spec.decoder import known_schema
from models.spec.detection import MAX_ALARM_RATE
from service.codec.decoding import WRONG_LENGTH, invalid, undecoded_type
from service.codec.field_rules import EPOCH, FINGERPRINT, MAX_FRAME_ID_CHARS, MAX_POSITION
from service.codec.limits import Limit
from service.codec.media import Media
from service.codec.model import CodecModel
from service.codec.schema_fields import (
    BY_PART,
    EXAMPLE_EPOCH,
    EXAMPLE_FINGERPRINT,
    EXAMPLE_STATE,
    EXAMPLE_STREAM,
    EXAMPLE_TAG,
)
from service.codec.settings import RequestSettings
from service.core.errors import CarryError, InvalidInput
from service.core.values import STREAM_NAME

NAMED_COLUMNS: Final = 8
"""How many columns an error names before it says `...`."""

NonNegativeInt = Annotated[int, Meta(ge=0, le=MAX_POSITION)]
Epoch = Annotated[
    str,
    Meta(
        pattern=rf"^{EPOCH}\Z",
        description="The epoch of the stream that the client expects.",
        examples=[EXAMPLE_EPOCH],
        extra={EXPECTED: f"string matching ^{EPOCH}$"},
    ),
]
AlarmRate = Annotated[
    float,
    Meta(
        gt=0,
        le=MAX_ALARM_RATE,
        description="For a model with `detection`: the expected false alarms per stream and day, "
        "which set the threshold of the alarms of these events; by default the model's.",
        examples=[0.2],
    ),
]
FrameId = (
    Annotated[str, Meta(max_length=MAX_FRAME_ID_CHARS)]
    | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
)
_FRAME_ID: Final = f"an integer of 64 bits or a string of at most {MAX_FRAME_ID_CHARS} characters"


_POSITION: Final = Meta(
    description="Index of the chunk's first event, for delivery exactly once. Without it the chunk "
    "is appended at the stream's current position, and a retry appends it again.",
    examples=[0],
)
_FINAL: Final = Meta(
    description="For a model with `blocks`: no event follows; the waiting events are computed, and "
    "the stream is closed. A final chunk may be empty."
)
_DRY_RUN: Final = Meta(
    description="Compute the outputs from the stream's current state, and apply nothing."
)
_ITEM_STREAM: Final = Meta(
    description="The stream's name: 1 to 256 characters of `A-Z a-z 0-9 . _ : @ -`.",
    examples=[EXAMPLE_STREAM],
    extra_json_schema={"pattern": STREAM_NAME},
)
_IF_MATCH: Final = Meta(
    description="As the header If-Match; a single ETag needs no quotes.",
    examples=[f"{EXAMPLE_EPOCH}-{EXAMPLE_TAG}"],
)
_STATE_TOKEN: Final = Meta(
    description="The `state_token` of a prediction, whose sequence this one continues."
)
_STATE: Final = Meta(description=BY_PART, examples=[EXAMPLE_STATE])
_RESETS: Final = (
    "Ascending indexes of the events or rows before which the state is reset to the model's "
    "initial state; in events the member `reset` has the same effect."
)


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, gc=False):
    """Base of every request body; an absent member is None."""


class StepsBody(Body):
    """Events or rows: exactly one of the two."""

    events: Any
    inputs: Any
    resets: list[NonNegativeInt] | None
    false_alarms_per_day: AlarmRate | None


class ChunkBody(StepsBody):
    """One chunk of a stream."""

    position: int | None
    epoch: str | None
    final: bool
    dry_run: bool


class ItemBody(ChunkBody):
    """One chunk in a request for many streams."""

    stream: str
    if_match: str | None


class FrameBody(ChunkBody):
    """One chunk as the frame of a live socket."""

    id: str | int | None
    stream: str | None
    if_match: str | None


class SequenceBody(StepsBody):
    """A sequence to predict; its token is a string in JSON."""

    state_token: str | bytes | None


class ManyBody(Body):
    """Chunks of many streams."""

    chunks: list[Any]
    """Each is an `ItemBody`, or not yet decoded."""


class PredictBody(Body):
    """The whole sequences to predict."""

    sequences: list[SequenceBody]


class ForecastBody(Body):
    """The horizon of a forecast, and the known future covariates."""

    horizon: Annotated[int, Meta(ge=1, le=MAX_POSITION, description="Steps ahead.", examples=[24])]
    samples: Annotated[NonNegativeInt, Meta(description="Paths to draw.", examples=[100])] = 0
    seed: Annotated[
        NonNegativeInt,
        Meta(description="Of the draws: the same seed gives the same paths of the same state."),
    ] = 0
    position: (
        Annotated[
            NonNegativeInt,
            Meta(description="The position that the stream is expected to have.", examples=[48]),
        ]
        | None
    ) = None
    future: Any = None


class StateBody(Body):
    """What `GET .../state` gave. Only fingerprint, feed, position and state are read."""

    fingerprint: Annotated[
        str,
        Meta(
            pattern=rf"^{FINGERPRINT}\Z",
            description="Hash of what determines the model's numbers.",
            examples=[EXAMPLE_FINGERPRINT],
            extra={EXPECTED: f"string matching ^{FINGERPRINT}$"},
        ),
    ]
    feed: Annotated[
        Literal["events", "inputs"],
        Meta(
            description="How the stream is fed, since its first chunk.",
            extra={EXPECTED: "'events' or 'inputs'"},
        ),
    ]
    position: Annotated[int, Meta(ge=0, le=2**62, description="Events consumed.", examples=[48])]
    state: Annotated[dict[str, Any], _STATE]
    model: str | None = None
    version: str | None = None
    stream: str | None = None
    epoch: str | None = None
    tag: str | None = None
    updated_ms: int | None = None


class ForkBody(Body):
    """The stream to begin."""

    to: Annotated[
        str,
        Meta(
            description="Name of the new stream.",
            examples=[f"{EXAMPLE_STREAM}:what-if"],
            extra_json_schema={"pattern": STREAM_NAME},
        ),
    ]


class FrameEnvelope(msgspec.Struct, gc=False):
    """The members of a frame by which its error is answered, undecoded."""

    id: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()


class BodyTypes(NamedTuple):
    """The types of the bodies for one model in one media type."""

    chunk: type[ChunkBody]
    item: type[ItemBody]
    frame: type[FrameBody]
    items: type[ManyBody]
    undecoded_items: type[ManyBody]
    predict: type[PredictBody]
    state: type[StateBody]
    forecast: type[ForecastBody] | None


class BodyLimits(NamedTuple):
    """The limits of a model: on the steps of a chunk, of a sequence and of all sequences of a
    request, and on items."""

    chunk: Limit
    sequence: Limit
    predict: Limit
    items: int

    @classmethod
    def of(cls, limits: RequestSettings, chunk_limit: int | None) -> BodyLimits:
        """Those of a model that computes chunks of at most `chunk_limit` steps (None: any)."""
        predict = Limit(limits.max_predict_steps, "max_predict_steps")
        longest = [] if chunk_limit is None else [Limit(chunk_limit, "max_chunk_steps")]
        chunk = Limit(limits.max_chunk_steps, "max_chunk_steps")
        return cls(chunk, min([predict, *longest]), predict, limits.max_items)


def known_future_schema(model: CodecModel) -> EventSchema | None:
    """The schema of the known future covariates of a step; None if the model has none."""
    decoder = model.spec.decoder
    if decoder is None or model.events is None:
        return None
    return known_schema(model.events, decoder, timed=False)


def build_body_types(
    model: CodecModel,
    limits: BodyLimits,
    media: Media,
    events: EventReader | None,
    future: EventReader | None,
) -> BodyTypes:
    """Build the types of one model's bodies.

    Args:
        events, future: the readers of its events and of the known future covariates; None if it
            has none.
    """
    chunk_members: list[Any] = [
        ("position", Annotated[NonNegativeInt, _POSITION] | None, None),
        ("epoch", Epoch | None, None),
        ("final", Annotated[bool, _FINAL], False),
        ("dry_run", Annotated[bool, _DRY_RUN], False),
    ]
    of_chunk = _steps_members(model, limits.chunk, media, events) + chunk_members
    if_match = ("if_match", Annotated[str, _IF_MATCH] | None, None)
    of_item = [*of_chunk, ("stream", Annotated[str, _ITEM_STREAM]), if_match]
    described = Annotated[FrameId | None, Meta(extra={EXPECTED: _FRAME_ID})]
    of_frame = [*of_chunk, ("id", described, None), ("stream", str | None, None)]
    token: Any = str if media is Media.JSON else bytes
    of_sequence = _steps_members(model, limits.sequence, media, events)
    of_sequence.append(("state_token", Annotated[token, _STATE_TOKEN] | None, None))
    item = _struct(ItemBody, of_item)
    sequence = _struct(SequenceBody, of_sequence)
    too_many = Meta(max_length=limits.items, extra={WRONG_LENGTH: _too_many(limits.items)})
    element: Any = undecoded_type(media)
    return BodyTypes(
        _struct(ChunkBody, of_chunk),
        item,
        _struct(FrameBody, [*of_frame, if_match]),
        _struct(ManyBody, [("chunks", Annotated[list[item], too_many])]),  # type: ignore[valid-type]
        _struct(ManyBody, [("chunks", Annotated[list[element], too_many])]),
        _struct(PredictBody, [("sequences", Annotated[list[sequence], too_many])]),  # type: ignore[valid-type]
        _struct(StateBody, [("state", Annotated[dict[str, element], _STATE])]),
        _forecast(model, future),
    )


def _steps_members(
    model: CodecModel, limit: Limit, media: Media, events: EventReader | None
) -> list[Any]:
    """The members of a chunk or a sequence."""
    wrong_length = {WRONG_LENGTH: limit.exceeded}
    of_events: Any = Annotated[
        None,
        Meta(
            extra={EXPECTED: f"nothing, since model {model.name} has no event schema (send inputs)"}
        ),
    ]
    if events is not None:
        bounded = Meta(
            max_length=limit.steps,
            description="Events under the model's schema.",
            extra=wrong_length,
        )
        of_events = Annotated[list[events.event], bounded] | None  # type: ignore[name-defined]
    inputs: Any = bytes
    if media is Media.JSON:
        features = model.spec.input_features
        width = Meta(
            min_length=features, max_length=features, extra={WRONG_LENGTH: wrong_width(model)}
        )
        columns = ", ".join(column.name for column in model.spec.columns[:64])
        bounded = Meta(
            max_length=limit.steps,
            description=f"Rows of {features} values, in place of events: {columns}. In MessagePack "
            "one binary string of float32, little-endian, row by row.",
            extra=wrong_length,
        )
        inputs = Annotated[list[Annotated[list[float], width]], bounded]
    resets = Meta(max_length=limit.steps, description=_RESETS, examples=[[0, 12]])
    return [
        ("events", of_events, None),
        ("inputs", inputs | None, None),
        ("resets", Annotated[list[NonNegativeInt], resets] | None, None),
        ("false_alarms_per_day", AlarmRate | None, None),
    ]


def _forecast(model: CodecModel, future: EventReader | None) -> type[ForecastBody] | None:
    decoder = model.spec.decoder
    if decoder is None:
        return None
    steps: Any = None
    if future is not None:
        max_steps = decoder.max_horizon
        too_many = Meta(
            max_length=max_steps,
            description="The known future covariates of each step, as many as `horizon`.",
            extra={WRONG_LENGTH: _too_many(max_steps)},
        )
        steps = Annotated[list[future.event], too_many] | None  # type: ignore[name-defined]
    kind: type[ForecastBody] = _struct(ForecastBody, [("future", steps, None)])
    return kind


def _struct(base: type[Any], members: list[Any]) -> Any:
    # gc=False: a decoded body holds no cycles to collect
    return msgspec.defstruct(
        base.__name__.removesuffix("Body"),
        members,
        bases=(base,),
        namespace={"__doc__": base.__doc__},
        forbid_unknown_fields=True,
        kw_only=True,
        gc=False,
    )


def _too_many(limit: int) -> Callable[[str, int], CarryError]:
    return lambda at, got: too_many_elements(at, limit, got)


def too_many_elements(at: str, limit: int, got: int) -> InvalidInput:
    """The error for a list with too many elements."""
    return InvalidInput(
        f"{at}: expected at most {limit} items, got {got}", at=at, expected=limit, got=got
    )


def wrong_width(model: CodecModel) -> Callable[[str, int | str], InvalidInput]:
    """Makes the error for a row of the wrong width, at a place."""
    names = [column.name for column in model.spec.columns]
    more = ", ..." if len(names) > NAMED_COLUMNS else ""
    expected = f"rows of {len(names)} values ({', '.join(names[:NAMED_COLUMNS])}{more})"
    return lambda at, got: invalid(at, expected, str(got))
