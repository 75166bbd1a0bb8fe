"""The documents that the API answers with, as the OpenAPI document describes them.

Replies are written from plain data on the way out, without these types; tests hold them to
the types, members and all.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.transports.http.field_rules import (
    EpochText,
    FeedName,
    Fingerprint,
    ModelName,
    PositionNumber,
    StateValues,
    StreamName,
    TagText,
    Version,
)

Outputs = Annotated[
    dict[str, Any],
    Field(
        description="Each output by its name: one value (of the output's shape) per event, or "
        "one for the whole chunk where the output is `per: chunk`.",
        examples=[{"late": [0.18, 0.47]}],
    ),
]


AttentionWeights = Annotated[
    dict[str, Any],
    Field(
        description="By layer that attends over the chunk: the weight of each step.",
        examples=[{"attention_1": [0.21, 0.79]}],
    ),
]


class Document(BaseModel):
    """Base of every reply."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """RFC 9457 problem document. The facts of the error are further members."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["/docs/errors#position_ahead"])
    title: str
    status: int
    detail: str = Field(description="What was expected and what came.")
    code: str = Field(description="Stable; decide by it.", examples=["position_ahead"])
    retryable: bool = Field(description="Whether the same request may be sent again.")
    request_id: str | None
    at: str | None = Field(None, description="The place in the request.")
    expected: Any = Field(None, description="What would have been accepted.")
    got: Any = Field(None, description="What came.")
    stream: str | None = None
    epoch: str | None = Field(None, description="Where the stream stands.")
    position: int | None = Field(None, description="Where the stream stands.")
    tag: str | None = Field(None, description="Where the stream stands.")
    retry_after_s: float | None = None


class ChunkReply(Document):
    """The outputs of one chunk, and where its stream stands after it."""

    model: ModelName
    version: Version
    stream: StreamName
    epoch: EpochText
    position: PositionNumber
    tag: TagText
    outputs: Outputs
    replayed: bool = Field(description="The chunk was applied before; this is its stored reply.")
    output_position: int | None = Field(
        None,
        description="There for a model with `blocks`: index of the event of the first output. The "
        "outputs may be more or fewer than the chunk's events.",
    )
    created: Literal[True] | None = Field(None, description="There, and true, in a first reply.")
    state: StateValues | None = Field(None, description="With `return_state=true`.")
    attention: AttentionWeights | None = Field(None, description="With `return_attention=true`.")


class AppliedItem(Document):
    """An item that was applied, or had been."""

    status: Literal[200]
    reply: ChunkReply


class FailedItem(Document):
    """An item that was refused or failed."""

    status: int
    error: Problem


class ManyReply(Document):
    """One outcome per item, in the order of the request."""

    model: ModelName
    version: Version
    results: list[AppliedItem | FailedItem]


class PredictionOfOne(Document):
    """The outputs of one sequence."""

    outputs: Outputs
    state: StateValues | None = Field(None, description="With `return_state=true`.")
    attention: AttentionWeights | None = Field(None, description="With `return_attention=true`.")


class PredictReply(Document):
    """One prediction per sequence, in the order of the request."""

    model: ModelName
    version: Version
    predictions: list[PredictionOfOne]


class TargetForecast(Document):
    """H coming values of one target, in its own units."""

    point: list[float] = Field(description="The medians: [H].")
    quantiles: list[list[float]] = Field(
        description="Each step's quantiles at `levels`, given the medians before it: [H][Q]."
    )
    paths: list[list[float]] | None = Field(None, description="Drawn paths: [samples][H].")


class ForecastReply(Document):
    """What is seen ahead of the state in which the stream stands."""

    model: ModelName
    version: Version
    stream: StreamName
    epoch: EpochText
    position: PositionNumber
    tag: TagText
    times_ms: list[int] | None = Field(
        None, description="Epoch milliseconds of the coming steps, where events have a timestamp."
    )
    levels: list[float] = Field(description="Of the quantiles.", examples=[[0.1, 0.5, 0.9]])
    forecast: dict[str, TargetForecast] = Field(description="By target.")


