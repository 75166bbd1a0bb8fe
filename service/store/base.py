"""What the pipeline asks of a store, whichever server is behind it.

Every call takes many streams and answers each on its own: a damaged or failing stream never
fails its neighbours, so failures of one stream are values here, and only a store that is
away as a whole raises (`StoreUnavailable`, `StoreRefused`). Safe to call from one event loop
only; each call may be repeated: a commit that is repeated finds its own head.

A call with a `deadline_s`, of the monotonic clock, waits no longer than that for a store that is
away; without one, as long as the store's settings say.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from service.core.errors import CarryError
from service.core.values import (
    Check,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamPage,
    StreamState,
    Tombstone,
)


class Commit(NamedTuple):
    """One compare-and-set.

    Attributes:
        expected: the head of the stream, or of the tombstone, that must be stored; None if there
            must be neither.
        new: what is written.
        reply: kept for retries of the last chunk; None drops the one that is kept.
    """

    key: StreamKey
    expected: StreamHead | None
    new: StreamState
    reply: StoredReply | None


@dataclass(frozen=True, slots=True)
class Committed:
    """Written: reply, state and position together."""


COMMITTED = Committed()
"""The one there has to be."""


class Conflicted(NamedTuple):
    """Not written: the stream is at another head; None if it does not exist."""

    found: StreamHead | None


CommitResult = Committed | Conflicted | CarryError

Loaded = StreamState | Tombstone | CarryError | None
"""The result of a load: a stream, a tombstone, an error, or None if nothing is stored."""


class StateStore(Protocol):
    """Keeps streams' states durably."""

    async def start(self) -> None:
        """Connect and check the server (eviction policy, partitions); once, before use."""

    async def close(self) -> None:
        """Release connections; once, after the last call returned."""

    async def check(self) -> list[Check]:
        """Readiness: whether the store answers and is set up as needed. Never raises."""

    def shard(self, key: StreamKey) -> Hashable:
        """The node of a cluster that stores a stream, as far as known; None for a single server."""

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float | None = None
    ) -> list[Loaded]:
        """Many streams in one round trip."""

    async def load_with_reply(
        self, key: StreamKey, deadline_s: float | None = None
    ) -> tuple[StreamState | None, StoredReply | None]:
        """One stream and its kept reply, read together.

        Raises:
            CarryError: the state is damaged.
        """

    async def commit(
        self, commits: Sequence[Commit], deadline_s: float | None = None
    ) -> list[CommitResult]:
        """Compare-and-set many streams in one round trip, each on its own.

        A key may occur once per call. The reply is written before the state.
        """

    async def delete(
        self, key: StreamKey, expected: StreamHead | None = None, deadline_s: float | None = None
    ) -> CommitResult:
        """Delete a stream and its reply; with `expected`, only if the stream is at that head.

        Nothing that was sent to the store before the answer is applied after it: a tombstone is
        kept for a while, even if there was no stream (but not if `expected` differs).

        Returns:
            Committed if it was there and is gone, otherwise Conflicted with what was found.
        """

    async def streams(self, model: str, prefix: str, cursor: str | None, limit: int) -> StreamPage:
        """A page of stream names, in no order; a name may come twice over a whole listing.

        Streams that exist throughout are listed at least once. Never blocks the server for
        longer than one bounded scan step.
        """
