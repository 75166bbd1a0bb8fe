"""Real servers and stores on them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from service.store.base import Store
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster, breakable_cluster, own_cluster, shared_cluster
from tests.support.servers import (
    KINDS,
    WAIT_S,
    RealServer,
    own_server,
    real_server,
    server,
    shared_server,
)
from tests.support.streams import OpenStore, Streams

__all__ = [
    "breakable_cluster",
    "own_cluster",
    "own_server",
    "server",
    "shared_cluster",
    "shared_server",
]


@pytest.fixture(scope="session", params=[*KINDS, "cluster"])
def every_store(request: pytest.FixtureRequest) -> Iterator[RealServer | Cluster]:
    """What is behind each kind of store; in a module's `server` it stands for a single one."""
    if request.param == "cluster":
        yield request.getfixturevalue("shared_cluster")
    else:
        with real_server(request.param) as running:
            yield running


@pytest.fixture
async def open_on(server: RealServer) -> AsyncIterator[OpenStore]:
    """Opens stores on the server; each is closed at the end."""
    async with AsyncExitStack() as stack:

        async def open_one(**settings: Any) -> Store:
            store = RedisStore(StoreSettings(server.url, **{"store_wait_s": WAIT_S, **settings}))
            stack.push_async_callback(store.close)
            await store.start()
            return store

        yield open_one


@pytest.fixture
async def store(open_on: OpenStore) -> Store:
    return await open_on()


@pytest.fixture
def streams() -> Streams:
    return Streams()
