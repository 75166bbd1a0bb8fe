"""Interfaces of a state store: compare-and-set of many streams per call, and other capabilities.

Streams fail independently: a damaged or failing stream never fails its neighbours. So the failure
of one stream is a value, and a call raises only if the store as a whole is unavailable
(`StoreUnavailable`, `StoreRefused`). Use from one event loop. Every call is safe to retry: a commit
that is retried finds its own head.

`deadline_s` is a time of the monotonic clock: a call waits no longer for an unavailable store.
If it is infinite, the timeout of the store's settings applies.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
import structlog

from service.core.errors import CarryError, StateDamaged
from service.core.values import (
    StoredReply,
    StreamHead,
    StreamKey,
    StreamPage,
    StreamState,
    Tombstone,
)
from service.store.capabilities import (
    OutputChannel,
    RateLeases,
    StoredAlarms,
    StoredKeys,
    StoredModels,
    StoreMonitor,
    StreamUsage,
)
from service.store.codec import decode_state, read_packed_head, unpack_head
from service.store.layout import CodecError

if TYPE_CHECKING:
    from service.store.history import Histories, HistoryColumns
    from service.store.topics import Topics

log = structlog.get_logger(__name__)


AlarmChange = str
"""What a commit changes in the index of open alarms: empty for nothing, `CLOSED` if the alarm has
ended, the time in epoch milliseconds if one opened, or `CONTINUING` and the time of the commit if
an earlier one is open, which is added if it is missing."""

CLOSED: Final = "-"
CONTINUING: Final = "+"


class CommitColumns(msgspec.Struct, frozen=True):
    """Compare-and-sets of streams, as columns of the bytes that the store compares and writes.

    Attributes:
        expected: the packed head that must be stored, of the stream or of a tombstone; empty if
            neither may exist.
        states: encoded, to write.
        replies: encoded, stored for retries of the last chunk; an empty one deletes the stored one.
        histories: of the streams; None if none is kept.
        alarms: changes of the index of open alarms (`AlarmChange`); None if there are none.
    """

    keys: Sequence[StreamKey]
    expected: Sequence[bytes]
    states: Sequence[bytes]
    replies: Sequence[bytes]
    histories: HistoryColumns | None = None
    alarms: Sequence[AlarmChange] | None = None

    def select(self, at: Sequence[int]) -> CommitColumns:
        """The items at these indexes."""
        return CommitColumns(
            [self.keys[index] for index in at],
            [self.expected[index] for index in at],
            [self.states[index] for index in at],
            [self.replies[index] for index in at],
            self.histories and self.histories.select(at),
            self.alarms and [self.alarms[index] for index in at],
        )


@dataclass(frozen=True, slots=True)
class Committed:
    """Written: reply, state and position together."""


COMMITTED = Committed()
"""The only instance that is needed."""


class Conflicted(NamedTuple):
    """Not written: a version conflict. `stored` is the stored head, None if there is no stream."""

    stored: StreamHead | None


CommitResult = Committed | Conflicted | CarryError

StoredValue = bytes | CarryError | None
"""What is stored of a stream: the bytes of its state or tombstone, an error, or None if nothing."""

Loaded = StreamState | Tombstone | CarryError | None
"""A decoded `StoredValue`."""


def decode_value(key: StreamKey, value: StoredValue) -> Loaded:
    """Decode what is stored of a stream; invalid bytes are an error."""
    if value is None or isinstance(value, CarryError):
        return value
    try:
        return decode_state(value)
    except CodecError as error:
        return state_damaged_error(key, error, value)


def decode_stream(value: bytes) -> StreamState:
    """Decode a state that is no tombstone.

    Raises:
        CodecError
    """
    stream = decode_state(value)
    if isinstance(stream, Tombstone):
        raise CodecError("expected a state, got a tombstone")
    return stream


def state_damaged_error(key: StreamKey, error: CodecError, value: bytes) -> StateDamaged:
    """The error for stored bytes that are not a valid state."""
    log.error("state_damaged", model=key.model, stream=key.stream, reason=str(error))
    damaged = StateDamaged(
        f"the stored state of stream {key.stream!r} is invalid: {error}", stream=key.stream
    )
    damaged.head = unpack_head(read_packed_head(value))
    return damaged


class StateStore(Protocol):
    """Stores the states of streams durably: what a chunk needs."""

    def shard(self, key: StreamKey) -> Hashable:
        """The node that stores a stream; None for a single server."""

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[StoredValue]:
        """Load many streams in one round trip; `decode_value` decodes one.

        A result is an error if its node does not answer while others do.
        """

    async def load_with_reply(
        self, key: StreamKey, deadline_s: float = math.inf
    ) -> tuple[StreamState | None, StoredReply | None]:
        """Load one stream and its stored reply in one step; a damaged reply counts as missing.

        What is returned is as durable as a commit: beyond `memory` durability, the read also
        writes (it renews the reply's TTL) and waits for durability like a commit.

        Raises:
            StateDamaged: the state's bytes are invalid.
            NotDurable: the state is not as durable as the settings require.
        """

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        """Compare-and-set many streams in one round trip; each succeeds or fails independently.

        A key may occur once per call. The reply is written before the state. If the first attempt
        finds the stream at the commit's own head, a duplicate of the same chunk wrote it: the
        result is Conflicted, and the stored reply answers the chunk.

        Raises:
            StoreUnavailable: nothing was sent.
            StoreRefused: nothing was written.
        """

    async def delete(
        self, key: StreamKey, expected: StreamHead | None = None, deadline_s: float = math.inf
    ) -> CommitResult:
        """Delete a stream and its reply; with `expected`, only if the stream is at that head.

        No request that was sent before the reply is applied after it: a tombstone is stored for a
        while, even if there was no stream (but not if `expected` differs).

        Returns:
            Committed if a stream was deleted, otherwise Conflicted with the stored head.
        """


class Store(StateStore, Protocol):
    """A store whose streams can be listed and deleted in bulk, with its other capabilities, each of
    which its user takes by itself.

    Attributes:
        outputs: not started by `start`.
    """

    keys: StoredKeys
    models: StoredModels
    usage: StreamUsage
    rates: RateLeases
    outputs: OutputChannel
    monitor: StoreMonitor
    topics: Topics
    histories: Histories
    alarms: StoredAlarms

    async def streams(
        self, model: str | None, prefix: str, cursor: str | None, limit: int
    ) -> StreamPage:
        """Read a page of at most `limit` streams of a model, or of all models; they are unordered.

        It may be empty and still have a cursor, and has more than `limit` only if one bucket of the
        server's hash table has. A listing contains every stream that exists throughout, and may
        contain one twice. It never blocks the server for longer than one bounded scan step.

        Raises:
            InvalidInput: the cursor is invalid.
        """

    async def delete_many(self, keys: Sequence[StreamKey]) -> list[CommitResult]:
        """Delete many streams, each as `delete` does without `expected`, in few round trips.

        Streams fail independently. A key may occur once per call.
        """

    async def start(self) -> None:
        """Connect, check the servers and initialize a new store; once, before use.

        Raises:
            StoreUnavailable, StoreRefused: a server does not answer, or must not be used.
        """

    async def close(self) -> None:
        """Release connections; once, after the last call returned."""
