"""What a batch leaves behind whose commit failed."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np

from service.access.caller import ANYONE
from service.core.errors import StoreRefused
from service.pipeline.chunk_job import ChunkJob
from service.store.base import CommitColumns, CommitResult
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.pipelines import chunk_of, make_artifact, rows_of, worker


class FullStore(RedisStore):
    """Refuses every commit."""

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        raise StoreRefused("no room")


async def test_chunks_whose_commit_failed_are_freed(store_url: str, tmp_path: Path) -> None:
    """Their error refers to them by its traceback, and they refer to it by their ticket."""
    artifact, rows = make_artifact(tmp_path), rows_of(np.random.default_rng(52), 2)
    store = FullStore(StoreSettings(store_url, store_wait_s=5))
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
