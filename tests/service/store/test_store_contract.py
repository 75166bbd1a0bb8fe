"""Contract of a store, on real servers: embedded Valkey, Redis, and a cluster."""

from __future__ import annotations

import asyncio

import pytest

from service.core.errors import StateDamaged, StoreRefused
from service.core.values import StreamHead, Tombstone
from service.store.base import CommitColumns, Committed, Conflicted, Store
from service.store.layout import HEADER_BYTES
from service.store.redis import capabilities
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied, until_async
from tests.support.streams import (
    Commit,
    OpenStore,
    Streams,
    assert_replayable,
    assert_stored,
    columns,
    committed,
    key,
    load,
    same_reply,
    same_stream,
)


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


# Compare-and-set


async def test_a_stream_is_created_continued_and_read_back(store: Store, streams: Streams) -> None:
    assert await load(store, []) == []
    assert await store.commit(columns()) == []
    commit = streams.creation(key("a"))
    assert await load(store, [commit.key]) == [None]
    for _ in range(3):
        await committed(store, commit)
        await assert_stored(store, commit)
        await assert_replayable(store, commit)
        commit = streams.next(commit)


async def test_results_keep_the_order_of_the_keys(open_on: OpenStore, streams: Streams) -> None:
    """Also of a cluster whose slots hold several of them."""
    store = await open_on(partitions=3)
    commits = [streams.creation(key(f"s{i}"), floats=i, ints=i % 4) for i in range(50)]
    await committed(store, *commits)
    missing = key("missing")
    asked = [c.key for c in commits[::-1]]
    found = await load(store, [*asked[:20], missing, *asked[20:]])
    assert found.pop(20) is None
    for stream, commit in zip(found, commits[::-1], strict=True):
        assert same_stream(stream, commit.new)
        assert same_reply((await store.load_with_reply(commit.key))[1], commit.reply)


async def test_the_token_key_is_drawn_once_for_all_workers(
    store: Store, open_on: OpenStore, server: RealServer | Cluster
) -> None:
    first, other = await asyncio.gather(store.keys.token_key(), (await open_on()).keys.token_key())
    assert first == other == await store.keys.token_key()
    assert len(first) == 32
    emptied(server)
    assert await store.keys.token_key() != first
    with server.client() as client:
        client.set("carry:token-key", b"short")
    with pytest.raises(StoreRefused, match="carry:token-key"):
        await store.keys.token_key()


async def test_record_of_a_model_is_written_only_over_the_version_that_was_read(
    store: Store,
) -> None:
    models = store.models
    assert await models.read(None) == (b"", {})
    assert await models.read(b"") is None
    assert await models.write(b"", "flights", b"1")
    assert not await models.write(b"", "flights", b"2")
    version, records = await models.read(b"") or (b"", {})
    assert records == {"flights": b"1"}
    assert await models.read(version) is None
    assert await models.write(version, "rivers", b"3")
    assert not await models.write(version, "flights", b"4")
    assert (await models.read(version) or ())[1] == {"flights": b"1", "rivers": b"3"}


async def test_reports_of_processes_that_are_alive_are_read_by_each(store: Store) -> None:
    models = store.models
    assert await models.report("a", b"of a") == [b"of a"]
    assert sorted(await models.report("b", b"of b:1")) == [b"of a", b"of b:1"]
    assert sorted(await models.report("a", b"of a, new")) == [b"of a, new", b"of b:1"]
    assert await models.report("b", b"") == [b"of a, new"]


