"""The values of the domain: streams, chunks, replies, forecasts.

Frozen values, independent of transports, stores and runtimes. The values that every chunk creates
are structs of msgspec, which are created in C: a named tuple takes four times as many instructions
(`tests/bench/lab-notebook.md`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact.fingerprint import version_of
from models.decoding.forecasts import Forecast
from models.events.columns import EventColumns
from models.spec.state import State, StateSpec
from service.core.tracing import RequestSpan

FloatRows = NDArray[np.float32]

EPOCH_BYTES = 8
TAG_BYTES = 16
DIGEST_BYTES = 16
FIRST_TAG = bytes(TAG_BYTES)
"""The tag of a stream at the start of an epoch."""


class StreamKey(msgspec.Struct, frozen=True, gc=False):
    """The name of a stream and its model."""

    model: str
    stream: str


class Feed(StrEnum):
    """The kind of input of a stream; fixed by its first chunk."""

    EVENTS = "events"
    INPUTS = "inputs"


class StreamHead(msgspec.Struct, frozen=True, gc=False):
    """The version of a stream: epoch and tag identify one state, which a position alone does not.

    Attributes:
        epoch: 8 random bytes, new when the stream is created, restored, forked or rewound.
        tag: 16 bytes, the hash chain over the commits of the epoch.
        position: number of events consumed.
    """

    epoch: bytes
    tag: bytes
    position: int

    @property
    def etag(self) -> str:
        """`epoch-tag` in hex, without the quotes of the header."""
        return f"{self.epoch.hex()}-{self.tag.hex()}"


NO_STREAM = StreamHead(b"", FIRST_TAG, 0)
"""In a reply to a dry run: there is no stream yet."""


class LastChunk(NamedTuple):
    """Identifies a stream's last chunk, to recognise a retry of it.

    Attributes:
        start: position of its first event.
        digest: the first 16 bytes of its digest.
        stream_existed: whether it starts at 0 in a stream that was restored or forked at position
            0; False for a chunk that starts later.
    """

    start: int
    digest: bytes
    stream_existed: bool = False

    @property
    def created(self) -> bool:
        """Whether the chunk created its stream."""
        return self.start == 0 and not self.stream_existed


LastFields = tuple[int, bytes, bool]
"""The fields of a `LastChunk`; a batch uses plain tuples, which are cheaper to create."""


class SourceMark(NamedTuple):
    """How far a source of events is in a stream's state: its events of the stream up to an offset.

    Only a state that was loaded from a history has one, until the stream's first chunk. A consumer
    skips the events that it covers.

    Attributes:
        source: name of the topic; of Kafka such as `kafka:flights:3`, with the partition
            (`service.store.source_mark.source_name`).
        offset: of the record of Kafka, or the first number of the id of an entry.
        sequence: the second number of the id of an entry; 0 of Kafka.
    """

    source: str
    offset: int
    sequence: int = 0

    def covers(self, event: SourceMark) -> bool:
        """Whether the state contains the event of the stream that has this mark."""
        return self.source == event.source and self[1:] >= event[1:]


class StreamState(NamedTuple):
    """One stream as it is stored.

    Attributes:
        fingerprint: 16 bytes, the fingerprint of the model that wrote the state.
        last: the last chunk; None after a restore or a fork.
        updated_ms: wall clock of the last commit, epoch milliseconds.
        since: position since which the state is computed, from the initial state, by a version of
            the model that has not seen the stream's start; None if the state is exact.
        source: how far a source of events is in the state; None if that is not known.
    """

    head: StreamHead
    feed: Feed
    fingerprint: bytes
    last: LastChunk | None
    updated_ms: int
    state: State
    since: int | None = None
    source: SourceMark | None = None


class Tombstone(NamedTuple):
    """The temporary marker of a deleted stream; to clients the stream does not exist.

    Attributes:
        head: identifies this deletion: a random epoch, at position 0. A commit that creates the
            stream again expects it, so a commit that was sent before the deletion conflicts.
    """

    head: StreamHead


class StoredReply(NamedTuple):
    """The outputs of a stream's last chunk, kept for retries.

    Attributes:
        head: the stream head after that chunk. The stream has this one or that after an
            acknowledgement; a reply with another head is of another chunk.
        outputs: float32 [T, O], packed by the model's output layout.
    """

    head: StreamHead
    outputs: FloatRows


class Steps(msgspec.Struct, frozen=True, gc=False):
    """T consecutive events, either as validated columns or as encoded rows.

    T >= 1, except in a final chunk, which may only close the stream.

    Attributes:
        columns: the events, if `feed` is `events`.
        rows: float32 [T, F], if `feed` is `inputs`; finite, category codes in range.
        resets: ascending indexes of the events before which the client resets the state.
        false_alarms_per_day: for a model with `detection`, the rate that the alarms of these events
            follow; None for the model's.
    """

    feed: Feed
    length: int
    columns: EventColumns | None = None
    rows: FloatRows | None = None
    resets: tuple[int, ...] = ()
    false_alarms_per_day: float | None = None


@dataclass(frozen=True, slots=True)
class Precondition:
    """An If-Match header: one of several ETags, or any existing stream (`*`)."""

    etags: tuple[str, ...] = ()
    any_state: bool = False

    def holds(self, head: StreamHead | None) -> bool:
        """Whether a stream with this head satisfies it; None if there is no stream."""
        return head is not None and (self.any_state or head.etag in self.etags)


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Events of one stream, sent together.

    Attributes:
        digest: SHA-256 over the canonical form (see `delivery`), 32 bytes.
        position: index of the first event; None to append at the current position.
        epoch: the epoch that the client expects, or None.
        final: whether it closes the stream; for models with blocks.
        starts_over: whether it starts the stream over: from the initial state, in a new epoch,
            whatever is stored. Its position is 0 or None.
        dry_run: whether it is only computed, from the stream's current state, and not applied.
        span: the span of its request, if that is traced.
        quota: under which its stream counts if it creates it (`service.access.limits.StreamQuota`);
            None if there is none.
    """

    key: StreamKey
    steps: Steps
    digest: bytes
    position: int | None = None
    epoch: bytes | None = None
    precondition: Precondition | None = None
    final: bool = False
    starts_over: bool = False
    dry_run: bool = False
    span: RequestSpan | None = None
    quota: object | None = None


