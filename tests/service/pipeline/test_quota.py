"""Quotas of streams with two workers on one store, a single server and a cluster."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.limits import KeyLimits
from service.access.principal import Principal, Verb
from service.core.errors import CarryError, LimitExceeded, StoreUnavailable
from service.core.values import Precondition, Reply, StreamKey
from service.pipeline import quota as module
from service.pipeline.pipeline import Pipeline
from service.pipeline.scoped_pipeline import ScopedPipeline
from service.pipeline.shards import SHARD_TIMEOUT_S
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster, own_cluster, shared_cluster
from tests.support.pipelines import chunk_of, rows_of, worker
from tests.support.servers import RealServer, emptied

__all__ = ["own_cluster", "shared_cluster"]

KEY, OTHER = "0123456789ab", "ba9876543210"
MOST = 5
ROWS = rows_of(np.random.default_rng(7), 1)


@pytest.fixture(params=["single", "cluster"])
def server(request: pytest.FixtureRequest, pipeline_server: RealServer) -> RealServer | Cluster:
    is_single = request.param == "single"
    return emptied(pipeline_server if is_single else request.getfixturevalue("shared_cluster"))


@pytest.fixture
async def workers(
    server: RealServer | Cluster, artifact: Artifact
) -> AsyncIterator[tuple[Pipeline, Pipeline]]:
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(worker(server.url, artifact)) for _ in range(2)
        ]
        yield first, second


def scoped(pipeline: Pipeline, limits: KeyLimits | None, key_id: str = KEY) -> ScopedPipeline:
    """The pipeline as a request with this key gets it."""
    principal = Principal(key_id, "test", frozenset(Verb), ("*",), limits=limits)
    return ScopedPipeline(pipeline, principal, None, pipeline.quotas.quota(key_id, limits))


def both(workers: tuple[Pipeline, Pipeline], most: int = MOST) -> list[ScopedPipeline]:
    """Both workers, for a key with a quota of streams."""
    return [scoped(worker, KeyLimits(streams=most)) for worker in workers]


async def create(pipeline: ScopedPipeline, stream: str) -> bool:
    """Create a stream; returns whether the quota accepted it."""
    (result,) = await pipeline.process_many([chunk_of(stream, ROWS, 0)])
    return not isinstance(result, LimitExceeded)


async def stored(pipeline: Pipeline) -> set[str]:
    """The streams that exist."""
    page = await pipeline.streams.page("probe", "", None, 1000)
    names = {*page.streams}
    while page.cursor is not None:
        page = await pipeline.streams.page("probe", "", page.cursor, 1000)
        names |= {*page.streams}
    return names


async def test_streams_deleted_by_another_worker_count_when_they_are_created_again(
    workers: tuple[Pipeline, Pipeline],
) -> None:
    first, second = both(workers)
    for number in range(20):
        name = f"s{number}"
        await create(first, name)
        try:
            await second.streams.delete(StreamKey("probe", name))
        except CarryError:
            assert number >= MOST
        await create(first, name)
    assert len(await stored(workers[0])) == MOST


async def test_deletions_free_the_quota_at_once_on_every_worker(
    workers: tuple[Pipeline, Pipeline],
) -> None:
    first, second = both(workers)
    for each in workers:
        # without what removes what does not exist once the quota is reached
        each.quotas[KEY]._reconciled_s = math.inf
    for delete in ("prefix", "streams"):
        for number in range(MOST):
            assert await create(first, f"{delete}:{number}")
        assert not await create(second, f"{delete}:more")
        if delete == "prefix":
            assert await second.streams.delete_prefix("probe", "prefix:") == (MOST, None)
        else:
            for number in range(MOST):
                await second.streams.delete(StreamKey("probe", f"streams:{number}"))
        for each in (first, second):
            assert await create(each, f"{delete}:after")
            await each.streams.delete(StreamKey("probe", f"{delete}:after"))


async def test_deletions_by_other_keys_and_expiry_free_the_quota(
    workers: tuple[Pipeline, Pipeline], server: RealServer | Cluster
) -> None:
    first, second = both(workers)
    for number in range(MOST):
        assert await create(first, f"s{number}")
    admin = scoped(workers[0], None, OTHER)
    assert await admin.streams.delete_prefix("probe", "s") == (MOST, None)
    # the first stream over the quota finds what was deleted
    created = [await create(second, f"t{number}") for number in range(MOST + 1)]
    assert created == [True] * MOST + [False]
    keys = StoreSettings(server.url).keys
    with server.client() as client:
        for number in range(MOST):
            client.delete(keys.state(StreamKey("probe", f"t{number}")))
    assert await create(first, "u")


async def test_streams_of_other_keys_do_not_count(workers: tuple[Pipeline, Pipeline]) -> None:
    first, _ = both(workers, 1)
    other = scoped(workers[1], None, OTHER)
    assert await create(other, "other")
    assert await create(first, "own")
    (reply,) = await first.process_many([chunk_of("other", ROWS, 1)])
    assert isinstance(reply, Reply)
    assert not await create(first, "more")


async def test_restores_and_forks_count_if_they_create_a_stream(
    workers: tuple[Pipeline, Pipeline],
) -> None:
    first, second = both(workers, 2)
    assert await create(first, "a")
    await second.streams.fork(StreamKey("probe", "a"), "b", None)
    with pytest.raises(LimitExceeded):
        await first.streams.fork(StreamKey("probe", "a"), "c", None)
    # it replaces a stream that counts already
    await second.streams.fork(StreamKey("probe", "a"), "b", Precondition(any_state=True))
    assert await stored(workers[0]) == {"a", "b"}


async def test_a_quota_counts_every_stream_that_exists_whatever_happens_together(
    workers: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers create and delete the same streams, and remove what does not exist."""
    monkeypatch.setattr(module, "RECONCILE_S", 0.02)
    random = Random(3)
    pipelines = both(workers)
    usage = workers[0].quotas[KEY]._usage
    anyone = [*pipelines, scoped(workers[1], None, OTHER)]
    names = [f"s{number}" for number in range(12)]
    accepted = 0
    for _ in range(20):
        calls: list[Coroutine[Any, Any, Any]] = [usage.reconcile(KEY)]
        for _ in range(24):
            name = random.choice(names)
            if random.random() < 0.6:
                calls.append(create(random.choice(pipelines), name))
            else:
                calls.append(random.choice(anyone).streams.delete(StreamKey("probe", name)))
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
    store_url: str, pipeline_server: RealServer, artifact: Artifact
) -> None:
    async with worker(store_url, artifact) as pipeline:
        first = scoped(pipeline, KeyLimits(streams=1))
        assert await create(first, "s")
        with pipeline_server.client() as client:
            client.config_resetstat()
            for position in range(1, 9):
                await first.process(chunk_of("s", ROWS, position))
            calls = client.info("commandstats")
    assert {name for name in calls if name.startswith("cmdstat_h")} <= {"cmdstat_hello"}
    assert calls["cmdstat_evalsha"]["calls"] == 8


async def test_an_unavailable_count_delays_other_streams_once(
    artifact: Artifact, shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(emptied(shared_cluster).url, artifact) as pipeline:
        first, other = scoped(pipeline, KeyLimits(streams=9)), scoped(pipeline, None, OTHER)
        calls: list[float] = []

        async def register(*_: Any) -> None:
            calls.append(_[-1] - time.monotonic())
            raise StoreUnavailable("away")

        with monkeypatch.context() as broken:
            broken.setattr(pipeline.quotas[KEY]._usage, "register", register)
            for number in range(4):
                with pytest.raises(StoreUnavailable):
                    await first.process(chunk_of(f"s{number}", ROWS, 0))
                assert await create(other, f"t{number}")
        # and for a fraction of a chunk's deadline
        assert len(calls) == 1
        assert calls[0] <= SHARD_TIMEOUT_S
