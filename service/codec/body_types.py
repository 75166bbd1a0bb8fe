"""The types of a model's request bodies, which decoders check while they decode.

The API document describes bodies by the types of JSON, so bounds, descriptions and examples are
written once. Each served model has its own types, because its events have their own schema and its
rows their own width. JSON and MessagePack differ in two members: `inputs` is a list of rows in JSON
and one binary string of float32 in MessagePack, and a `state_token` is base64 in JSON. Unknown
members are rejected, and nothing is converted: no number from a string, no integer from 48.0.
"""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple

import msgspec
from msgspec import Meta
from typing_extensions import TypeVar

from models.events.reader import EXPECTED, EventReader
from models.events.schema import EventSchema
from models.spec.decoder import known_schema
from models.spec.detection import MAX_ALARM_RATE
from models.spec.model import ModelSpec
from models.spec.stream_name import STREAM_NAME
from service.codec.decoding import MAX_MEMBERS, WRONG_LENGTH, invalid, undecoded_type
from service.codec.field_rules import (
    EPOCH,
    FINGERPRINT,
    MAX_FRAME_ID_CHARS,
    MAX_POSITION,
    VERSION_NAME,
)
from service.codec.media import Media
from service.codec.reply_types import (
    BY_PART,
    EXAMPLE_EPOCH,
    EXAMPLE_FINGERPRINT,
    EXAMPLE_STATE,
    EXAMPLE_STREAM,
    EXAMPLE_TAG,
    SINCE,
)
from service.codec.settings import Limit, ModelLimits
from service.core.errors import InvalidInput

NAMED_COLUMNS: Final = 8
"""How many columns an error names before it says `...`."""

NonNegativeInt = Annotated[int, Meta(ge=0, le=MAX_POSITION)]
StreamName = Annotated[
    str,
    Meta(
        description="The stream's name: 1 to 256 characters of `A-Z a-z 0-9 . _ : @ -`.",
        examples=[EXAMPLE_STREAM],
        extra_json_schema={"pattern": STREAM_NAME},
    ),
]
IfMatch = Annotated[
    str,
    Meta(
        description="As the header If-Match; a single ETag needs no quotes.",
        examples=[f"{EXAMPLE_EPOCH}-{EXAMPLE_TAG}"],
    ),
]
FrameId = (
    Annotated[str, Meta(max_length=MAX_FRAME_ID_CHARS)]
    | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
)
_VERSION_NAME: Final = "1 to 64 characters of A-Z a-z 0-9 . _ -"
_FRAME_ID: Final = f"an integer of 64 bits or a string of at most {MAX_FRAME_ID_CHARS} characters"

# The types that differ between models and media types; unless a body has parameters, they are Any.
Events = TypeVar("Events", default=Any)
Inputs = TypeVar("Inputs", default=Any)
Resets = TypeVar("Resets", default=Any)
Elements = TypeVar("Elements", default=list[Any])
Part = TypeVar("Part", default=Any)


