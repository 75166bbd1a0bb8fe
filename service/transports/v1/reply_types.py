"""Types of the replies that the routes build, and the API document describes.

They are dictionaries when the service runs, so that a reply costs nothing more than its encoding.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from models.spec.state import Dtype
from service.codec.reply_types import (
    SINCE,
    ChunkReply,
    EpochText,
    FeedName,
    Fingerprint,
    ModelName,
    PositionNumber,
    PredictionOfOne,
    Rows,
    StateValues,
    StreamName,
    TagText,
    Version,
    closed,
)


@with_config(ConfigDict(extra="allow", use_attribute_docstrings=True))
class Problem(TypedDict):
    """RFC 9457 problem document. The facts of the error are further members."""

    type: Annotated[str, Field(examples=["/docs/errors#position_ahead"])]
    title: str
    status: int
    detail: str
    """What was expected and what came."""
    code: Annotated[str, Field(examples=["position_ahead"])]
    """Stable; decide by it."""
    retryable: bool
    """Whether the same request may be sent again."""
    request_id: str | None
    at: NotRequired[str]
    """The place in the request."""
    expected: NotRequired[Any]
    """What would have been accepted."""
    got: NotRequired[Any]
    """What came."""
    stream: NotRequired[str]
    epoch: NotRequired[str | None]
    """Of the stream's current state; null if there is no stream."""
    position: NotRequired[int]
    """Of the stream's current state."""
    tag: NotRequired[str | None]
    """Of the stream's current state; null if there is no stream."""
    retry_after_s: NotRequired[float]


@closed
class AppliedItem(TypedDict):
    """An item that was applied, or had been."""

    status: Literal[200]
    reply: ChunkReply


@closed
class FailedItem(TypedDict):
    """An item that was rejected or failed."""

    status: int
    error: Problem


@closed
class ManyReply(TypedDict):
    """One outcome per item, in the order of the request."""

    model: ModelName
    version: Version
    results: list[AppliedItem | FailedItem]


@closed
class PredictReply(TypedDict):
    """One prediction per sequence, in the order of the request."""

    model: ModelName
    version: Version
    predictions: list[PredictionOfOne]


class StreamRecord(TypedDict):
    """What the store keeps of a stream, besides its state."""

    model: ModelName
    version: Version
    fingerprint: Fingerprint
    stream: StreamName
    feed: FeedName
    epoch: EpochText
    position: PositionNumber
    tag: TagText
    # a docstring would not be inherited
    updated_ms: Annotated[int, Field(description="Last commit, epoch milliseconds.")]
    since: NotRequired[Annotated[int, Field(ge=0, description=SINCE)]]


@closed
class StreamInfo(StreamRecord):
    """The current state of a stream. `version` and `fingerprint` are those of its state."""

    age_s: float
    """Seconds since the last commit."""
    state_bytes: int
    """Size of the state."""


@closed
class StateReply(StreamRecord):
    """A stream's state, complete: `PUT` takes this document as it is."""

    state: StateValues


@closed
class KeptChunk(TypedDict):
    """Events of one chunk as they came; in JSON a body of `POST .../chunks`."""

    position: Annotated[int, Field(description="Of its first event.", examples=[24])]
    events: NotRequired[list[dict[str, Any]]]
    """Of a stream of events, without absent fields; timestamps are epoch milliseconds."""
    inputs: NotRequired[Rows]
    """Of a stream of inputs."""
    resets: NotRequired[list[int]]
    """Indexes of the events before which the client reset the state."""
    final: NotRequired[Literal[True]]
    false_alarms_per_day: NotRequired[float]


PositionRange = Annotated[list[int], Field(min_length=2, max_length=2, examples=[[24, 48]])]
"""The first and the last position of a range."""


