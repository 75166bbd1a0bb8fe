"""Quotas of streams with two workers on one store, a single server and a cluster."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from models.artifact.artifact import Artifact
from service.access import limits as module
from service.access.caller import ANYONE, Caller, Verb
from service.access.limits import StreamQuota
from service.core.errors import CarryError, LimitExceeded, StoreUnavailable
from service.core.values import Precondition, Reply, StreamKey
from service.pipeline import chunk_load
from service.pipeline.pipeline import Pipeline
from service.pipeline.shards import SHARD_TIMEOUT_S
from service.store.capabilities import Quota
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster, own_cluster, shared_cluster
from tests.support.pipelines import chunk_of, rows_of
from tests.support.pipelines import worker as pipeline_worker
from tests.support.servers import RealServer, emptied
from tests.support.versions import stop_polling

__all__ = ["own_cluster", "shared_cluster"]

KEY, OTHER = "0123456789ab", "ba9876543210"
MOST = 5
ROWS = rows_of(np.random.default_rng(7), 1)


@pytest.fixture(params=["single", "cluster"])
def server(request: pytest.FixtureRequest, pipeline_server: RealServer) -> RealServer | Cluster:
    is_single = request.param == "single"
    return emptied(pipeline_server if is_single else request.getfixturevalue("shared_cluster"))


@pytest.fixture(autouse=True)
def count_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster, for longer than a busy machine suspends its server."""
    monkeypatch.setattr(chunk_load, "SHARD_TIMEOUT_S", 60.0)


@dataclass(frozen=True)
class Tenant:
    """The holder of a key at one worker."""

    pipeline: Pipeline
    caller: Caller

    async def create(self, stream: str) -> bool:
        """Create a stream, unless it exists; returns whether the quota accepted it."""
        (result,) = await self.pipeline.process_many(self.caller, [chunk_of(stream, ROWS, 0)])
        if isinstance(result, StoreUnavailable):
            raise result
        return not isinstance(result, LimitExceeded)

    async def delete(self, stream: str) -> None:
        await self.pipeline.streams.delete(self.caller, StreamKey("probe", stream))

    async def delete_prefix(self, prefix: str) -> int:
        deleted, cursor = await self.pipeline.streams.delete_prefix(self.caller, "probe", prefix)
        assert cursor is None
        return deleted

    async def fork(self, stream: str, to: str, precondition: Precondition | None = None) -> None:
        key = StreamKey("probe", stream)
        await self.pipeline.streams.fork(self.caller, key, to, precondition)


@dataclass(frozen=True)
class Worker:
    """A worker on a store of its own connections."""

    pipeline: Pipeline
    store: RedisStore

    def tenant(self, key_id: str, streams: int | None) -> Tenant:
        """The holder of a key with a quota of streams, or of one without a quota."""
        quota = (
            None if streams is None else StreamQuota(self.store.usage, key_id, Quota(streams, None))
        )
        return Tenant(self.pipeline, Caller(key_id, "test", frozenset(Verb), ("*",), quota=quota))


@asynccontextmanager
async def worker(server: RealServer | Cluster, artifact: Artifact) -> AsyncIterator[Worker]:
    store = RedisStore(StoreSettings(server.url, store_wait_s=60))
    async with pipeline_worker(server.url, artifact, store=store) as pipeline:
        yield Worker(pipeline, store)


@pytest.fixture
async def workers(
    server: RealServer | Cluster, artifact: Artifact
) -> AsyncIterator[tuple[Worker, Worker]]:
    async with worker(server, artifact) as first, worker(server, artifact) as second:
        yield first, second


def both(workers: tuple[Worker, Worker], most: int = MOST) -> list[Tenant]:
    """A tenant with a quota of streams, at both workers."""
    return [each.tenant(KEY, most) for each in workers]


async def stored(worker: Worker) -> set[str]:
    """The streams that exist."""
    page = await worker.pipeline.streams.page(ANYONE, "probe", "", None, 1000)
    names = {*page.streams}
    while page.cursor is not None:
        page = await worker.pipeline.streams.page(ANYONE, "probe", "", page.cursor, 1000)
        names |= {*page.streams}
    return names


