"""Usage of keys with quotas: counted by the store, for all processes together."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.core.values import StreamKey
from service.store.base import Committed, StateStore
from service.store.redis.redis_store import RedisStore
from service.store.redis.stream_usage import UNWRITTEN_S, RedisStreamUsage
from service.store.usage import Quota, Registration
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied
from tests.support.streams import OpenStore, Streams, committed, key

KEY = "0123456789ab"


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    return emptied(every_store)


async def register(store: StateStore, quota: Quota, *streams: str, size: int = 100) -> Registration:
    return await store.usage.register(KEY, [(key(name), size) for name in streams], quota)


async def test_streams_are_accepted_up_to_the_quota_and_then_only_known_ones(
    store: StateStore,
) -> None:
    quota = Quota(2, None)
    assert await register(store, quota, "a", "b", "c") == ([True, True, False], 2, 200)
    assert await register(store, quota, "c", "b", "a") == ([False, True, True], 2, 200)
    await store.usage.release(KEY, [key("a"), key("unknown")])
    assert await register(store, quota, "c") == ([True], 2, 200)
    # another key has a quota of its own
    other = await store.usage.register("f" * 12, [(key("d"), 1)], quota)
    assert other == ([True], 1, 1)


async def test_bytes_are_accepted_up_to_the_quota(store: StateStore) -> None:
    quota = Quota(None, 250)
    assert await register(store, quota, "a", "b", "c") == ([True, True, False], 2, 200)
    assert await register(store, quota, "d", size=51) == ([False], 2, 200)
    assert await register(store, quota, "e", size=50) == ([True], 3, 250)
    large = 2**52
    assert await register(store, Quota(None, 2**53), "f", size=large) == ([True], 4, 250 + large)


async def test_concurrent_processes_do_not_exceed_a_quota_together(open_on: OpenStore) -> None:
    stores = [await open_on() for _ in range(2)]
    quota = Quota(7, None)
    calls = [register(stores[index % 2], quota, f"s{index}") for index in range(20)]
    accepted = [result.accepted[0] for result in await asyncio.gather(*calls)]
    assert accepted.count(True) == 7


async def test_reconcile_keeps_existing_and_recently_registered_streams(
    store: StateStore, streams: Streams
) -> None:
    assert isinstance(store, RedisStore)
    past = RedisStreamUsage(store._router, store._keys, now_s=lambda: time.time() - UNWRITTEN_S - 1)
    names = ["live", "deleted", "never-written", *(f"gone{index}" for index in range(600))]
    registered = [(StreamKey("flights", name), 10) for name in names]
    await past.register(KEY, registered, Quota(None, None))
    await register(store, Quota(None, None), "fresh", size=10)
    live, deleted = streams.creation(key("live")), streams.creation(key("deleted"))
    await committed(store, live, deleted)
    assert await store.delete(key("deleted")) == Committed()
    await store.usage.reconcile(KEY)
    quota = Quota(2, None)
    assert await register(store, quota, "live", "fresh", "deleted") == (
        [True, True, False],
        2,
        20,
    )
