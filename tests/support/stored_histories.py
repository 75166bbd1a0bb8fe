"""Histories of streams as a store keeps them: commits with entries, and what is read back."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from service.core.values import Feed, Steps, StreamKey, StreamState
from service.store.base import COMMITTED, CommitResult, Store
from service.store.history import HistoryColumns, HistoryCopy, StoredHistory
from service.store.history_codec import HistoryCodec, read_range
from tests.support.streams import Commit, columns

CODEC = HistoryCodec(None, 1)
EVENTS, SNAPSHOTS = 64, 21
"""So many that one is taken every four events."""


def entry_of(commit: Commit, events: int = EVENTS) -> bytes:
    """The entry of a commit's chunk, whose rows are the positions of its events."""
    assert commit.new.last is not None
    start, stop = commit.new.last.start, commit.new.head.position
    rows = np.arange(start, stop, dtype=np.float32)[:, np.newaxis]
    steps = Steps(Feed.INPUTS, stop - start, None, rows)
    return CODEC.encode_last(start, steps, events, starts=start == 0)


async def commit_all(
    store: Store, *commits: Commit, events: int = EVENTS, snapshots: int = SNAPSHOTS
) -> list[CommitResult]:
    """Commit chunks with their histories."""
    entries = [entry_of(commit, events) if events else b"" for commit in commits]
    histories = HistoryColumns(entries, events, snapshots)
    return await store.commit(replace(columns(*commits), histories=histories))


async def keep(store: Store, *commits: Commit, **options: int) -> None:
    """Commit chunks with their histories, and assert that each is written."""
    assert await commit_all(store, *commits, **options) == [COMMITTED] * len(commits)


async def read(
    store: Store, state: StreamState, name: StreamKey, position: int | None = None
) -> StoredHistory:
    """Read a history by the version that wrote the state."""
    return await store.histories.read(name, state.fingerprint, position)


def ranges(history: StoredHistory | HistoryCopy) -> list[range]:
    """The positions of a history's entries."""
    return list(map(read_range, history.entries))


def as_version(state: StreamState, fingerprint: bytes) -> StreamState:
    """The state as another version wrote it."""
    return state._replace(fingerprint=fingerprint)
