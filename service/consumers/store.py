"""The store of a consumer: the commits of its chunks also write outputs and acknowledge entries.

A stream whose state already contains events of its chunk (a source mark) is not loaded for it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Protocol

from service.core.errors import CarryError, Conflict
from service.core.values import StreamKey, StreamState
from service.store.base import CommitColumns, CommitResult, StoredValue, decode_value
from service.store.codec import has_source_mark
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings


class Committer(Protocol):
    """Commits the chunks that were made of a topic's entries."""

    async def commit(self, commits: CommitColumns, deadline_s: float) -> list[CommitResult]:
        """Commit chunks of different streams; as `StateStore.commit`."""

    def check_source(self, key: StreamKey, stored: StreamState) -> CarryError | None:
        """Check that no event of a stream's chunk is in its stored state already, which has a
        source mark."""


class TopicStore(RedisStore):
    """A store whose commits go through the topic of each stream's chunk.

    Attributes:
        committers: the topic of the stream's chunk that is processed now. A chunk is put here
            before it is queued, and removed when it is resolved, so that a commit never meets
            another chunk's entries.
    """

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self.committers: dict[StreamKey, Committer] = {}

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[StoredValue]:
        values = await super().load(keys, deadline_s)
        for index, value in enumerate(values):
            if isinstance(value, bytes) and has_source_mark(value):
                key = keys[index]
                stored, committer = decode_value(key, value), self.committers.get(key)
                if isinstance(stored, StreamState) and committer is not None:
                    values[index] = committer.check_source(key, stored) or value
        return values

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        groups: dict[Committer, list[int]] = {}
        results: dict[int, CommitResult] = {}
        for index, key in enumerate(commits.keys):
            committer = self.committers.get(key)
            if committer is None:
                results[index] = Conflict(f"stream {key.stream!r} has no entries to acknowledge")
            else:
                groups.setdefault(committer, []).append(index)
        parts = [
            committer.commit(commits.select(at), deadline_s) for committer, at in groups.items()
        ]
        # a task would be started later
        done = [await parts[0]] if len(parts) == 1 else await asyncio.gather(*parts)
        for at, part in zip(groups.values(), done, strict=True):
            results.update(zip(at, part, strict=True))
        in_order = [results[index] for index in range(len(commits.keys))]
        if self.outputs.watched:
            self._publish(commits, in_order)
        return in_order
