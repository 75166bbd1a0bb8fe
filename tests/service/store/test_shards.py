"""An unresponsive shard of a cluster blocks its own streams only."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.errors import DeadlineExceeded, StoreUnavailable
from service.core.values import Reply, StreamKey
from service.engine.fair_queue import RunningBatch, Work
from service.pipeline.chunk_batch import ChunkBatchRunner
from service.pipeline.chunk_job import ChunkJob
from service.pipeline.pipeline import Pipeline
from service.pipeline.shards import Shards
from service.store.base import StoredValue
from service.store.keys import KeySpace
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.pipelines import chunk_of, make_artifact, oracle_outputs, rows_of, worker
from tests.support.servers import until_async

PARTITIONS = 16
DOWN = 2
WITHIN_S = 60
"""Far less than the chunks' deadlines, and far more than a chunk of a healthy shard takes."""


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def settings(own_cluster: Cluster) -> StoreSettings:
    return StoreSettings(own_cluster.url, partitions=PARTITIONS, store_wait_s=30)


@pytest.fixture
async def pipeline(settings: StoreSettings, artifact: Artifact) -> AsyncIterator[Pipeline]:
    async with worker("", artifact, store=RedisStore(settings), in_flight=2) as one:
        yield one


@contextmanager
def one_shard_down(cluster: Cluster) -> Iterator[None]:
    """Pause a primary and its replica, so that there is no failover."""
    nodes = (cluster.replicas[DOWN], cluster.primaries[DOWN])
    cluster.configure("cluster-require-full-coverage", "no")
    for node in nodes:
        node.pause()
    try:
        yield
    finally:
        for node in nodes:
            node.resume()
        cluster.configure("cluster-require-full-coverage", "yes")
        cluster.wait_until_synced()


def stream_names(
    cluster: Cluster, keys: KeySpace, prefix: str, count: int, *, down: bool
) -> list[str]:
    """Names of streams on the shard that is paused (`down`), or on the others."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        name, number = f"{prefix}{number}", number + 1
        key = keys.state(chunk_of(name, np.zeros((1, 3), np.float32)).key)
        if (cluster.owner(key) == DOWN) == down:
            found.append(name)
    return found


def later() -> float:
    return time.monotonic() + 120


@pytest.mark.parametrize("is_known", [False, True], ids=["load", "commit"])
async def test_an_unresponsive_shard_holds_no_batch_slots(
    own_cluster: Cluster,
    settings: StoreSettings,
    artifact: Artifact,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_known: bool,
) -> None:
    """Neither during a load nor during a commit; waiting is not counted as an attempt."""
    attempts, run = set(), ChunkBatchRunner.__call__

    async def noting(
        self: ChunkBatchRunner, jobs: list[ChunkJob], batch: RunningBatch
    ) -> list[ChunkJob]:
        attempts.update(job.attempts for job in jobs)
        return await run(self, jobs, batch)

    monkeypatch.setattr(ChunkBatchRunner, "__call__", noting)
    rows = rows_of(np.random.default_rng(56), 8)
    *late, short = stream_names(own_cluster, settings.keys, "late", 21, down=True)
    good = stream_names(own_cluster, settings.keys, "good", 20, down=False)
    if is_known:
        for name in (*late, *good):
            await pipeline.process(ANYONE, chunk_of(name, rows[:4], 0), later())
    start = 4 if is_known else 0

    async def send(name: str) -> Reply:
        return await pipeline.process(ANYONE, chunk_of(name, rows[start:], start), later())

    async def is_short_chunk_unavailable() -> bool:
        """Unless a busy machine suspends this process until the deadline."""
        try:
            await pipeline.process(ANYONE, chunk_of(short, rows, 0), time.monotonic() + 0.5)
        except StoreUnavailable:
            return True
        except DeadlineExceeded:
            return False
        raise AssertionError("its shard is down")

    with one_shard_down(own_cluster):
        waiting = [asyncio.create_task(send(name)) for name in late]
        async with asyncio.timeout(WITHIN_S):
            await asyncio.gather(*map(send, good[:10]))
            for name in good[10:]:
                await send(name)
        assert not any(task.done() for task in waiting)
        await until_async(is_short_chunk_unavailable, "an unavailable store")
    for reply in await asyncio.gather(*waiting):
        assert not reply.replayed
        np.testing.assert_allclose(
            reply.outputs, oracle_outputs(artifact, rows)[start:], rtol=1e-5, atol=1e-5
        )
    assert attempts == {0}


class Hanging(RedisStore):
    """Loads wait for a gate; one with a deadline before 2 gets no answer."""

    def __init__(self) -> None:
        super().__init__(StoreSettings("redis://127.0.0.1:1"))
        self.gate = asyncio.Event()

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[StoredValue]:
        if deadline_s < 2:
            raise StoreUnavailable("no answer in time")
        await self.gate.wait()
        return [None] * len(keys)


class Detached:
    """Detaches jobs of two chunks at most; `requeued` are those whose work ended."""

    def __init__(self) -> None:
        self.store = Hanging()
        self.shards = Shards(self.store, max_detached=2)
        self.batch = RunningBatch([], set(), lambda _: None, self._detach)
        self.work: list[asyncio.Future[Sequence[Any]]] = []

    def _detach(self, _: RunningBatch, jobs: Sequence[ChunkJob], work: Work) -> None:
        self.work.append(asyncio.ensure_future(work))

    async def requeued(self) -> list[ChunkJob]:
        return [job for jobs in await asyncio.gather(*self.work) for job in jobs]


def jobs(count: int, *deadlines_s: float) -> list[ChunkJob]:
    chunks = [chunk_of(f"s{n}", np.zeros((1, 3), np.float32)) for n in range(count)]
    ends_s = deadlines_s or [math.inf] * count
    return [
        ChunkJob(each, each.key, 1, 0.0, end_s, lambda _: None)
        for each, end_s in zip(chunks, ends_s, strict=True)
    ]


async def test_chunks_that_wait_for_an_unresponsive_shard_are_bounded() -> None:
    """Detached commits are never rejected, and so exceed the bound."""
    detached = Detached()
    shards, batch = detached.shards, detached.batch
    waiting, late = jobs(3), jobs(4)
    shards.detach_until_answer("shard", waiting, batch)
    assert [job.is_resolved for job in waiting] == [False, False, True]

    async def commit() -> list[ChunkJob]:
        await detached.store.gate.wait()
        return []

    shards.detach("shard", jobs(3), batch, commit())
    shards.detach_until_answer("shard", late, batch)
    assert all(job.is_resolved for job in late)
    detached.store.gate.set()
    assert await detached.requeued() == waiting[:2]
    assert not shards.unresponsive
    again = jobs(2)
    shards.detach_until_answer("shard", again, batch)
    assert not any(job.is_resolved for job in again)
    await detached.requeued()


async def test_a_short_deadline_does_not_cancel_the_wait_of_others_for_a_shard() -> None:
    """The shard answers after the deadline of one chunk and before that of the other."""
    detached = Detached()
    detached.store.gate.set()
    hurried, patient = jobs(2, 1.0, 3.0)
    detached.shards.detach_until_answer("shard", [hurried, patient], detached.batch)
    assert patient in await detached.requeued()
    assert not patient.is_resolved
