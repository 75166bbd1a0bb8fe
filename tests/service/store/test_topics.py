"""Topics on real servers: leases with fences, and commits of states, outputs and entries."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from service.core.errors import StoreRefused
from service.store.base import COMMITTED, Conflicted
from service.store.redis.redis_store import RedisStore
from service.store.topics import (
    FIRST_PENDING,
    NEW,
    ChunkCommit,
    Destination,
    NewEntry,
    TopicItem,
    TopicKeys,
    Unclear,
    is_not_pending,
)
from tests.support.cluster import Cluster
from tests.support.proxy import LossyPath
from tests.support.servers import RealServer, emptied, opened
from tests.support.streams import Commit, Streams, assert_stored, columns, key, load

STREAM = key("a")
PARTITION = "carry{p0000}"
KEYS = TopicKeys.of(
    f"{PARTITION}:in:probe", f"{PARTITION}:out:probe", f"{PARTITION}:dead:probe", "readers"
)
LONG_S = 600.0


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


@pytest.fixture
async def store(server: RealServer | Cluster) -> Any:
    """Streams of one partition, so that any stream is in the slot of the topic."""
    async with opened(server.url, partitions=1) as store:
        yield store


def add(server: RealServer | Cluster, *events: str) -> list[bytes]:
    """Add entries to the topic; returns their ids."""
    with server.client() as client:
        return [client.xadd(KEYS.topic, {"event": event}) for event in events]


def entries(server: RealServer | Cluster, name: str) -> list[dict[bytes, bytes]]:
    """The fields of the entries of a topic."""
    with server.client() as client:
        return [fields for _, fields in client.xrange(name)]


def pending(server: RealServer | Cluster) -> list[bytes]:
    with server.client() as client:
        found = client.xpending_range(KEYS.topic, KEYS.group, "-", "+", 100)
        return [each["message_id"] for each in found]


async def own(store: RedisStore, fence: str = "f1", owner: str = "me") -> None:
    held = await store.topics.acquire(KEYS, owner, fence, LONG_S, "0")
    assert held.is_held


async def read(
    store: RedisStore, fence: str = "f1", after: str = NEW, count: int = 100
) -> list[bytes]:
    found = await store.topics.read(KEYS, fence, after, count)
    assert not isinstance(found, Unclear)
    return [entry.id for entry in found]


def item(commit: Commit | None, ids: Sequence[bytes], *outputs: str) -> TopicItem:
    written = [NewEntry(Destination.OUTPUTS, ("output", each)) for each in outputs]
    if commit is None:
        return TopicItem(ids, written)
    row = columns(commit)
    chunk = ChunkCommit(row.keys[0], row.expected[0], row.states[0], row.replies[0])
    return TopicItem(ids, written, chunk)


async def test_a_commit_writes_state_and_outputs_and_acknowledges(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    first, second, third = add(server, "1", "2", "3")
    await own(store)
    assert await read(store) == [first, second, third]
    commit = streams.creation(STREAM)
    done = await store.topics.commit(KEYS, "f1", 1, [item(commit, [first, second], "x", "y")])
    assert done == [COMMITTED]
    await assert_stored(store, commit)
    assert entries(server, KEYS.outputs) == [{b"output": b"x"}, {b"output": b"y"}]
    assert pending(server) == [third]
    following = streams.next(commit)
    assert await store.topics.commit(KEYS, "f1", 2, [item(following, [third], "z")]) == [COMMITTED]
    await assert_stored(store, following)
    assert pending(server) == []


async def test_items_of_a_commit_succeed_or_fail_alone(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    ids = add(server, "1", "2", "3")
    await own(store)
    await read(store)
    existing, stale = streams.creation(STREAM), streams.creation(STREAM)
    assert await store.commit(columns(existing)) == [COMMITTED]
    other = streams.creation(key("b"))
    letter = TopicItem([ids[2]], [NewEntry(Destination.DEAD_LETTERS, ("code", "bad"))], halts="c")
    results = await store.topics.commit(
        KEYS, "f1", 1, [item(stale, ids[:1], "x"), item(other, ids[1:2], "y"), letter]
    )
    assert results == [Conflicted(existing.new.head), COMMITTED, COMMITTED]
    await assert_stored(store, existing)
    await assert_stored(store, other)
    assert entries(server, KEYS.outputs) == [{b"output": b"y"}]
    assert entries(server, KEYS.dead_letters) == [{b"code": b"bad"}]
    assert await store.topics.halted(KEYS) == {"c"}
    assert pending(server) == ids[:1]


async def test_topics_that_are_read_together_are_one_call_and_fail_alone(
    server: RealServer | Cluster, store: RedisStore
) -> None:
    names = [f"{KEYS.topic}:{kind}" for kind in ("good", "fenced", "no-group", "no-stream")]
    topics = [TopicKeys.of(name, KEYS.outputs, KEYS.dead_letters, KEYS.group) for name in names]
    for keys in topics:
        assert (await store.topics.acquire(keys, "me", "f1", LONG_S, "0")).is_held
    with server.client() as client:
        for name in names:
            client.xadd(name, {"event": "1"})
        client.xgroup_destroy(names[2], KEYS.group)
        client.set(names[3], "text")
        fences = ["f1", "f2", "f1", "f1"]
        reads = [
            store.topics.read(keys, fence, NEW, 10)
            for keys, fence in zip(topics, fences, strict=True)
        ]
        good, fenced, *failed = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(good, list)
    assert [entry.fields for entry in good] == [[b"event", b"1"]]
    assert fenced is Unclear.FENCED
    assert [type(each) for each in failed] == [StoreRefused] * 2
    assert ["NOGROUP" in str(failed[0]), "WRONGTYPE" in str(failed[1])] == [True, True]
    assert [name in str(each) for name, each in zip(names[2:], failed, strict=True)] == [True] * 2


async def test_topics_of_one_turn_are_read_in_one_call(own_server: RealServer) -> None:
    topics = [TopicKeys.of(f"in-{n}", "out", "dead", "group") for n in range(10)]

    def scripts() -> int:
        with own_server.client() as client:
            stats = client.info("commandstats")
        return sum(each["calls"] for name, each in stats.items() if "cmdstat_eval" in name)

    async with opened(own_server.url, partitions=1) as store:
        for keys in topics:
            await store.topics.acquire(keys, "me", "f1", LONG_S, "0")
        await store.topics.read(topics[0], "f1", NEW, 10)
        before = scripts()
        found = await asyncio.gather(*[store.topics.read(keys, "f1", NEW, 10) for keys in topics])
        assert found == [[]] * 10
        assert scripts() == before + 1


async def test_a_commit_behind_a_missing_one_is_rejected(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    ids = add(server, "1", "2")
    await own(store)
    await read(store)
    first, second = streams.creation(STREAM), streams.creation(key("b"))
    later = item(second, ids[1:], "y")
    assert await store.topics.commit(KEYS, "f1", 2, [later]) is Unclear.COMMIT_MISSING
    assert await load(store, [second.key]) == [None]
    assert pending(server) == ids
    assert await store.topics.commit(KEYS, "f1", 1, [item(first, ids[:1])]) == [COMMITTED]
    assert await store.topics.commit(KEYS, "f1", 1, [later]) is Unclear.COMMIT_MISSING
    assert await store.topics.commit(KEYS, "f1", 2, [later]) == [COMMITTED]


async def test_an_item_with_a_condition_needs_the_stream_at_its_head(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    ids = add(server, "1", "2", "3", "4", "5")
    await own(store)
    await read(store)
    absent, deleted, commit = key("absent"), key("deleted"), streams.creation(STREAM)
    await store.commit(columns(commit))
    await store.delete(deleted)
    head, other = commit.new.head, streams.creation(STREAM).new.head
    conditions = [(STREAM, head), (STREAM, other), (STREAM, None), (absent, None), (deleted, None)]
    items = [TopicItem([each], condition=met) for each, met in zip(ids, conditions, strict=True)]
    results = await store.topics.commit(KEYS, "f1", 1, items)
    assert results == [COMMITTED, Conflicted(head), Conflicted(head), COMMITTED, COMMITTED]
    assert pending(server) == ids[1:3]


async def test_a_topic_has_one_owner_until_its_lease_expires(
    server: RealServer, store: RedisStore
) -> None:
    assert (await store.topics.acquire(KEYS, "me", "f1", LONG_S, "0")).has_new_group
    taken = await store.topics.acquire(KEYS, "other", "f2", LONG_S, "0")
    assert (taken.is_held, taken.owner) == (False, "me")
    assert LONG_S - 60 < taken.left_s <= LONG_S
    again = await store.topics.acquire(KEYS, "me", "f3", LONG_S, "0")
    assert (again.is_held, again.has_new_group) == (True, False)
    with server.client() as client:
        client.hset(KEYS.lease, "until", 1)
    assert (await store.topics.acquire(KEYS, "other", "f4", LONG_S, "0")).is_held


async def test_an_attempt_to_acquire_a_held_topic_loads_no_script(
    server: RealServer, store: RedisStore
) -> None:
    def loads() -> int:
        with server.client() as client:
            stats = client.info("commandstats")
        return sum(
            each["calls"] for name, each in stats.items() if name.startswith("cmdstat_script")
        )

    await store.topics.acquire(KEYS, "me", "f1", LONG_S, "0")
    before = loads()
    assert not (await store.topics.acquire(KEYS, "other", "f2", LONG_S, "0")).is_held
    assert loads() == before


async def test_a_lost_group_is_made_again_behind_the_floor(
    server: RealServer, store: RedisStore
) -> None:
    ids = add(server, "1", "2", "3")
    await own(store)
    await read(store)
    await store.topics.commit(KEYS, "f1", 1, [item(None, ids[:1])])
    await store.topics.renew(KEYS, "me", "f1", LONG_S, 1, ids[0])
    with server.client() as client:
        client.xgroup_destroy(KEYS.topic, KEYS.group)
    with pytest.raises(StoreRefused, match="NOGROUP"):
        await read(store)
    (result,) = await store.topics.commit(KEYS, "f1", 2, [item(None, ids[1:])])
    assert is_not_pending(result)
    assert (await store.topics.acquire(KEYS, "me", "f2", LONG_S, "0")).has_new_group
    assert await read(store, "f2") == ids[1:]


async def test_entries_of_other_consumers_are_claimed(
    server: RealServer, store: RedisStore
) -> None:
    ids = add(server, "1", "2", "3")
    with server.client() as client:
        client.xgroup_create(KEYS.topic, KEYS.group, "0")
        client.xreadgroup(KEYS.group, "plain", {KEYS.topic: ">"}, count=2)
    await own(store)
    assert await store.topics.claim(KEYS) == 2
    assert await store.topics.claim(KEYS) == 0
    assert await read(store, after=FIRST_PENDING) == ids[:2]


@pytest.mark.parametrize("name", [KEYS.outputs, KEYS.dead_letters])
async def test_an_output_topic_of_another_type_changes_nothing(
    server: RealServer, store: RedisStore, streams: Streams, name: str
) -> None:
    ids = add(server, "1")
    await own(store)
    await read(store)
    with server.client() as client:
        client.set(name, "text")
    commit = item(streams.creation(STREAM), ids, "x")
    with pytest.raises(StoreRefused, match="WRONGTYPE"):
        await store.topics.commit(KEYS, "f1", 1, [commit])
    assert await load(store, [STREAM]) == [None]
    assert pending(server) == ids


async def test_acknowledged_entries_are_deleted_and_outputs_are_trimmed(
    server: RealServer, store: RedisStore
) -> None:
    ids = add(server, *map(str, range(300)))
    await own(store)
    await read(store, count=300)
    keys = KEYS._replace(kept=100, deletes=True)
    await store.topics.commit(keys, "f1", 1, [item(None, ids[:299], *map(str, range(299)))])
    assert len(entries(server, KEYS.topic)) == 1
    assert 100 <= len(entries(server, KEYS.outputs)) < 299


async def test_members_are_those_that_announced_themselves(
    server: RealServer, store: RedisStore
) -> None:
    assert await store.topics.join("readers", "a", LONG_S) == ["a"]
    assert sorted(await store.topics.join("readers", "b", LONG_S)) == ["a", "b"]
    assert await store.topics.join("others", "c", LONG_S) == ["c"]
    with server.client() as client:
        client.hset("carry:consumers:readers", "a", 1)
    assert await store.topics.join("readers", "b", LONG_S) == ["b"]
    assert await store.topics.join("readers", "b", 0) == []


async def test_a_call_that_was_sent_again_is_unclear(
    own_server: RealServer, streams: Streams
) -> None:
    ids = add(own_server, "1", "2")
    async with (
        LossyPath.to(own_server.socket, own_server.folder) as path,
        opened(path.url, partitions=1, store_wait_s=20) as store,
    ):
        await own(store)
        assert await read(store, after=FIRST_PENDING) == []
        path.losses = 1
        assert await store.topics.read(KEYS, "f1", NEW, 1) is Unclear.REPLY_LOST
        await own(store, "f2")
        # both executions of the call have read an entry
        assert await read(store, "f2", FIRST_PENDING) == ids
        path.losses = 1
        commit = streams.creation(STREAM)
        lost = await store.topics.commit(KEYS, "f2", 1, [item(commit, ids[:1], "x")])
        assert lost is Unclear.REPLY_LOST
        await own(store, "f3")
        assert await read(store, "f3", FIRST_PENDING) == ids[1:]
        await assert_stored(store, commit)
    assert entries(own_server, KEYS.outputs) == [{b"output": b"x"}]


async def test_a_full_server_changes_nothing(own_server: RealServer, streams: Streams) -> None:
    async with opened(own_server.url, partitions=1) as store:
        ids = add(own_server, "1")
        await own(store)
        await read(store)
        own_server.configure("maxmemory", 1)
        commit = item(streams.creation(STREAM), ids, "x")
        with pytest.raises(StoreRefused, match="OOM"):
            await store.topics.commit(KEYS, "f1", 1, [commit])
        assert pending(own_server) == ids
        own_server.configure("maxmemory", 0)
        assert await load(store, [STREAM]) == [None]
        assert entries(own_server, KEYS.outputs) == []
        assert await store.topics.commit(KEYS, "f1", 1, [commit]) == [COMMITTED]