class StreamInfo(Document):
    """Where a stream stands. `version` and `fingerprint` are those of its state."""

    model: ModelName
    version: Version
    fingerprint: Fingerprint
    stream: StreamName
    feed: FeedName
    epoch: EpochText
    position: PositionNumber
    tag: TagText
    updated_ms: int = Field(description="Last commit, epoch milliseconds.")
    age_s: float = Field(description="Seconds since the last commit.")
    state_bytes: int = Field(description="Size of the state.")


class StateReply(Document):
    """A stream's state, complete: `PUT` takes this document as it is."""

    model: ModelName
    version: Version
    fingerprint: Fingerprint
    stream: StreamName
    feed: FeedName
    epoch: EpochText
    position: PositionNumber
    tag: TagText
    updated_ms: int
    state: StateValues


class StreamList(Document):
    """A page of names, in no order; a name may come twice over a whole listing."""

    model: ModelName
    streams: list[StreamName]
    cursor: str | None = Field(description="Ask for the next page with it; null on the last.")


class Deleted(Document):
    """How many streams were forgotten."""

    model: ModelName
    deleted: int


class ColumnInfo(Document):
    """One value of a row of `inputs`."""

    name: str
    field: str | None = Field(description="The event field it comes from.")
    codes: int | None = Field(None, description="For a categorical: how many codes there are.")
    labels: list[str] | None = Field(None, description="What each code stands for.")


class OutputInfo(Document):
    """One output."""

    shape: list[int] = Field(description="Shape of one step.")
    per: Literal["step", "chunk", "block"]
    labels: list[str] = Field(description="Names along the last axis, where it has any.")


class PartInfo(Document):
    """One part of the state."""

    shape: list[int]
    dtype: Literal["float32", "int64"]


class ModelSummary(Document):
    """One served model."""

    name: ModelName
    version: Version
    description: str
    input_features: int
    events: bool = Field(description="Whether it has an event schema.")
    outputs: list[str]


class ModelList(Document):
    """The served models, by name."""

    models: list[ModelSummary]


class ForecastInfo(Document):
    """What a forecast takes and gives; each of it follows from the model's decoder."""

    targets: list[str]
    known: list[str] = Field(description="What `future` has to say of a coming step.")
    step_s: float | None = Field(description="Seconds between timestamps, where regular.")
    levels: list[float] = Field(description="Of the quantiles.")
    max_horizon: int


class LimitsInfo(Document):
    """What one request may ask for."""

    max_body_bytes: int
    max_chunk_steps: int
    max_predict_steps: int
    max_items: int
    max_forecast_samples: int


class BlocksInfo(Document):
    """Blocks of `size` events are answered once `lookahead` more are known, or the stream ends."""

    size: int
    lookahead: int


class ModelDetail(Document):
    """All that a client needs to know of a model."""

    name: ModelName
    version: Version
    fingerprint: Fingerprint
    description: str
    input_features: int = Field(description="F, values per row of `inputs`.")
    columns: list[ColumnInfo]
    events: dict[str, Any] | None = Field(description="JSON Schema of one event, or null.")
    outputs: dict[str, OutputInfo]
    state: dict[str, PartInfo]
    attention: list[str] = Field(description="Layers whose weights `return_attention` gives.")
    chunking: Literal["invisible", "per_chunk", "whole"] = Field(
        description="What cuts mean: nothing; or the model sees each chunk as a whole; or it takes "
        "whole sequences only."
    )
    blocks: BlocksInfo | None = Field(
        description="How a bidirectional network follows a stream; null where events are answered "
        "at once."
    )
    max_chunk_steps: int | None = Field(
        description="Most steps of what the model sees as a whole; null where it cuts as it likes."
    )
    runtimes: list[str]
    forecast: ForecastInfo | None = Field(description="Null for a model without a decoder.")
    limits: LimitsInfo
    metrics: dict[str, Any] = Field(description="What was measured when the model was trained.")


class Live(Document):
    """The process answers."""

    status: Literal["live"]


class CheckInfo(Document):
    """One readiness check."""

    name: str
    ok: bool
    detail: str


class Ready(Document):
    """Whether requests should be sent here."""

    status: Literal["ready", "not_ready"]
    failing: list[str] = Field(description="Names of the checks that fail.")
    checks: list[CheckInfo]
