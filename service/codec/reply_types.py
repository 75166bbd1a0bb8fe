"""Types of the replies to chunks, predictions and forecasts, which the writer builds and the API
document describes, and their members, which other documents have too.

They are dictionaries when the service runs, so that a reply costs nothing more than its encoding.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import ConfigDict, Field, GetPydanticSchema, with_config
from typing_extensions import TypedDict

from models.spec.stream_name import STREAM_NAME
from service.codec.field_rules import EPOCH, FINGERPRINT, TAG

EXAMPLE_STREAM: Final = "EWR-UA"
EXAMPLE_EPOCH: Final = "5f0c1e7ab2d34896"
EXAMPLE_TAG: Final = "c2a94d0b71e65f3889d1046be7a2f35c"
EXAMPLE_VERSION: Final = "9c04e2d1b8a7"
EXAMPLE_FINGERPRINT: Final = "9c04e2d1b8a75f6631c2d4e8f9a0b7c6"
EXAMPLE_STATE: Final = {"lstm_1.hidden": [0.12, -0.4], "lstm_1.carry": [0.3, -0.91]}

StreamName = Annotated[str, Field(pattern=STREAM_NAME, examples=[EXAMPLE_STREAM])]
ModelName = Annotated[str, Field(description="The model's slug.", examples=["flights"])]
Version = Annotated[
    str,
    Field(description="First 12 digits of the model's fingerprint.", examples=[EXAMPLE_VERSION]),
]
Fingerprint = Annotated[
    str,
    Field(
        pattern=f"^{FINGERPRINT}$",
        description="Hash of what determines the model's numbers.",
        examples=[EXAMPLE_FINGERPRINT],
    ),
]
EpochText = Annotated[
    str,
    Field(
        pattern=f"^{EPOCH}$",
        description="Random; new whenever the stream is created, restored, forked or rewound.",
        examples=[EXAMPLE_EPOCH],
    ),
]
TagText = Annotated[
    str,
    Field(
        pattern=f"^{TAG}$",
        description="Hash chain over the commits of the epoch.",
        examples=[EXAMPLE_TAG],
    ),
]
PositionNumber = Annotated[
    int, Field(ge=0, le=2**62, description="Events consumed.", examples=[48])
]
FeedName = Annotated[
    Literal["events", "inputs"], Field(description="How the stream is fed, since its first chunk.")
]
BY_PART: Final = "Each part of the state by its name, as nested lists of the part's shape."
StateValues = Annotated[
    dict[str, Any],
    Field(
        description=BY_PART,
        examples=[EXAMPLE_STATE],
    ),
]

SINCE: Final = (
    "Present if the version has not seen the stream's start: the position since which it has "
    "computed the state, from the initial state."
)

closed: Final = with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
"""A reply has no other members than its type."""

Values = Annotated[Any, GetPydanticSchema(lambda _, handler: handler(list[float]))]
"""A list of numbers, which the service holds as an array."""
Rows = Annotated[Any, GetPydanticSchema(lambda _, handler: handler(list[list[float]]))]
"""A list of lists of numbers, likewise."""
Outputs = Annotated[
    dict[str, Any],
    Field(
        description="Each output by its name: one value (of the output's shape) per event, or "
        "one for the whole chunk if the output is `per: chunk`.",
        examples=[{"late": [0.18, 0.47]}],
    ),
]


StateAfter = Annotated[
    StateValues,
    Field(description=f"The state after the last step, with `return_state=true`. {BY_PART}"),
]
AttentionWeights = Annotated[
    dict[str, Any],
    Field(
        description="With `return_attention=true`, by layer that attends over the chunk: the "
        "weight of each step.",
        examples=[{"attention_1": [0.21, 0.79]}],
    ),
]


@closed
class Warmth(TypedDict):
    """How many events of the stream the version had seen, if not its start."""

    events: int
    """Events of the stream that the version had seen before the chunk."""
    of: int
    """Events after which the start is forgotten."""


@closed
class ChunkReply(TypedDict):
    """The outputs of one chunk, and the state of its stream after it."""

    model: ModelName
    version: Version
    stream: StreamName
    epoch: EpochText | None
    """Null only in a dry run, if there is no stream."""
    position: PositionNumber
    tag: TagText | None
    """Null only in a dry run, if there is no stream."""
    outputs: Outputs
    replayed: bool
    """The chunk was applied before; this is its stored reply."""
    output_position: NotRequired[int]
    """For a model with `blocks`: index of the event of the first output. The outputs may be
    more or fewer than the chunk's events."""
    dry_run: NotRequired[Literal[True]]
    """Nothing was applied: epoch, position and tag are those of the current stream head."""
    created: NotRequired[Literal[True]]
    """Present, and true, in the first reply of a stream."""
    warm: NotRequired[Warmth]
    """Present after a change of the model's version, while the outputs still depend on events that
    the new version has not seen."""
    state: NotRequired[StateAfter]
    attention: NotRequired[AttentionWeights]


@closed
class PredictionOfOne(TypedDict):
    """The outputs of one sequence."""

    outputs: Outputs
    state_token: NotRequired[str]
    """With `return_state_token=true`: the state after the last step, signed; send it with the
    sequence that follows. Base64 in JSON, binary in MessagePack."""
    state: NotRequired[StateAfter]
    attention: NotRequired[AttentionWeights]


@closed
class TargetForecast(TypedDict):
    """H coming values of one target, in its own units."""

    point: Values
    """The medians: [H]."""
    quantiles: Rows
    """Each step's quantiles at `levels`, given the medians before it: [H][Q]."""
    paths: NotRequired[Rows]
    """Drawn paths: [samples][H]."""


@closed
class ForecastReply(TypedDict):
    """The forecast from the current state of a stream."""

    model: ModelName
    version: Version
    stream: StreamName
    epoch: EpochText
    position: PositionNumber
    tag: TagText
    times_ms: NotRequired[list[int]]
    """Epoch milliseconds of the coming steps, if events have a timestamp."""
    levels: Annotated[list[float], Field(examples=[[0.1, 0.5, 0.9]])]
    """Of the quantiles."""
    forecast: dict[str, TargetForecast]
    """By target."""
    warm: NotRequired[Warmth]
    """Present as in the reply to a chunk."""
