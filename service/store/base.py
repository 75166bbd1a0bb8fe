"""Interface of a state store: compare-and-set of many streams per call.

Streams fail independently: a damaged or failing stream never fails its neighbours. So the failure
of one stream is a value, and a call raises only if the store as a whole is unavailable
(`StoreUnavailable`, `StoreRefused`). Use from one event loop. Every call is safe to retry: a commit
that is retried finds its own head.

`deadline_s` is a time of the monotonic clock: a call waits no longer for an unavailable store.
If it is infinite, the timeout of the store's settings applies.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec
import structlog

from service.core.errors import CarryError, StateDamaged
from service.core.values import (
    Check,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamPage,
    StreamState,
    Tombstone,
)
from service.store.codec import CodecError, decode_state, read_packed_head, unpack_head
from service.store.observation import StoreTelemetry, StreamCount
from service.store.outputs import OutputChannel
from service.store.rates import RateLeases
from service.store.usage import StreamUsage

log = structlog.get_logger(__name__)


class CommitColumns(msgspec.Struct, frozen=True):
    """Compare-and-sets of streams, as columns of the bytes that the store compares and writes.

    Attributes:
        expected: the packed head that must be stored, of the stream or of a tombstone; empty if
            neither may exist.
        states: encoded, to write.
        replies: encoded, stored for retries of the last chunk; an empty one deletes the stored one.
    """

    keys: Sequence[StreamKey]
    expected: Sequence[bytes]
    states: Sequence[bytes]
    replies: Sequence[bytes]

    def select(self, at: Sequence[int]) -> CommitColumns:
        """The items at these indexes."""
        return CommitColumns(
            [self.keys[index] for index in at],
            [self.expected[index] for index in at],
            [self.states[index] for index in at],
            [self.replies[index] for index in at],
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


def state_damaged_error(key: StreamKey, error: CodecError, value: bytes) -> StateDamaged:
    """The error for stored bytes that are not a valid state."""
    log.error("state_damaged", model=key.model, stream=key.stream, reason=str(error))
    damaged = StateDamaged(
        f"the stored state of stream {key.stream!r} is invalid: {error}", stream=key.stream
    )
    damaged.head = unpack_head(read_packed_head(value))
    return damaged


class StateStore(Protocol):
    """Stores the states of streams durably."""

    @property
    def outputs(self) -> OutputChannel:
        """The channel on which it publishes what it commits to watched streams; not started."""

    @property
    def usage(self) -> StreamUsage:
        """The streams of the access keys with quotas."""

    @property
    def rates(self) -> RateLeases:
        """The token buckets of the access keys with limits."""

    @property
    def telemetry(self) -> StoreTelemetry:
        """What its connections and checks count, in this process."""

    async def start(self) -> None:
        """Connect and check the servers' configuration; once, before use."""

    async def close(self) -> None:
        """Release connections; once, after the last call returned."""

    async def check(self) -> list[Check]:
        """Check readiness: whether the store accepts commits as required. Never raises."""

    async def count_streams(self) -> dict[str, StreamCount]:
        """Count the streams of each model, in bounded time; estimated if there are many."""

    def shard(self, key: StreamKey) -> Hashable:
        """The node that stores a stream; None for a single server."""

    async def token_key(self) -> bytes:
        """Read the secret of this store that signs state tokens; drawn when it is first read.

        Raises:
            CarryError: the store does not answer.
        """

    async def access_keys(
        self, version: bytes | None, deadline_s: float = math.inf
    ) -> tuple[bytes, Mapping[str, bytes]] | None:
        """Read the version of the access keys, which is new after each write and empty if there
        was none, and their records by id; None if `version` is the current one.

        Raises:
            CarryError: the store does not answer.
        """

    async def write_access_keys(self, records: Mapping[str, bytes]) -> None:
        """Write records of access keys by id, in one step; without records, only mark the store as
        one that has had keys.

        Raises:
            NotDurable: they were written, but are not as durable as the settings require.
            CarryError: the store does not answer; they may have been written.
        """

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[StoredValue]:
        """Load many streams in one round trip; `decode_value` decodes one."""

    async def load_with_reply(
        self, key: StreamKey, deadline_s: float = math.inf
    ) -> tuple[StreamState | None, StoredReply | None]:
        """Load one stream and its stored reply in one step.

        Raises:
            CarryError: the state is damaged.
        """

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        """Compare-and-set many streams in one round trip; each succeeds or fails independently.

        A key may occur once per call. The reply is written before the state.
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

    async def delete_many(self, keys: Sequence[StreamKey]) -> list[CommitResult]:
        """Delete many streams, each as `delete` does without `expected`, in few round trips.

        Streams fail independently. A key may occur once per call.
        """

    async def streams(
        self, model: str | None, prefix: str, cursor: str | None, limit: int
    ) -> StreamPage:
        """Read a page of the streams of a model, or of all models; they are unordered.

        A listing contains every stream that exists throughout, and may contain one twice. It never
        blocks the server for longer than one bounded scan step.
        """