async def test_report_of_a_process_that_has_ended_is_forgotten(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = store.models
    await models.report("a", b"of a")
    monkeypatch.setattr(capabilities, "REPORT_LIFETIME_MS", 100)

    async def is_forgotten() -> bool:
        return await models.report("b", b"of b") == [b"of b"]

    await until_async(is_forgotten, "the end of the report")
    monkeypatch.undo()
    assert await models.report("b", b"") == []


async def test_access_keys_are_read_when_their_version_has_changed(
    store: Store, open_on: OpenStore, server: RealServer | Cluster
) -> None:
    other = await open_on()
    assert await store.keys.read(None) == (b"", {})
    assert await store.keys.read(b"") is None
    version, records = b"", {}
    for key_id, record in (("a", b"1"), ("b", b"2"), ("a", b"3")):
        await other.keys.write({key_id: record})
        records[key_id] = record
        found = await store.keys.read(version)
        assert found is not None
        assert found[0] != version
        assert found[1] == records
        version = found[0]
        assert await store.keys.read(version) is None
    emptied(server)
    assert await store.keys.read(version) == (b"", {})
    await other.keys.write({})
    marked = await store.keys.read(b"")
    assert marked is not None
    assert marked[0] != b""
    assert marked[1] == {}


@pytest.mark.parametrize("byte", [0x00, 0x0A, 0x0D, 0x25, 0x80, 0xFF])
async def test_heads_are_compared_as_bytes(store: Store, streams: Streams, byte: int) -> None:
    initial = streams.begin()
    odd = StreamHead(bytes([byte]) * 8, bytes([byte]) * 16, 3)
    new = type(initial)(odd, initial.feed, initial.fingerprint, None, 1, initial.state)
    await committed(store, Commit(key("a"), None, new, None))
    await committed(store, Commit(key("a"), odd, streams.after(new), None))


@pytest.mark.parametrize("exists", [False, True])
async def test_exactly_one_of_many_concurrent_commits_succeeds(
    open_on: OpenStore, streams: Streams, *, exists: bool
) -> None:
    stores = [await open_on() for _ in range(4)]
    first = streams.creation(key("hot"))
    if exists:
        await committed(stores[0], first)
    commits = [streams.next(first) if exists else streams.creation(key("hot")) for _ in range(32)]
    results = await asyncio.gather(
        *(stores[i % 4].commit(columns(commit)) for i, commit in enumerate(commits))
    )
    (winner,) = [c for c, [result] in zip(commits, results, strict=True) if result == Committed()]
    assert all(r in ([Committed()], [Conflicted(winner.new.head)]) for r in results)
    await assert_replayable(stores[0], winner)


# Failures of one stream


async def test_a_key_of_another_type_fails_only_its_own_stream(
    store: Store, streams: Streams, server: RealServer
) -> None:
    commits = [streams.creation(key(name)) for name in ("a", "b", "c")]
    spoilt = StoreSettings(server.url).keys.state(key("b"))
    with server.client() as client:
        client.rpush(spoilt, "not a stream")
        results = await store.commit(columns(*commits))
        assert client.lrange(spoilt, 0, -1) == [b"not a stream"]
    assert (results[0], results[2]) == (Committed(), Committed())
    assert isinstance(results[1], StateDamaged)
    assert "WRONGTYPE" in results[1].detail
    assert await store.delete(key("b"), results[1].head) == Committed()
    assert results[1].facts["stream"] == "b"


async def test_damaged_bytes_fail_only_their_own_stream(
    store: Store, streams: Streams, server: RealServer
) -> None:
    commits = [streams.creation(key(name)) for name in ("a", "b", "c")]
    await committed(store, *commits)
    with server.client() as client:
        client.setrange(StoreSettings(server.url).keys.state(key("b")), HEADER_BYTES + 3, b"\xff")
    found = await load(store, [commit.key for commit in commits])
    assert same_stream(found[0], commits[0].new)
    assert same_stream(found[2], commits[2].new)
    assert isinstance(found[1], StateDamaged)
    assert found[1].facts["stream"] == "b"
    with pytest.raises(StateDamaged):
        await store.load_with_reply(key("b"))


@pytest.mark.parametrize("value", [b"", b"C", b"XXXX" + bytes(200)])
async def test_foreign_bytes_are_neither_read_nor_overwritten(
    store: Store, streams: Streams, server: RealServer, value: bytes
) -> None:
    name = StoreSettings(server.url).keys.state(key("b"))
    with server.client() as client:
        client.set(name, value)
        commits = [streams.creation(key(n)) for n in ("a", "b")]
        stale = streams.next(commits[1])
        (found,) = await load(store, [key("b")])
        assert isinstance(found, StateDamaged)
        assert (await store.commit(columns(*commits)))[0] == Committed()
        for commit in (commits[1], stale):
            (result,) = await store.commit(columns(commit))
            assert isinstance(result, StateDamaged)
        assert client.get(name) == value
        assert await store.delete(key("b")) == Committed()
        assert isinstance((await load(store, [key("b")]))[0], Tombstone)


@pytest.mark.parametrize("has_reply", [True, False], ids=["reply", "no reply"])
async def test_a_full_server_rejects_commits_and_keeps_streams(
    store: Store, streams: Streams, server: RealServer, has_reply: bool
) -> None:
    def sent(*commits: Commit) -> CommitColumns:
        return columns(*[each if has_reply else each._replace(reply=None) for each in commits])

    first, other = streams.creation(key("a")), streams.creation(key("b"))
    await committed(store, first, other)
    server.configure("maxmemory", 1)
    try:
        late = streams.next(first)
        new = streams.creation(key("c"))
        results = await store.commit(sent(streams.creation(key("a")), streams.next(other), new))
    finally:
        server.configure("maxmemory", 0)
    assert results[0] == Conflicted(first.new.head)
    for result in results[1:]:
        assert isinstance(result, StoreRefused)
        assert "OOM" in result.detail
    found = await load(store, [key("a"), key("b"), key("c")])
    assert same_stream(found[0], first.new)
    assert same_stream(found[1], other.new)
    assert found[2] is None
    await assert_replayable(store, other)
    await committed(store, late, new)


# Replies and lifetimes


async def test_a_reply_expires_after_its_ttl(open_on: OpenStore, streams: Streams) -> None:
    store = await open_on(reply_ttl_s=0.05)
    first = streams.creation(key("a"))
    await committed(store, first)

    async def reply_expired() -> bool:
        return (await store.load_with_reply(first.key))[1] is None

    await until_async(reply_expired, "the reply's expiry")
    await assert_stored(store, first)


async def test_a_commit_without_a_reply_or_with_a_large_one_stores_none(
    open_on: OpenStore, streams: Streams
) -> None:
    new = streams.first()
    fits = streams.reply(new, steps=10, outputs=10)
    store = await open_on(reply_max_bytes=52 + 4 * 100)
    await committed(store, Commit(key("a"), None, new, fits))
    assert same_reply((await store.load_with_reply(key("a")))[1], fits)
    after = streams.after(new)
    too_large = streams.reply(after, steps=101, outputs=1)
    await committed(store, Commit(key("a"), new.head, after, too_large))
    state, reply = await store.load_with_reply(key("a"))
    assert same_stream(state, after)
    assert reply is None
    last = streams.after(after)
    await committed(store, Commit(key("a"), after.head, last, streams.reply(last)))
    await committed(store, Commit(key("a"), last.head, streams.after(last), None))
    assert (await store.load_with_reply(key("a")))[1] is None


async def test_a_damaged_reply_counts_as_missing(
    store: Store, streams: Streams, server: RealServer
) -> None:
    first = streams.creation(key("a"))
    await committed(store, first)
    with server.client() as client:
        client.setrange(StoreSettings(server.url).keys.reply(key("a")), 60, b"\xff\xff")
    state, reply = await store.load_with_reply(key("a"))
    assert same_stream(state, first.new)
    assert reply is None


async def test_a_commit_renews_the_idle_ttl(
    open_on: OpenStore, streams: Streams, server: RealServer
) -> None:
    """Without one, a stream has no TTL; its reply always has."""
    default, long_, short = [await open_on(idle_ttl_s=each) for each in (0, 600, 0.05)]
    first = streams.creation(key("a"))
    await committed(default, first)
    name, reply_name = StoreSettings(server.url).keys.pair(key("a"))
    with server.client() as client:
        assert client.pttl(name) == -1
        assert 500_000 < client.pttl(reply_name) <= 600_000
        first = streams.next(first)
        await committed(long_, first)
        assert 500_000 < client.pttl(name) <= 600_000
        client.pexpire(name, 400_000)
        second = streams.next(first)
        await committed(long_, second)
        assert client.pttl(name) > 500_000
    await committed(short, streams.next(second))

    async def has_expired() -> bool:
        return (await short.load([key("a")])) == [None]

    await until_async(has_expired, "the stream's expiry")