class Body(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Base of every request body. A decoded one holds no cycles that would have to be collected."""


class StepsBody(Body, Generic[Events, Inputs, Resets]):
    """Events or rows: exactly one of the two."""

    events: Events | None = None
    inputs: Inputs | None = None
    resets: (
        Annotated[
            Resets,
            Meta(
                description="Ascending indexes of the events or rows before which the state is "
                "reset to the model's initial state; in events the member `reset` has the same "
                "effect.",
                examples=[[0, 12]],
            ),
        ]
        | None
    ) = None
    false_alarms_per_day: (
        Annotated[
            float,
            Meta(
                gt=0,
                le=MAX_ALARM_RATE,
                description="For a model with `detection`: the expected false alarms per stream "
                "and day, which set the threshold of the alarms of these events; by default the "
                "model's.",
                examples=[0.2],
            ),
        ]
        | None
    ) = None


class ChunkBody(StepsBody[Events, Inputs, Resets]):
    """One chunk of a stream."""

    position: (
        Annotated[
            NonNegativeInt,
            Meta(
                description="Index of the chunk's first event, for delivery exactly once. Without "
                "it the chunk is appended at the stream's current position, and a retry appends "
                "it again.",
                examples=[0],
            ),
        ]
        | None
    ) = None
    epoch: (
        Annotated[
            str,
            Meta(
                pattern=rf"^{EPOCH}\Z",
                description="The epoch of the stream that the client expects.",
                examples=[EXAMPLE_EPOCH],
                extra={EXPECTED: f"string matching ^{EPOCH}$"},
            ),
        ]
        | None
    ) = None
    final: Annotated[
        bool,
        Meta(
            description="For a model with `blocks`: no event follows; the waiting events are "
            "computed, and the stream is closed. A final chunk may be empty."
        ),
    ] = False
    dry_run: Annotated[
        bool,
        Meta(description="Compute the outputs from the stream's current state, and apply nothing."),
    ] = False


class ItemBody(ChunkBody[Events, Inputs, Resets], kw_only=True):
    """One chunk in a request for many streams."""

    stream: StreamName
    if_match: IfMatch | None = None


class FrameBody(ChunkBody[Events, Inputs, Resets]):
    """One chunk as the frame of a live socket."""

    id: Annotated[FrameId | None, Meta(extra={EXPECTED: _FRAME_ID})] = None
    stream: str | None = None
    if_match: IfMatch | None = None


class SequenceBody(StepsBody[Events, Inputs, Resets]):
    """A sequence to predict."""

    state_token: (
        Annotated[
            bytes,
            Meta(
                description="The `state_token` of a prediction, whose sequence this one continues.",
                extra={EXPECTED: "a state token, as it was returned"},
            ),
        ]
        | None
    ) = None


class ManyBody(Body, Generic[Elements]):
    """Chunks of many streams."""

    chunks: Elements
    """Each is an `ItemBody`, or not yet decoded."""


class PredictBody(Body, Generic[Elements]):
    """The whole sequences to predict."""

    sequences: Elements


class ForecastBody(Body, Generic[Events]):
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
    future: Events | None = None


class StateBody(Body, Generic[Part]):
    """What `GET .../state` gave. Only fingerprint, feed, position, state and since are
    read."""

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
    state: Annotated[
        dict[str, Part],
        Meta(max_length=MAX_MEMBERS, description=BY_PART, examples=[EXAMPLE_STATE]),
    ]
    model: str | None = None
    version: str | None = None
    stream: str | None = None
    epoch: str | None = None
    tag: str | None = None
    updated_ms: int | None = None
    since: Annotated[NonNegativeInt, Meta(description=SINCE)] | None = None


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


class RewindBody(Body):
    """The position to rewind to."""

    position: Annotated[
        NonNegativeInt, Meta(description="Events that stay consumed.", examples=[24])
    ]


class AcknowledgeBody(Body):
    """The position at which the alarm is acknowledged; by default any."""

    position: (
        Annotated[NonNegativeInt, Meta(description="Of the stream.", examples=[48])] | None
    ) = None


class VersionBody(Body):
    """The version to load."""

    path: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=1024,
            description="Folder of its artifact, inside the folder of the models.",
            examples=["flights/2026-11-30"],
        ),
    ]
    label: (
        Annotated[
            str,
            Meta(
                description="A readable name, unique among the versions of the model.",
                examples=["nightly-2026-11-30"],
                pattern=VERSION_NAME,
                extra={EXPECTED: _VERSION_NAME},
            ),
        ]
        | None
    ) = None


class AliasBody(Body):
    """A change of the aliases."""

    action: Annotated[
        Literal["shadow", "canary", "promote", "rollback"],
        Meta(
            description="`shadow`: the version computes beside the champion; `canary`: it also "
            "answers a share of the streams; `promote`: it becomes the champion, and the old one "
            "its shadow; `rollback`: the reverse of the last promotion.",
            extra={EXPECTED: "'shadow', 'canary', 'promote' or 'rollback'"},
        ),
    ]
    version: (
        Annotated[
            str,
            Meta(
                description="Its label, or the first digits of its fingerprint; none for "
                "`rollback`.",
                pattern=VERSION_NAME,
                extra={EXPECTED: _VERSION_NAME},
            ),
        ]
        | None
    ) = None
    share: (
        Annotated[
            float,
            Meta(gt=0, le=1, description="Of the streams that a `canary` answers."),
        ]
        | None
    ) = None
    force: Annotated[
        bool, Meta(description="Whether it may answer streams that it would reject.")
    ] = False


class BodyTypes(NamedTuple):
    """The types of the bodies for one model in one media type."""

    chunk: type[ChunkBody]
    item: type[ItemBody]
    frame: type[FrameBody]
    items: type[ManyBody[list[ItemBody]]]
    undecoded_items: type[ManyBody]
    predict: type[PredictBody[list[SequenceBody]]]
    state: type[StateBody]
    forecast: Any
    """A `ForecastBody`; None for a model without a decoder."""


def known_future_schema(spec: ModelSpec) -> EventSchema | None:
    """The schema of the known future covariates of a step; None if the model has none."""
    decoder = spec.decoder
    if decoder is None or spec.events is None:
        return None
    return known_schema(spec.events, decoder, timed=False)


def build_body_types(
    spec: ModelSpec,
    limits: ModelLimits,
    media: Media,
    events: EventReader | None,
    future: EventReader | None,
) -> BodyTypes:
    """Build the types of one model's bodies.

    Args:
        events, future: the readers of its events and of the known future covariates; None if it
            has none.
    """
    chunk = _steps_types(spec, limits.chunk, media, events)
    item = _bind_parameters(ItemBody, *chunk)
    sequence = _bind_parameters(SequenceBody, *_steps_types(spec, limits.sequence, media, events))
    undecoded: Any = undecoded_type(media)
    forecast = None
    if (decoder := spec.decoder) is not None:
        known: Any = None
        if future is not None:
            about = "The known future covariates of each step, as many as `horizon`."
            known = _bounded_list(future.event, decoder.max_horizon, description=about)
        forecast = _bind_parameters(ForecastBody, known)
    return BodyTypes(
        _bind_parameters(ChunkBody, *chunk),
        item,
        _bind_parameters(FrameBody, *chunk),
        _bind_parameters(ManyBody, _bounded_list(item, limits.items)),
        _bind_parameters(ManyBody, _bounded_list(undecoded, limits.items)),
        _bind_parameters(PredictBody, _bounded_list(sequence, limits.items)),
        _bind_parameters(StateBody, undecoded),
        forecast,
    )


def _steps_types(
    spec: ModelSpec, limit: Limit, media: Media, events: EventReader | None
) -> tuple[Any, Any, Any]:
    """The types of events, inputs and resets."""
    wrong_length = {WRONG_LENGTH: limit.exceeded}
    no_schema = f"nothing, since model {spec.name} has no event schema (send inputs)"
    of_events: Any = Annotated[None, Meta(extra={EXPECTED: no_schema})]
    if events is not None:
        about = "Events under the model's schema."
        bounded = Meta(max_length=limit.steps, description=about, extra=wrong_length)
        of_events = Annotated[list[events.event], bounded]  # type: ignore[name-defined]
    inputs: Any = bytes
    if media is Media.JSON:
        features = spec.input_features
        width = Meta(
            min_length=features, max_length=features, extra={WRONG_LENGTH: wrong_width(spec)}
        )
        columns = ", ".join(column.name for column in spec.columns[:64])
        bounded = Meta(
            max_length=limit.steps,
            description=f"Rows of {features} values, in place of events: {columns}. In MessagePack "
            "one binary string of float32, little-endian, row by row.",
            extra=wrong_length,
        )
        inputs = Annotated[list[Annotated[list[float], width]], bounded]
    return of_events, inputs, Annotated[list[NonNegativeInt], Meta(max_length=limit.steps)]


def _bounded_list(element: Any, limit: int, **described: Any) -> Any:
    """The type of a list of at most `limit` elements."""

    def too_many(at: str, got: int) -> InvalidInput:
        return InvalidInput(
            f"{at}: expected at most {limit} items, got {got}", at=at, expected=limit, got=got
        )

    return Annotated[
        list[element], Meta(max_length=limit, extra={WRONG_LENGTH: too_many}, **described)
    ]


def _bind_parameters(body: Any, *parameters: Any) -> Any:
    """A body with its parameters as a type of its own, for which msgspec is faster."""
    name = body.__name__.removesuffix("Body")
    documented = {"__doc__": body.__doc__}
    return new_class(name, (body[parameters],), exec_body=lambda own: own.update(documented))


def wrong_width(spec: ModelSpec) -> Callable[[str, int | str], InvalidInput]:
    """Makes the error for a row of the wrong width, at a place."""
    names = [column.name for column in spec.columns]
    more = ", ..." if len(names) > NAMED_COLUMNS else ""
    expected = f"rows of {len(names)} values ({', '.join(names[:NAMED_COLUMNS])}{more})"
    return lambda at, got: invalid(at, expected, str(got))
