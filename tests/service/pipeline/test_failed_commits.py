"""Commits that fail: what their batch leaves behind, and how often a chunk is tried."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.errors import Conflict, StoreRefused
from service.pipeline.chunk_job import ChunkJob
from service.store.base import CommitColumns, CommitResult, Conflicted
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.pipelines import Counts, chunk_of, make_artifact, rows_of, send, worker


class FullStore(RedisStore):
    """Rejects every commit."""

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        raise StoreRefused("no room")


async def test_chunks_whose_commit_failed_are_freed(store_url: str, tmp_path: Path) -> None:
    """Their error refers to them by its traceback, and they refer to it by their ticket."""
    artifact, rows = make_artifact(tmp_path), rows_of(np.random.default_rng(52), 2)
    store = FullStore(StoreSettings(store_url, store_wait_s=60))
    before = count_jobs()
    async with worker(store_url, artifact, store=store) as one:
        for _ in range(5):
            found = await one.process_many(
                ANYONE, [chunk_of("f1", rows, 0), chunk_of("f2", rows, 0)]
            )
            assert [type(each) for each in found] == [StoreRefused] * 2
    del found
    assert count_jobs() <= before


def count_jobs() -> int:
    gc.collect()
    return sum(isinstance(each, ChunkJob) for each in gc.get_objects())


class ContestedStore(RedisStore):
    """Another writer is faster each time."""

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        return [Conflicted(None)] * len(commits.keys)


async def test_chunk_is_tried_a_limited_number_of_times(store_url: str, artifact: Artifact) -> None:
    counts, store = Counts(), ContestedStore(StoreSettings(store_url))
    async with worker(store_url, artifact, counts, store=store) as one:
        with pytest.raises(Conflict, match="64 times"):
            await send(one, "contested", rows_of(np.random.default_rng(53), 2), 0)
    assert counts.seen["conflicts"] == 64
