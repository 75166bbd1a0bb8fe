"""The histories of streams: recent events, snapshots, and states for other versions of the model.

A commit writes the history of its streams in the same step if its columns have one. A history that
a commit did not keep is not valid: it counts as none, and the next commit that keeps one begins
another. The bytes of an entry are those of `service.store.history_codec`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from service.core.values import StreamKey

if TYPE_CHECKING:
    from service.store.base import CommitResult


class HistoryColumns(msgspec.Struct, frozen=True):
    """What commits add to the histories of their streams.

    Attributes:
        entries: the encoded entry of each chunk; unused without events.
        events: how many of the last events are kept, and with them the chunk of the first one; 0
            keeps only the states for other versions.
        snapshots: most snapshots that are kept, at least 1.
    """

    entries: Sequence[bytes]
    events: int
    snapshots: int

    def select(self, at: Sequence[int]) -> HistoryColumns:
        """The items at these indexes."""
        return HistoryColumns([self.entries[index] for index in at], self.events, self.snapshots)


class StoredHistory(NamedTuple):
    """A stream with its history, read in one step.

    Attributes:
        record: the stored state or tombstone; None if there is none.
        is_valid: whether the history leads to this state; otherwise it is empty.
        entries: encoded, oldest first, without gaps up to the state's position.
        snapshot: the newest state that the version wrote at or before the position; None if there
            is none, or if no position was given.
        positions: of all snapshots that the version wrote, ascending.
        version_state: the stored state of the stream for the version, in the state's epoch, at its
            position or before; None if there is none, or if the version wrote the state itself.
    """

    record: bytes | None
    is_valid: bool = False
    entries: Sequence[bytes] = ()
    snapshot: bytes | None = None
    positions: Sequence[int] = ()
    version_state: bytes | None = None


class HistoryCopy(NamedTuple):
    """The recent events of a stream and all snapshots, encoded, oldest first."""

    entries: Sequence[bytes] = ()
    snapshots: Sequence[bytes] = ()


class Histories(Protocol):
    """Reads the histories of a store, and writes those that no chunk leads to."""

    async def read(
        self,
        key: StreamKey,
        fingerprint: bytes,
        position: int | None = None,
        deadline_s: float = math.inf,
    ) -> StoredHistory:
        """Read a stream with its history.

        Args:
            fingerprint: of the version whose snapshots and state are read.
            position: reads the newest snapshot at or before it; None reads no snapshot.

        Raises:
            StoreUnavailable, StoreRefused
        """

    async def copy(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[tuple[bytes | None, HistoryCopy | None]]:
        """Read what is stored of streams, each with its history: None if that is not valid.

        Raises:
            StoreUnavailable, StoreRefused
        """

    async def write(
        self,
        key: StreamKey,
        expected: bytes,
        state: bytes,
        history: HistoryCopy,
        deadline_s: float = math.inf,
        *,
        reply: bytes = b"",
        keeps_snapshots: bool = False,
    ) -> CommitResult:
        """Compare-and-set a stream to a state that no chunk led to, with the whole history that
        leads to it; one that is empty starts with a snapshot of the state.

        The states for other versions are deleted.

        Args:
            expected: as of `CommitColumns`.
            history: its entries end at the position of the state (`HistoryCodec.keep_until`).
            reply: as of `CommitColumns`.
            keeps_snapshots: whether the stored snapshots up to the position of the state are kept.

        Raises:
            StoreUnavailable, StoreRefused: nothing was written.
        """

    async def commit_versions(
        self, keys: Sequence[StreamKey], states: Sequence[bytes], deadline_s: float = math.inf
    ) -> list[bool]:
        """Write states of streams for versions that did not answer; returns which were written.

        A state is not written if the stream is in another epoch, or did not have the head of the
        state as far as its entries reach, its history is not valid, the version itself wrote the
        stream's state, or a state for it is stored at the same position or further; nor if the
        store does not answer. A key may occur once per call.
        """
