"""Listing, start checks and size of every store, on real servers: the embedded Valkey, Redis."""

from __future__ import annotations

import asyncio

import pytest

from service.domain import StoredReply, StreamKey
from service.errors import InvalidInput, StoreRefused
from service.state.open import open_store
from service.state.protocol import Commit, Committed, StateStore
from service.state.settings import StoreSettings
from tests.support.servers import RealServer
from tests.support.streams import OpenStore, Streams, committed, key

# Listing


async def listed(store: StateStore, model: str, prefix: str, limit: int) -> list[str]:
    names: list[str] = []
    cursor: str | None = None
    while True:
        page = await store.streams(model, prefix, cursor, limit)
        assert len(set(page.streams)) == len(page.streams)
        names += page.streams
        cursor = page.cursor
        if cursor is None:
            return names


@pytest.mark.parametrize("limit", [1, 7, 50, 1000])
async def test_every_stream_is_listed_across_pages(
    open_on: OpenStore, streams: Streams, limit: int
) -> None:
    store = await open_on(scan_count=40)
    names = {f"N{i}:{tail}" for i in range(60) for tail in ("x.y", "@-")}
    await committed(store, *(streams.creation(key(name), floats=2) for name in names))
    await committed(store, *(streams.creation(key(n, "other"), floats=2) for n in ("N1:", "M")))
    found = await listed(store, "flights", "", limit)
    assert set(found) == names
    assert set(await listed(store, "other", "", limit)) == {"N1:", "M"}
    assert set(await listed(store, "none", "", limit)) == set()


async def test_a_prefix_is_a_prefix_and_not_a_pattern(store: StateStore, streams: Streams) -> None:
    names = ["JFK-AA", "JFK-B6", "JFKX", "jfk-AA", "LGA:JFK-AA"]
    await committed(store, *(streams.creation(key(name)) for name in names))
    assert set(await listed(store, "flights", "JFK-", 10)) == {"JFK-AA", "JFK-B6"}
    assert set(await listed(store, "flights", "JFK", 10)) == {"JFK-AA", "JFK-B6", "JFKX"}
    for pattern in ("*", "?", "[J]", "JFK*", "\\"):
        assert await listed(store, "flights", pattern, 10) == []


async def test_a_page_is_never_longer_than_asked(open_on: OpenStore, streams: Streams) -> None:
    store = await open_on(scan_count=200)
    await committed(store, *(streams.creation(key(f"s{i}"), floats=1) for i in range(200)))
    cursor: str | None = None
    while True:
        page = await store.streams("flights", "", cursor, 20)
        assert len(page.streams) <= 20
        cursor = page.cursor
        if cursor is None:
            return


async def test_other_keys_are_not_listed(
    store: StateStore, streams: Streams, server: RealServer
) -> None:
    await committed(store, streams.creation(key("a")))
    with server.client() as client:
        client.set("carry{p0000}:s:flights:elsewhere", b"in the wrong partition")
        client.set("carry{x}:s:flights:a", b"foreign")
        client.set("other{p0001}:s:flights:a", b"another service")
    assert await listed(store, "flights", "", 10) == ["a"]


async def test_namespaces_do_not_see_each_other(open_on: OpenStore, streams: Streams) -> None:
    one, other = await open_on(namespace="one"), await open_on(namespace="other")
    await committed(one, streams.creation(key("a")))
    assert await other.load([key("a")]) == [None]
    assert await listed(other, "flights", "", 10) == []


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.5", "²", str(2**64)])
async def test_a_cursor_that_is_none_is_refused(store: StateStore, cursor: str) -> None:
    with pytest.raises(InvalidInput, match="cursor"):
        await store.streams("flights", "", cursor, 10)


# The server


async def test_a_server_that_may_evict_is_refused(open_on: OpenStore, server: RealServer) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(StoreRefused, match=r"allkeys-lru.*CARRY_ALLOW_EVICTION"):
                await open_on()
            await open_on(allow_eviction=True)
        finally:
            client.config_set("maxmemory-policy", "noeviction")