@closed
class HistoryReply(StreamRecord):
    """What is kept of a stream's past."""

    available: list[PositionRange]
    """Ranges of the positions to which the stream can be rewound, each with its last position."""
    snapshots: list[int]
    """Positions whose state is kept."""
    start: int
    """Position of the oldest event that is kept; that of the stream if none is."""
    chunks: list[KeptChunk]
    """The events from `?from` on, oldest first."""
    next: int | None
    """Ask for the next events with it as `?from`; null after the last."""


@closed
class StreamList(TypedDict):
    """A page of names, in no order; a name may come twice over a whole listing."""

    model: ModelName
    streams: list[StreamName]
    cursor: str | None
    """Ask for the next page with it; null on the last."""


@closed
class Deleted(TypedDict):
    """How many streams were deleted."""

    model: ModelName
    deleted: int
    cursor: str | None
    """Continue with it; null if every stream of the prefix was visited."""


@closed
class ColumnInfo(TypedDict):
    """One value of a row of `inputs`."""

    name: str
    field: str | None
    """The event field it comes from."""
    codes: NotRequired[int]
    """For a categorical: how many codes there are."""
    labels: NotRequired[list[str]]
    """What each code stands for."""


@closed
class OutputInfo(TypedDict):
    """One output."""

    shape: list[int]
    """Shape of one step."""
    per: Literal["step", "chunk", "block"]
    labels: list[str]
    """Names along the last axis, if it has any."""
    categories_of: NotRequired[str]
    """The field whose categories the values are: names in documents, codes in tensors."""


@closed
class PartInfo(TypedDict):
    """One part of the state."""

    shape: list[int]
    dtype: Dtype


@closed
class ModelSummary(TypedDict):
    """One served model."""

    name: ModelName
    version: Version
    description: str
    input_features: int
    events: bool
    """Whether it has an event schema."""
    outputs: list[str]
    runtime: str
    """`onnxruntime` or `tensorflow`."""


@closed
class ModelList(TypedDict):
    """The served models, by name."""

    models: list[ModelSummary]


@closed
class ForecastInfo(TypedDict):
    """Inputs and outputs of a forecast, which follow from the model's decoder."""

    targets: list[str]
    known: list[str]
    """Members of each element of `future`: known future covariates."""
    step_s: float | None
    """Seconds between timestamps, if regular."""
    levels: list[float]
    """Of the quantiles."""
    max_horizon: int


@closed
class AlarmsInfo(TypedDict):
    """Alarms of a model with `detection`."""

    output: str
    false_alarms_per_day: float
    """Expected false alarms per stream and day, unless a chunk asks for another rate."""
    max_false_alarms_per_day: float
    """The most that a chunk may ask for."""


@closed
class LimitsInfo(TypedDict):
    """Limits of one request."""

    max_body_bytes: int
    max_chunk_steps: int
    max_predict_steps: int
    max_items: int
    max_forecast_samples: int


@closed
class BlocksInfo(TypedDict):
    """Blocks of `size` events are answered once `lookahead` more are known, or the stream ends."""

    size: int
    lookahead: int


@closed
class ModelDetail(TypedDict):
    """All that a client needs to know of a model."""

    name: ModelName
    version: Version
    fingerprint: Fingerprint
    description: str
    input_features: int
    """F, values per row of `inputs`."""
    columns: list[ColumnInfo]
    events: dict[str, Any] | None
    """JSON Schema of one event, or null."""
    outputs: dict[str, OutputInfo]
    state: dict[str, PartInfo]
    attention: list[str]
    """Layers whose weights `return_attention` gives."""
    chunking: Literal["invisible", "per_chunk", "whole"]
    """What cuts mean: nothing; or the model sees each chunk as a whole; or it accepts whole
    sequences only."""
    blocks: BlocksInfo | None
    """How a bidirectional network follows a stream; null if events are answered at once."""
    max_chunk_steps: int | None
    """Maximum steps of what the model sees as a whole; null if there is no limit."""
    reset_every: int | None
    """The state is reset before each position that is a multiple of this; null: never."""
    session_gap_s: float | None
    """The state is reset after a longer gap between timestamps, in seconds; null: never."""
    runtimes: list[str]
    forecast: ForecastInfo | None
    """Null for a model without a decoder."""
    alarms: AlarmsInfo | None
    """Null for a model without `detection`."""
    limits: LimitsInfo
    metrics: dict[str, Any]
    """What was measured when the model was trained."""


