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
from service.core.errors import CarryError, StoreUnavailable
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

PARTITIONS = 16
DOWN = 2
WITHIN_S = 20
"""Far less than the chunks' deadlines, and far more than a chunk of a healthy shard takes."""


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def settings(own_cluster: Cluster) -> StoreSettings:
    return StoreSettings(own_cluster.url, partitions=PARTITIONS, store_wait_s=3)


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

    with one_shard_down(own_cluster):
        waiting = [asyncio.create_task(send(name)) for name in late]
        async with asyncio.timeout(WITHIN_S):
            await asyncio.gather(*map(send, good[:10]))
            for name in good[10:]:
                await send(name)
        assert not any(task.done() for task in waiting)
        with pytest.raises(StoreUnavailable):
            await pipeline.process(ANYONE, chunk_of(short, rows, 0), time.monotonic() + 0.5)
    for reply in await asyncio.gather(*waiting):
        assert not reply.replayed
        np.testing.assert_allclose(
            reply.outputs, oracle_outputs(artifact, rows)[start:], rtol=1e-5, atol=1e-5
        )
    assert attempts == {0}


async def test_chunks_waiting_for_an_unresponsive_shard_are_bounded(
    own_cluster: Cluster,
    settings: StoreSettings,
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At half of the queue's limit; more of them fail at once."""
    full, detach = asyncio.Event(), Shards.detach

    def noting(self: Shards, *given: Any) -> None:
        detach(self, *given)
        if self._detached == 10:
            full.set()

    monkeypatch.setattr(Shards, "detach", noting)
    rows = rows_of(np.random.default_rng(57), 4)
    late = stream_names(own_cluster, settings.keys, "late", 40, down=True)
    (good,) = stream_names(own_cluster, settings.keys, "good", 1, down=False)
    async with worker("", artifact, store=RedisStore(settings), in_flight=2, queue=20) as one:
        with one_shard_down(own_cluster):
            sent = [
                asyncio.create_task(one.process(ANYONE, chunk_of(late[n], rows, 0), later()))
                for n in range(10)
            ]
            async with asyncio.timeout(WITHIN_S):
                await full.wait()
                await one.process(ANYONE, chunk_of(good, rows, 0), later())
                for name in late[10:]:
                    with pytest.raises(StoreUnavailable, match="10 chunks wait"):
                        await one.process(ANYONE, chunk_of(name, rows, 0), later())
            assert not any(task.done() for task in sent)
        for outcome in await asyncio.gather(*sent, return_exceptions=True):
            assert not isinstance(outcome, CarryError)


async def test_chunks_beyond_the_bound_are_rejected_while_commits_exceed_it() -> None:
    """Detached commits are never rejected, and so exceed the bound."""
    tasks: list[asyncio.Task[None]] = []
    gate = asyncio.Event()

    def detach(_: RunningBatch, jobs: Sequence[ChunkJob], work: Work) -> None:
        tasks.append(asyncio.create_task(resolved(work)))

    async def resolved(work: Work) -> None:
        await work

    async def commit() -> list[ChunkJob]:
        await gate.wait()
        return []

    def ignore(_: Reply | CarryError) -> None:
        pass

    def jobs(count: int) -> list[ChunkJob]:
        chunks = [chunk_of(f"s{n}", np.zeros((1, 3), np.float32)) for n in range(count)]
        return [ChunkJob(each, each.key, 1, 0.0, math.inf, ignore) for each in chunks]

    shards = Shards(RedisStore(StoreSettings("redis://127.0.0.1:1")), max_detached=2)
    batch = RunningBatch([], set(), lambda _: None, detach)
    shards.detach("shard", jobs(3), batch, commit())
    late = jobs(4)
    shards.detach_until_answer("shard", late, batch)
    assert all(job.is_resolved for job in late)
    gate.set()
    await asyncio.gather(*tasks)
    assert not shards._detached


async def test_shutdown_waits_for_an_unresponsive_shard_within_its_drain_time(
    own_cluster: Cluster, settings: StoreSettings, artifact: Artifact
) -> None:
    rows = rows_of(np.random.default_rng(58), 4)
    (late,) = stream_names(own_cluster, settings.keys, "late", 1, down=True)
    (good,) = stream_names(own_cluster, settings.keys, "good", 1, down=False)
    store = RedisStore(settings)
    async with worker("", artifact, store=store, in_flight=2, drain_s=0.1) as one:
        with one_shard_down(own_cluster):
            waiting = asyncio.create_task(one.process(ANYONE, chunk_of(late, rows, 0), later()))
            async with asyncio.timeout(WITHIN_S):
                await one.process(ANYONE, chunk_of(good, rows, 0), later())
                await one.stop()
                with pytest.raises(CarryError):
                    await waiting


async def test_a_short_deadline_does_not_cancel_the_wait_of_others_for_a_shard() -> None:
    """The shard answers after the deadline of one chunk and before that of the other."""
    requeued: list[asyncio.Task[list[ChunkJob]]] = []

    class Late(RedisStore):
        async def load(
            self, keys: Sequence[StreamKey], deadline_s: float = math.inf
        ) -> list[StoredValue]:
            if deadline_s < 2:
                raise StoreUnavailable("no answer in time")
            return [None] * len(keys)

    def detach(_: RunningBatch, jobs: Sequence[ChunkJob], work: Work) -> None:
        requeued.append(asyncio.ensure_future(work))

    chunks = [chunk_of(name, np.zeros((1, 3), np.float32)) for name in "ab"]
    hurried, patient = (
        ChunkJob(each, each.key, 1, 0.0, deadline_s, lambda _: None)
        for each, deadline_s in zip(chunks, (1.0, 3.0), strict=True)
    )
    shards = Shards(Late(StoreSettings("redis://127.0.0.1:1")), max_detached=2)
    batch = RunningBatch([], set(), lambda _: None, detach)
    shards.detach_until_answer("shard", [hurried, patient], batch)
    assert patient in await requeued[0]
    assert not patient.is_resolved
