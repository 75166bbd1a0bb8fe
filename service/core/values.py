"""The values that travel through the service: what is sent, what is kept, what is answered.

Plain frozen values without behaviour of their own; no transport, store or runtime types. What
every chunk makes anew is a named tuple: it is made, hashed and compared in C, at a third of the
cost of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.decoding.forecasts import Forecast
from models.events.columns import EventColumns
from models.spec.state import State

FloatRows = NDArray[np.float32]

EPOCH_BYTES = 8
TAG_BYTES = 16
DIGEST_BYTES = 16
FIRST_TAG = bytes(TAG_BYTES)
"""The tag of a stream at the beginning of an epoch."""


class StreamKey(NamedTuple):
    """A stream under its model."""

    model: str
    stream: str


class Feed(StrEnum):
    """How a stream is fed; fixed by its first chunk."""

    EVENTS = "events"
    INPUTS = "inputs"


class StreamHead(NamedTuple):
    """Names one state of one stream: epoch and tag; the position alone would not.

    Attributes:
        epoch: 8 random bytes, new when the stream begins.
        tag: 16 bytes, the hash chain over the commits of the epoch.
        position: events consumed.
    """

    epoch: bytes
    tag: bytes
    position: int

    @property
    def etag(self) -> str:
        """`epoch-tag` in hex, without the quotes of the header."""
        return f"{self.epoch.hex()}-{self.tag.hex()}"


class LastChunk(NamedTuple):
    """What a retry of the stream's last chunk is recognised by.

    Attributes:
        start: position of its first event.
        digest: the first 16 bytes of its digest.
        stream_existed: whether it starts at 0 in a stream that existed, restored or forked at
            position 0; False for a chunk that starts later.
    """

    start: int
    digest: bytes
    stream_existed: bool = False

    @property
    def created(self) -> bool:
        """Whether the chunk created its stream."""
        return self.start == 0 and not self.stream_existed


class StreamState(NamedTuple):
    """One stream as the store keeps it.

    Attributes:
        fingerprint: 16 bytes, of the model that wrote the state.
        last: the last chunk; None after a restore or a fork.
        updated_ms: wall clock of the last commit, epoch milliseconds.
    """

    head: StreamHead
    feed: Feed
    fingerprint: bytes
    last: LastChunk | None
    updated_ms: int
    state: State


class Tombstone(NamedTuple):
    """The marker that a deleted stream leaves for a while; to clients the stream does not exist.

    Attributes:
        head: identifies this deletion: a random epoch, at position 0. A commit that creates the
            stream again expects it, so that one sent before the deletion conflicts.
    """

    head: StreamHead


class StoredReply(NamedTuple):
    """The outputs of a stream's last chunk, kept for retries.

    Attributes:
        head: the stream after that chunk; a reply under another head is not this chunk's.
        outputs: float32 [T, O], packed by the model's output layout.
    """

    head: StreamHead
    outputs: FloatRows


class Steps(NamedTuple):
    """T >= 1 consecutive events, either as validated columns or as encoded rows.

    T is 0 in a final chunk alone, which may say nothing but that the stream is at its end.

    Attributes:
        columns: the events, when the feed is `events`.
        rows: float32 [T, F], when the feed is `inputs`; finite, codes in range.
    """

    feed: Feed
    length: int
    columns: EventColumns | None = None
    rows: FloatRows | None = None


@dataclass(frozen=True, slots=True)
class Precondition:
    """An If-Match header: the ETags that are accepted, or any existing stream (`*`)."""

    etags: tuple[str, ...] = ()
    any_state: bool = False

    def holds(self, head: StreamHead | None) -> bool:
        """Whether a stream at `head` (None: no stream) satisfies it."""
        return head is not None and (self.any_state or head.etag in self.etags)


class Chunk(NamedTuple):
    """Events of one stream, sent together.

    Attributes:
        position: index of the first event, or None to append where the stream stands.
        epoch: the epoch the client believes in, or None.
        digest: SHA-256 over the canonical form (see `delivery`), 32 bytes.
        final: no event follows these; for models with blocks.
    """

    key: StreamKey
    steps: Steps
    digest: bytes
    position: int | None = None
    epoch: bytes | None = None
    precondition: Precondition | None = None
    final: bool = False


class Timing(NamedTuple):
    """Where a chunk's time went, in seconds; all zero where nothing was computed."""

    queue_s: float = 0.0
    load_s: float = 0.0
    infer_s: float = 0.0
    commit_s: float = 0.0


class Reply(NamedTuple):
    """What one chunk is answered with.

    Attributes:
        head: the stream after the chunk.
        outputs: float32 [T, O], packed.
        state: the stream's state after the chunk.
        replayed: the outputs are those of an earlier application of the same chunk.
        created: the chunk began the stream.
        output_position: index of the event of the first output, for models with blocks, whose T
            is not the chunk's.
    """

    key: StreamKey
    head: StreamHead
    outputs: FloatRows
    state: State
    replayed: bool = False
    created: bool = False
    timing: Timing = Timing()
    output_position: int | None = None


class Prediction(NamedTuple):
    """A whole sequence from the zero state, nothing stored: outputs [T, O] and the last state."""

    outputs: FloatRows
    state: State


class ForecastRequest(NamedTuple):
    """How a decoder is to look ahead.

    Attributes:
        horizon: steps.
        samples: paths to draw.
        seed: of the draws.
        future: what is known of the coming steps, one event each; None where nothing is told.
        position: where the stream is expected to stand; None where it may stand anywhere.
        precondition: the state that the stream must be in; None for any.
    """

    horizon: int
    samples: int = 0
    seed: int = 0
    future: EventColumns | None = None
    position: int | None = None
    precondition: Precondition | None = None


class ForecastReply(NamedTuple):
    """What was seen ahead of one state of a stream.

    Attributes:
        head: the stream, which stands as it stood.
        times_ms: epoch milliseconds of the coming steps, where the events have a timestamp.
    """

    key: StreamKey
    head: StreamHead
    forecast: Forecast
    times_ms: tuple[int, ...] | None


class StreamPage(NamedTuple):
    """One page of a listing; `cursor` is None on the last."""

    streams: tuple[str, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Check:
    """One readiness check: its name, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str = ""
