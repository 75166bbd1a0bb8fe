"""A batch that runs alone is committed in parts, each with its own outcome."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from service.core.errors import InternalError, StoreRefused
from service.core.values import Reply
from service.pipeline.chunk_job import ChunkJob
from service.store.base import CommitColumns, CommitResult
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.pipelines import chunk_of, make_artifact, oracle_outputs, rows_of, worker


class PartsStore(RedisStore):
    """Fails the second of its commits as a whole, before the others are answered."""

    def __init__(self, settings: StoreSettings, error: Exception):
        super().__init__(settings)
        self.sizes: list[int] = []
        self.error = error

    async def commit(
        self, commits: CommitColumns, deadline_s: float | None = None
    ) -> list[CommitResult]:
        self.sizes.append(len(commits.keys))
        if len(self.sizes) == 2:
            raise self.error
        await super().load(commits.keys[:1])
        return await super().commit(commits, deadline_s)


@pytest.mark.parametrize(
    ("error", "told"),
    [(StoreRefused("no room"), StoreRefused), (ZeroDivisionError("unforeseen"), InternalError)],
)
async def test_commit_parts_fail_independently(
    store_url: str, tmp_path: Path, error: Exception, told: type[Exception]
) -> None:
    """A retry of the whole request then applies only what was not applied."""
    artifact, rows = make_artifact(tmp_path), rows_of(np.random.default_rng(51), 4)
    store = PartsStore(StoreSettings(store_url, wait_s=5), error)
    chunks = [chunk_of(f"p{index}", rows, 0) for index in range(8)]
    async with worker(store_url, artifact, store=store) as one:
        found = await one.process_many(chunks)
        assert store.sizes == [4, 4]
        again = await one.process_many(chunks)
    assert [type(each) for each in found] == [Reply] * 4 + [told] * 4
    replies = [reply for reply in again if isinstance(reply, Reply)]
    assert [reply.replayed for reply in replies] == [True] * 4 + [False] * 4
    for reply in replies:
        np.testing.assert_allclose(
            reply.outputs, oracle_outputs(artifact, rows), rtol=1e-5, atol=1e-5
        )


class FullStore(RedisStore):
    """Refuses every commit."""

    async def commit(
        self, commits: CommitColumns, deadline_s: float | None = None
    ) -> list[CommitResult]:
        raise StoreRefused("no room")


async def test_chunks_whose_commit_failed_are_freed(store_url: str, tmp_path: Path) -> None:
    """Their error refers to them by its traceback, and they refer to it by their ticket."""
    artifact, rows = make_artifact(tmp_path), rows_of(np.random.default_rng(52), 2)
    store = FullStore(StoreSettings(store_url, wait_s=5))
    before = count_jobs()
    async with worker(store_url, artifact, store=store) as one:
        for _ in range(5):
            found = await one.process_many([chunk_of("f1", rows, 0), chunk_of("f2", rows, 0)])
            assert [type(each) for each in found] == [StoreRefused] * 2
    del found
    assert count_jobs() <= before


def count_jobs() -> int:
    gc.collect()
    return sum(isinstance(each, ChunkJob) for each in gc.get_objects())
