"""Deletions and their tombstones on every store: the embedded Valkey, Redis, and a cluster."""

from __future__ import annotations

import pytest

from service.core.errors import OutcomeUnknown, StateDamaged
from service.core.values import StreamHead, Tombstone
from service.store.base import Committed, Conflicted, Store
from service.store.layout import HEADER_BYTES
from service.store.redis.outcomes import resolve_retried_deletion
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied, until_async
from tests.support.streams import (
    OpenStore,
    Streams,
    absence,
    columns,
    committed,
    key,
    load,
    same_stream,
)


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


def names(server: RealServer | Cluster) -> tuple[str, str]:
    """The keys of stream `a`: its state and its reply."""
    return StoreSettings(server.url).keys.pair(key("a"))


async def test_many_streams_are_deleted_independently(
    open_on: OpenStore, streams: Streams, server: RealServer
) -> None:
    """Of streams, a tombstone, a missing stream, a damaged state and a value of another type."""
    store = await open_on()
    alive = [key(f"s{number}") for number in range(20)]
    await committed(store, *map(streams.creation, [*alive, key("gone")]))
    await store.delete(key("gone"))
    keyspace = StoreSettings(server.url).keys
    with server.client() as client:
        client.set(keyspace.state(key("damaged")), b"C")
        client.rpush(keyspace.state(key("list")), "not a stream")
    others = [key("gone"), key("missing"), key("damaged"), key("list")]
    results = await store.delete_many([*others, *alive])
    assert results == [Conflicted(None)] * 2 + [Committed()] * (2 + len(alive))
    assert all(isinstance(each, Tombstone) for each in await load(store, [*others, *alive]))
    with server.client() as client:
        assert client.exists(keyspace.reply(alive[0])) == 0
    assert await store.delete_many([]) == []


# Tombstones


async def test_a_tombstone_expires_after_its_ttl(
    open_on: OpenStore, streams: Streams, server: RealServer
) -> None:
    store = await open_on(tombstone_ttl_s=600)
    short = await open_on(tombstone_ttl_s=0.05)
    await committed(store, streams.creation(key("a")))
    assert await store.delete(key("a")) == Committed()
    with server.client() as client:
        assert 500_000 < client.pttl(names(server)[0]) <= 600_000
        assert client.strlen(names(server)[0]) == HEADER_BYTES
    assert await short.delete(key("a")) == Conflicted(None)

    async def forgotten() -> bool:
        return await load(store, [key("a")]) == [None]

    await until_async(forgotten, "the tombstone's end")


async def test_a_creation_after_a_deletion_must_expect_the_tombstone(
    open_on: OpenStore, streams: Streams, server: RealServer
) -> None:
    store = await open_on(idle_ttl_s=0)
    first = streams.creation(key("a"))
    await committed(store, first)
    assert await store.delete(key("a")) == Committed()
    tombstone = await absence(store, key("a"))
    for expected in (None, StreamHead(b"other ep", bytes(16), 0)):
        late = streams.creation(key("a"))._replace(expected=expected)
        assert await store.commit(columns(late)) == [Conflicted(None)]
    again = streams.creation(key("a"))._replace(expected=tombstone)
    await committed(store, again)
    assert await store.commit(columns(streams.next(first))) == [Conflicted(again.new.head)]
    state, reply = await store.load_with_reply(key("a"))
    assert same_stream(state, again.new)
    assert reply is not None
    with server.client() as client:
        assert client.pttl(names(server)[0]) == -1


async def test_confirming_a_tombstone_does_not_change_it(
    store: Store, streams: Streams, server: RealServer
) -> None:
    """The script behind `load_with_reply` where replicas are waited for; it may come late, too."""
    script = (RedisStore(StoreSettings(server.url))._confirm_script).text
    await committed(store, streams.creation(key("a")))
    assert await store.delete(key("a")) == Committed()
    pair = names(server)
    with server.client() as client:
        before = client.get(pair[0])
        assert client.eval(script, 2, *pair, 999_000_000) == [before, None]
        assert client.get(pair[0]) == before
        assert 0 < client.pttl(pair[0]) <= 600_000
        client.delete(*pair)
        assert client.eval(script, 2, *pair, 999_000_000) == [None, None]
        assert client.exists(pair[0]) == 0


# Values that are not streams


@pytest.mark.parametrize("value", [b"", b"C", b"C" * 40, b"XXXX" + bytes(200)])
async def test_a_damaged_state_is_deleted_only_if_it_is_unchanged(
    store: Store, streams: Streams, server: RealServer, value: bytes
) -> None:
    with server.client() as client:
        client.set(names(server)[0], value)
        (damaged,) = await load(store, [key("a")])
        assert isinstance(damaged, StateDamaged)
        sound = streams.creation(key("a"))
        client.delete(names(server)[0])
        await committed(store, sound)
        assert await store.delete(key("a"), damaged.head) == Conflicted(sound.new.head)
        client.set(names(server)[0], value)
    assert await store.delete(key("a"), damaged.head) == Committed()
    assert isinstance((await load(store, [key("a")]))[0], Tombstone)


async def test_streams_are_deleted_when_memory_is_full(
    store: Store, streams: Streams, server: RealServer
) -> None:
    await committed(store, streams.creation(key("a")))
    server.configure("maxmemory", 1)
    try:
        assert await store.delete(key("a")) == Committed()
        assert await store.delete(key("a")) == Conflicted(None)
    finally:
        server.configure("maxmemory", 0)
    assert isinstance((await load(store, [key("a")]))[0], Tombstone)


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (None, Committed),
        (StreamHead(b"epoch-89", b"another tag 0123", 9), Conflicted),
        (StreamHead(b"epoch-90", b"another tag 0123", 9), OutcomeUnknown),
    ],
    ids=["nothing", "the same epoch", "another epoch"],
)
def test_retried_deletions_are_resolved_by_the_stored_head(
    found: StreamHead | None, outcome: type
) -> None:
    expected = StreamHead(b"epoch-89", b"tag-0123456789ab", 4)
    assert isinstance(resolve_retried_deletion(key("a"), expected, Conflicted(found)), outcome)