class Timing(msgspec.Struct, frozen=True, gc=False):
    """The times that the chunks of a batch share, by stage; all zero if nothing was computed."""

    load_s: float = 0.0
    infer_s: float = 0.0
    commit_s: float = 0.0


class Warmth(NamedTuple):
    """How much of a stream the version had seen before a chunk, if not its start.

    Attributes:
        events: before the chunk.
        of: after how many the start does not matter.
    """

    events: int
    of: int


class AnsweringVersion(Protocol):
    """The version of a model that answered a chunk.

    Attributes:
        version: the first 12 hex digits of its fingerprint.
        state: the layout of its states.
    """

    @property
    def version(self) -> str: ...

    @property
    def state(self) -> StateSpec: ...


class UnknownVersion(NamedTuple):
    """A version that answered a chunk, but is not loaded: the parts of its states are not known."""

    fingerprint: bytes
    state: StateSpec = StateSpec(())

    @property
    def version(self) -> str:
        """The first 12 hex digits of its fingerprint."""
        return version_of(self.fingerprint.hex())


class Reply(msgspec.Struct, frozen=True, gc=False):
    """The reply to one chunk.

    Attributes:
        head: the stream head after the chunk.
        outputs: float32 [T, O], packed.
        states: the stream's state after the chunk; if `row` is given, the states of its batch.
        replayed: whether the outputs are those of an earlier delivery of the same chunk.
        created: whether the chunk created the stream.
        queue_s: how long the chunk waited for its batch.
        output_position: index of the event of the first output, for models with blocks, whose
            outputs are not one for each event of the chunk.
        dry_run: whether nothing was applied; `head` is then the current stream head, and
            `NO_STREAM` if there is none.
        row: index of the stream's state in `states`; None if that is its state alone.
        warm: None if the outputs do not depend on a start that the version has not seen.
        version: the version that answered; None for the one that the request was read for.
    """

    key: StreamKey
    head: StreamHead
    outputs: FloatRows
    states: State
    replayed: bool = False
    created: bool = False
    queue_s: float = 0.0
    timing: Timing = Timing()
    output_position: int | None = None
    dry_run: bool = False
    row: int | None = None
    warm: Warmth | None = None
    version: AnsweringVersion | None = None

    @property
    def state(self) -> State:
        """The stream's state after the chunk."""
        if self.row is None:
            return self.states
        return State(self.states.floats[self.row], self.states.ints[self.row])


class SequenceInput(NamedTuple):
    """A sequence to predict.

    Attributes:
        token: the state token of the sequence that it continues; None to start from the initial
            state.
    """

    steps: Steps
    token: bytes | None = None


class Prediction(NamedTuple):
    """The prediction of a sequence.

    Attributes:
        outputs: float32 [T, O].
        state: the state after it.
        version: the version that computed it.
        token: the state, signed, if it was asked for.
    """

    outputs: FloatRows
    state: State
    version: AnsweringVersion
    token: bytes | None = None


class ForecastRequest(NamedTuple):
    """The parameters of a forecast.

    Attributes:
        horizon: number of steps.
        samples: number of sample paths.
        seed: seed of the sample paths.
        future: known future covariates, one event for each step; None if none are given.
        position: expected position of the stream; None for any.
        precondition: state that the stream must be in; None for any.
    """

    horizon: int
    samples: int = 0
    seed: int = 0
    future: EventColumns | None = None
    position: int | None = None
    precondition: Precondition | None = None


class ForecastReply(NamedTuple):
    """The forecast from one state of a stream.

    Attributes:
        head: the stream head at the forecast origin; a forecast does not change it.
        times_ms: epoch milliseconds of the forecast steps; None if the events have no timestamp.
        version: the version that computed it.
        warm: as of `Reply`.
    """

    key: StreamKey
    head: StreamHead
    forecast: Forecast
    times_ms: tuple[int, ...] | None
    version: AnsweringVersion
    warm: Warmth | None = None


class StreamPage(NamedTuple):
    """One page of a listing; `cursor` is None on the last."""

    keys: tuple[StreamKey, ...]
    cursor: str | None

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of the streams, without their models."""
        return tuple([key.stream for key in self.keys])


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One primary of the store.

    Attributes:
        address: without a password.
        status: `down`: its streams wait or fail; `unsafe`: it could lose streams silently.
        detail: why it is not `up`.
    """

    address: str
    status: Literal["up", "down", "unsafe"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one readiness check.

    Attributes:
        degraded: it passes, since most requests are served, but not all.
        servers: the primaries of the store, of its check.
    """

    name: str
    ok: bool
    detail: str = ""
    degraded: bool = False
    servers: tuple[ServerStatus, ...] = ()