async def test_a_store_with_other_partitions_is_refused(
    open_on: OpenStore, streams: Streams
) -> None:
    store = await open_on(partitions=64)
    await committed(store, streams.creation(key("a")))
    with pytest.raises(StoreRefused, match=r"64.*CARRY_PARTITIONS"):
        await open_on(partitions=128)
    again = await open_on(partitions=64)
    assert await again.load([key("a")]) != [None]


async def test_a_meta_key_that_is_foreign_is_refused(
    open_on: OpenStore, server: RealServer
) -> None:
    with server.client() as client:
        for foreign in (b"x", b"[]", b'{"format": 2, "partitions": 1024}', b'{"format": 1}'):
            client.set("carry:meta", foreign)
            with pytest.raises(StoreRefused):
                await open_on()
            assert client.get("carry:meta") == foreign


async def test_scripts_that_the_server_forgot_are_sent_again(
    store: StateStore, streams: Streams, server: RealServer
) -> None:
    commit = streams.creation(key("a"))
    await committed(store, commit)
    with server.client() as client:
        client.script_flush()
        commit = streams.next(commit)
        await committed(store, commit)
        client.script_flush()
        assert await store.delete(key("a"), commit.new.mark) == Committed()


async def test_a_server_that_forbids_scripts_refuses_in_its_own_words(
    open_on: OpenStore, server: RealServer, streams: Streams
) -> None:
    with server.client() as client:
        client.acl_setuser(
            "reader",
            enabled=True,
            passwords=["+secret"],
            keys=["*"],
            categories=["+@all"],
            commands=["-eval", "-evalsha"],
        )
        try:
            url = server.url.replace("unix://", "unix://reader:secret@")
            store = open_store(StoreSettings(url))
            await store.start()
            with pytest.raises(StoreRefused, match="permissions") as caught:
                await store.commit([streams.creation(key("a"))])
            assert "secret" not in caught.value.detail
            await store.close()
        finally:
            client.acl_deluser("reader")


async def test_a_wrong_password_is_refused_at_once(server: RealServer) -> None:
    url = server.url.replace("unix://", "unix://nobody:wrong-secret@")
    store = open_store(StoreSettings(url, wait_s=60))
    async with asyncio.timeout(30):
        with pytest.raises(StoreRefused) as caught:
            await store.start()
    assert "wrong-secret" not in caught.value.detail
    (check,) = await store.check()
    assert not check.ok
    assert "wrong-secret" not in check.detail
    await store.close()


async def test_a_server_that_answers_is_ready(store: StateStore, server: RealServer) -> None:
    (check,) = await store.check()
    assert check.ok
    assert server.socket in check.detail


@pytest.mark.parametrize(
    ("raw_bytes", "kind"), [(raw, kind) for raw in (256, 1024) for kind in ("floats", "mixed")]
)
async def test_a_stream_takes_little_more_than_its_state(
    store: StateStore, streams: Streams, server: RealServer, raw_bytes: int, kind: str
) -> None:
    ints = 4 if kind == "mixed" else 0
    name = StreamKey("flights", "JFK-AA:N12345")
    new = streams.first(floats=(raw_bytes - 8 * ints) // 4, ints=ints)
    await committed(store, Commit(name, None, new, None))
    with server.client() as client:
        used = client.memory_usage(StoreSettings(server.url).keys.state(name))
    print(f"{server.kind}: {raw_bytes} bytes of state take {used}")
    assert used <= 1.25 * raw_bytes + 200


async def test_a_reply_of_another_mark_can_be_told(store: StateStore, streams: Streams) -> None:
    """A reply is written before its state, so a reader must see whose it is."""
    first = streams.creation(key("a"))
    await committed(store, first)
    state, reply = await store.load_with_reply(key("a"))
    assert isinstance(reply, StoredReply)
    assert reply.mark == state.mark == first.new.mark
