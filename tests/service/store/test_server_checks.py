"""Start-up checks and size of a store on a single server: embedded Valkey and Redis."""

from __future__ import annotations

import asyncio

import pytest

from service.core.errors import StoreRefused
from service.store.base import Committed, Store
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.servers import RealServer, free_port, real_server
from tests.support.streams import OpenStore, Streams, committed, key


async def test_a_server_that_may_evict_is_rejected(open_on: OpenStore, server: RealServer) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(StoreRefused, match=r"allkeys-lru.*CARRY_ALLOW_EVICTION"):
                await open_on()
            await open_on(allow_eviction=True)
        finally:
            client.config_set("maxmemory-policy", "noeviction")


async def test_a_store_with_other_partitions_is_rejected(
    open_on: OpenStore, streams: Streams
) -> None:
    store = await open_on(partitions=64)
    await committed(store, streams.creation(key("a")))
    with pytest.raises(StoreRefused, match=r"64.*CARRY_PARTITIONS"):
        await open_on(partitions=128)
    again = await open_on(partitions=64)
    assert await again.load([key("a")]) != [None]


@pytest.mark.parametrize(
    ("kind", "is_node"), [("valkey", True), ("redis", True), ("valkey", False)]
)
async def test_a_server_under_an_address_of_another_kind_is_rejected(
    kind: str, *, is_node: bool
) -> None:
    port, bus = str(free_port()), ("--cluster-port", str(free_port()))
    node = ("--cluster-enabled", "yes", *bus) if is_node else ()
    with real_server(kind, "--bind", "127.0.0.1", "--port", port, *node) as running:
        url = running.url if is_node else f"redis+cluster://127.0.0.1:{port}"
        store = RedisStore(StoreSettings(url, store_wait_s=60))
        with pytest.raises(StoreRefused, match="cluster"):
            await store.start()
        await store.close()


async def test_a_foreign_meta_key_is_rejected(open_on: OpenStore, server: RealServer) -> None:
    with server.client() as client:
        for foreign in (b"x", b"[]", b'{"format": 2, "partitions": 1024}', b'{"format": 1}'):
            client.set("carry:meta", foreign)
            with pytest.raises(StoreRefused):
                await open_on()
            assert client.get("carry:meta") == foreign


async def test_evicted_scripts_are_sent_again(
    store: Store, streams: Streams, server: RealServer
) -> None:
    commit = streams.creation(key("a"))
    await committed(store, commit)
    with server.client() as client:
        client.script_flush()
        commit = streams.next(commit)
        await committed(store, commit)
        client.script_flush()
        assert await store.delete(key("a"), commit.new.head) == Committed()


async def test_a_wrong_password_fails_immediately(server: RealServer) -> None:
    url = server.url.replace("unix://", "unix://nobody:wrong-secret@")
    store = RedisStore(StoreSettings(url, store_wait_s=60))
    async with asyncio.timeout(60):
        with pytest.raises(StoreRefused) as caught:
            await store.start()
    assert "wrong-secret" not in caught.value.detail
    check = await store.monitor.check()
    assert not check.ok
    assert "wrong-secret" not in check.detail
    await store.close()