@closed
class ProcessFailure(TypedDict):
    """A process that could not load a version."""

    process: str
    reason: str


@closed
class VersionInfo(TypedDict):
    """One version of a model."""

    version: Version
    fingerprint: Fingerprint
    label: str | None
    path: str
    """Folder of its artifact, inside the folder of the models."""
    alias: Literal["champion", "challenger"] | None
    share: float
    """Of the streams that it answers; 0 for a challenger that only shadows the champion."""
    loaded: int
    """Processes that have loaded it."""
    failed: list[ProcessFailure]


@closed
class VersionList(TypedDict):
    """The versions of a model, over all processes that serve it."""

    model: ModelName
    processes: int
    """That serve the model."""
    rollback: Version | None
    """The version that a rollback would promote; null if there is none."""
    versions: list[VersionInfo]


class TopicProgress(TypedDict):
    """How far a consumer group has read a topic."""

    # docstrings would not be inherited
    entries: Annotated[int, Field(description="Entries in the topic.")]
    pending: Annotated[int, Field(description="Entries that were read and not acknowledged.")]
    lag: Annotated[
        int | None,
        Field(description="Entries that were not read; null if the server does not know."),
    ]
    acknowledged: Annotated[
        int | None,
        Field(description="Entries that the group has ever acknowledged; null if unknown."),
    ]
    oldest_s: Annotated[
        float | None,
        Field(description="Age of the first entry that is not acknowledged; null: none."),
    ]


@closed
class TopicPartition(TopicProgress):
    """The topic of one partition of the store."""

    topic: str
    """Its key."""
    owner: str | None
    """The consumer that reads it; null if none does."""


@closed
class TopicInfo(TopicProgress):
    """A topic that a consumer group reads; the topics of partitions together."""

    topic: Annotated[str, Field(examples=["departures"])]
    group: str
    model: ModelName
    outputs: str
    """Name of the output topic."""
    dead_letters: str
    """Name of the dead-letter topic."""
    owners: list[str]
    """The consumers that read it, of all partitions."""
    partitions: list[TopicPartition]
    """With `?partitions=true` those that exist, otherwise none."""


@closed
class TopicList(TypedDict):
    """The topics that consumers read."""

    topics: list[TopicInfo]


@closed
class TopicOutput(TypedDict):
    """An output of a consumer."""

    stream: StreamName
    position: PositionNumber
    time_ms: int
    """Of the commit, epoch milliseconds."""
    outputs: dict[str, Any]


@closed
class TopicOutputs(TypedDict):
    """The newest outputs of a topic."""

    topic: str
    group: str
    outputs: list[TopicOutput]
    """The newest first."""


@closed
class Live(TypedDict):
    """The process answers."""

    status: Literal["live"]


@closed
class CheckInfo(TypedDict):
    """One readiness check."""

    name: str
    ok: bool
    detail: str


@closed
class Ready(TypedDict):
    """Whether requests should be sent here."""

    status: Literal["ready", "not_ready"]
    failing: list[str]
    """Names of the checks that fail."""
    degraded: list[str]
    """Names of the checks that pass although some requests will fail."""
    checks: list[CheckInfo]


@closed
class StoreServer(TypedDict):
    """One primary of the store."""

    address: str
    status: Literal["up", "down", "unsafe"]
    detail: str
    """Why it is not `up`."""


@closed
class StoreReport(TypedDict):
    """The condition of the store."""

    status: Literal["up", "degraded", "down"]
    """`degraded`: the streams of some servers wait or fail; `down`: chunks are not served."""
    detail: str
    servers: list[StoreServer]
    """Its primaries; none if they are unknown."""