async def test_deletions_free_the_quota_at_once_on_every_worker(
    workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both(workers)
    # without what removes what does not exist once the quota is reached
    monkeypatch.setattr(module, "RECONCILE_S", math.inf)
    for delete in ("prefix", "streams"):
        for number in range(MOST):
            assert await first.create(f"{delete}:{number}")
        assert not await second.create(f"{delete}:more")
        if delete == "prefix":
            assert await second.delete_prefix("prefix:") == MOST
        else:
            for number in range(MOST):
                await second.delete(f"streams:{number}")
        for each in (first, second):
            assert await each.create(f"{delete}:after")
            await each.delete(f"{delete}:after")


async def test_deletions_by_other_keys_and_expiry_free_the_quota(
    workers: tuple[Worker, Worker], server: RealServer | Cluster
) -> None:
    first, second = both(workers)
    for number in range(MOST):
        assert await first.create(f"s{number}")
    admin = workers[0].tenant(OTHER, None)
    assert await admin.delete_prefix("s") == MOST
    # the first stream over the quota finds what was deleted
    created = [await second.create(f"t{number}") for number in range(MOST + 1)]
    assert created == [True] * MOST + [False]
    keys = StoreSettings(server.url).keys
    with server.client() as client:
        for number in range(MOST):
            client.delete(keys.state(StreamKey("probe", f"t{number}")))
    assert await first.create("u")


async def test_streams_of_other_keys_do_not_count(workers: tuple[Worker, Worker]) -> None:
    first, _ = both(workers, 1)
    other = workers[1].tenant(OTHER, None)
    assert await other.create("other")
    assert await first.create("own")
    reply = await first.pipeline.process(first.caller, chunk_of("other", ROWS, 1))
    assert isinstance(reply, Reply)
    # nor if a stream that exists starts over
    for position in (0, None):
        over = replace(chunk_of("other", ROWS, position), starts_over=True)
        assert (await first.pipeline.process(first.caller, over)).created
    assert not await first.create("more")
    with pytest.raises(LimitExceeded):
        await first.pipeline.process(first.caller, replace(over, key=StreamKey("probe", "more")))


async def test_restores_and_forks_count_if_they_create_a_stream(
    workers: tuple[Worker, Worker],
) -> None:
    first, second = both(workers, 2)
    assert await first.create("a")
    await second.fork("a", "b")
    with pytest.raises(LimitExceeded):
        await first.fork("a", "c")
    # it replaces a stream that counts already
    await second.fork("a", "b", Precondition(any_state=True))
    assert await stored(workers[0]) == {"a", "b"}
    # one over the quota finds what another key deleted
    await workers[1].tenant(OTHER, None).delete("b")
    await second.fork("a", "c")
    assert await stored(workers[0]) == {"a", "c"}


async def test_a_quota_counts_existing_streams_under_concurrency(
    workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers create and delete the same streams, and remove what does not exist."""
    monkeypatch.setattr(module, "RECONCILE_S", 0.02)
    random = Random(3)
    pipelines = both(workers)
    usage = workers[0].store.usage
    anyone = [*pipelines, workers[1].tenant(OTHER, None)]
    names = [f"s{number}" for number in range(12)]
    accepted = 0
    for _ in range(20):
        calls: list[Coroutine[Any, Any, Any]] = [usage.reconcile(KEY)]
        for _ in range(24):
            name = random.choice(names)
            if random.random() < 0.6:
                calls.append(random.choice(pipelines).create(name))
            else:
                calls.append(random.choice(anyone).delete(name))
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(each, bool | CarryError | None) for each in done), done
        accepted += done.count(True)
        existing = await stored(workers[0])
        assert len(existing) <= MOST
        assert all(
            await usage.find_registrations(KEY, [StreamKey("probe", name) for name in existing])
        )
    assert accepted > 3 * MOST


async def test_a_chunk_of_a_stream_that_exists_costs_no_access_to_the_count(
    pipeline_server: RealServer, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_polling(monkeypatch)
    async with worker(emptied(pipeline_server), artifact) as alone:
        first = alone.tenant(KEY, 1)
        assert await first.create("s")
        with pipeline_server.client() as client:
            client.config_resetstat()
            for position in range(1, 9):
                await first.pipeline.process(first.caller, chunk_of("s", ROWS, position))
            calls = client.info("commandstats")
    assert {name for name in calls if name.startswith("cmdstat_h")} <= {"cmdstat_hello"}
    assert calls["cmdstat_evalsha"]["calls"] == 8


async def test_an_unavailable_count_delays_other_streams_once(
    artifact: Artifact, shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(emptied(shared_cluster), artifact) as alone:
        first, other = alone.tenant(KEY, 9), alone.tenant(OTHER, None)
        calls: list[float] = []

        async def register(*_: Any) -> None:
            calls.append(_[-1] - time.monotonic())
            raise StoreUnavailable("away")

        with monkeypatch.context() as broken:
            broken.setattr(alone.store.usage, "register", register)
            broken.setattr(chunk_load, "SHARD_TIMEOUT_S", SHARD_TIMEOUT_S)
            broken.setattr(chunk_load, "RETRY_AFTER_S", 3600.0)
            for number in range(4):
                with pytest.raises(StoreUnavailable):
                    await first.create(f"s{number}")
                assert await other.create(f"t{number}")
        # and for a fraction of a chunk's deadline
        assert len(calls) == 1
        assert calls[0] <= SHARD_TIMEOUT_S
