"""Listing of streams on real servers: embedded Valkey, Redis, and a cluster."""

from __future__ import annotations

import pytest

from service.core.errors import InvalidInput
from service.store.base import Store
from service.store.redis import scan
from service.store.redis.scan import drop_tombstones
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied, opened
from tests.support.streams import OpenStore, Streams, absence, committed, key


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


async def listed(store: Store, model: str, prefix: str, limit: int) -> list[str]:
    names: list[str] = []
    cursor: str | None = None
    while True:
        page = await store.streams(model, prefix, cursor, limit)
        assert len(set(page.streams)) == len(page.streams)
        if len(page.streams) > limit:
            # a bucket of the server's hash table may have more, and is not divided
            bucket = await store.streams(model, prefix, cursor, 1)
            assert set(bucket.streams) == set(page.streams)
        names += page.streams
        cursor = page.cursor
        if cursor is None:
            return names


@pytest.mark.parametrize("limit", [1, 7, 50, 1000])
async def test_every_stream_is_listed_across_pages(
    monkeypatch: pytest.MonkeyPatch, open_on: OpenStore, streams: Streams, limit: int
) -> None:
    monkeypatch.setattr(scan, "SCAN_COUNT", 40)
    store = await open_on()
    names = {f"N{i}:{tail}" for i in range(60) for tail in ("x.y", "@-")}
    await committed(store, *(streams.creation(key(name), floats=2) for name in names))
    await committed(store, *(streams.creation(key(n, "other"), floats=2) for n in ("N1:", "M")))
    found = await listed(store, "flights", "", limit)
    assert set(found) == names
    assert set(await listed(store, "other", "", limit)) == {"N1:", "M"}
    assert set(await listed(store, "none", "", limit)) == set()


async def test_a_prefix_is_not_a_pattern(store: Store, streams: Streams) -> None:
    names = ["JFK-AA", "JFK-B6", "JFKX", "jfk-AA", "LGA:JFK-AA"]
    await committed(store, *(streams.creation(key(name)) for name in names))
    assert set(await listed(store, "flights", "JFK-", 10)) == {"JFK-AA", "JFK-B6"}
    assert set(await listed(store, "flights", "JFK", 10)) == {"JFK-AA", "JFK-B6", "JFKX"}
    for pattern in ("*", "?", "[J]", "JFK*", "\\"):
        assert await listed(store, "flights", pattern, 10) == []


async def test_keys_of_others_are_not_listed(
    store: Store, open_on: OpenStore, streams: Streams, server: RealServer
) -> None:
    other = await open_on(namespace="other")
    await committed(store, streams.creation(key("a")))
    assert await other.load([key("a")]) == [None]
    assert await listed(other, "flights", "", 10) == []
    with server.client() as client:
        client.set("carry{p0000}:s:flights:elsewhere", b"in the wrong partition")
        client.set("carry{x}:s:flights:a", b"foreign")
        client.set("other{p0001}:s:flights:a", b"another service")
    assert await listed(store, "flights", "", 10) == ["a"]


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.5", "²", str(2**64)])
async def test_an_invalid_cursor_is_rejected(store: Store, cursor: str) -> None:
    expected = "cursor: expected the `cursor` of the previous page"
    with pytest.raises(InvalidInput, match=expected):
        await store.streams("flights", "", cursor, 10)


async def test_deleted_streams_are_not_listed(
    store: Store, streams: Streams, server: RealServer
) -> None:
    names = [f"s{i}" for i in range(20)]
    await committed(store, *(streams.creation(key(name)) for name in names))
    with server.client() as client:
        keys = StoreSettings(server.url).keys
        client.set(keys.state(key("s0")), b"CRRY\x01\x05 damaged")
        client.delete(keys.state(key("s1")))
        client.rpush(keys.state(key("s1")), "of another type")
    for name in names[5:]:
        await store.delete(key(name))
    assert set(await listed(store, "flights", "", 7)) == set(names[:5])
    again = streams.creation(key("s5"))._replace(expected=await absence(store, key("s5")))
    await committed(store, again)
    assert set(await listed(store, "flights", "", 7)) == set(names[:6])


async def test_a_stream_deleted_during_listing_is_not_listed(
    server: RealServer | Cluster,
) -> None:
    async with opened(server.url) as store:
        keys = StoreSettings(server.url).keys
        servers = (await store._router.layout()).servers
        names = [await drop_tombstones(node, keys, [key("deleted")]) for node in servers]
        # Nodes that do not store the stream redirect; they keep its name.
        assert [] in names
