"""Histories of streams, on real servers: embedded Valkey, Redis, and a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from service.core.errors import StoreRefused
from service.core.values import StreamKey, StreamState
from service.store.base import COMMITTED, Committed, Conflicted, Store, decode_stream
from service.store.codec import encode_state, pack_head
from service.store.history import HistoryCopy, StoredHistory
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied
from tests.support.stored_histories import (
    CODEC,
    as_version,
    commit_all,
    keep,
    ranges,
    read,
)
from tests.support.streams import Commit, OpenStore, Streams, committed, key, load


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


@dataclass
class Oracle:
    """The rules of ring and snapshots, as the documentation has them."""

    events: int
    most: int
    entries: list[range] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)

    def append(self, start: int, stop: int) -> None:
        self.entries.append(range(max(start, stop - self.events), stop))
        while stop - self.entries[0].stop >= self.events:
            del self.entries[0]
        newest = self.snapshots[-1] if self.snapshots else 0
        near = self.most - self.most // 4
        if stop - newest >= max(1, self.events // near):
            self.snapshots.append(stop)
        while len(self.snapshots) > self.most:
            at = self.snapshots
            older = range(1, len(at) - near)
            scores = [(at[i + 1] - at[i - 1]) / (at[-1] - at[i]) for i in older]
            del at[1 + scores.index(min(scores)) if scores else 0]


@pytest.mark.parametrize(("events", "snapshots"), [(64, 8), (64, 2), (1, 3), (5, 4)])
async def test_ring_and_snapshots_follow_the_rules(
    store: Store, streams: Streams, events: int, snapshots: int
) -> None:
    random, oracle = np.random.default_rng(28), Oracle(events, snapshots)
    lengths = [*random.integers(1, 5, 60), *random.integers(1, 601, 40), *[1] * 80, 64, 63, 65, 1]
    before: StreamState | None = None
    states: dict[int, StreamState] = {}
    for length in map(int, lengths):
        new = streams.after(before or streams.begin(), length)
        commit = Commit(key("a"), before and before.head, new, None)
        await keep(store, commit, events=events, snapshots=snapshots)
        oracle.append(new.head.position - length, new.head.position)
        before, states[new.head.position] = new, new
        found = await read(store, new, key("a"), new.head.position)
        assert found.is_valid
        assert ranges(found) == oracle.entries
        assert found.positions == oracle.snapshots
        assert sum(map(len, oracle.entries)) >= min(events, new.head.position)
        # with short chunks a rewind is exact over most of the events
        near = snapshots - snapshots // 4
        if oracle.entries[0].start > 0 and max(map(len, oracle.entries)) <= events // near:
            first = min(each for each in oracle.snapshots if each >= oracle.entries[0].start)
            assert new.head.position - first >= (near - 1) * (events // near)
        if oracle.snapshots:
            assert found.snapshot == encode_state(states[oracle.snapshots[-1]])
        rows = [CODEC.decode(value).steps.rows for value in found.entries]
        kept = np.concatenate([each for each in rows if each is not None])[:, 0]
        assert kept.tolist() == list(range(int(kept[0]), new.head.position))
    assert before is not None
    for position in oracle.snapshots:
        for wanted in (position, position + 1):
            found = await read(store, before, key("a"), wanted)
            assert found.snapshot is not None
            newest = max(each for each in oracle.snapshots if each <= wanted)
            assert decode_stream(found.snapshot).head == states[newest].head
    assert (await read(store, before, key("a"), oracle.snapshots[0] - 1)).snapshot is None


async def test_a_history_follows_changed_settings(store: Store, streams: Streams) -> None:
    last = await filled(store, streams, key("a"), [1] * 100)
    for events, snapshots, kept in ((10, 3, 10), (64, 8, 20)):
        for _ in range(10):
            last = Commit(key("a"), last.new.head, streams.after(last.new, 1), None)
            await keep(store, last, events=events, snapshots=snapshots)
        found = await read(store, last.new, key("a"))
        stop = last.new.head.position
        assert ranges(found) == [range(at, at + 1) for at in range(stop - kept, stop)]
        assert 3 <= len(found.positions) <= snapshots


async def test_a_history_of_many_streams_is_committed_together(
    open_on: OpenStore, streams: Streams
) -> None:
    store = await open_on(partitions=3)
    commits = [streams.creation(key(f"s{i}")) for i in range(20)]
    await keep(store, *commits)
    stale = streams.creation(key("s0"))
    following = [stale, *[streams.next(commit) for commit in commits[1:]]]
    results = await commit_all(store, *following)
    assert results == [Conflicted(commits[0].new.head), *[COMMITTED] * 19]
    found = await read(store, commits[0].new, key("s0"))
    assert ranges(found) == [range(4)]
    for commit in following[1:]:
        found = await read(store, commit.new, commit.key)
        assert ranges(found) == [range(4), range(4, 8)]
        assert [CODEC.decode(each).starts for each in found.entries] == [True, False]


async def test_a_commit_that_keeps_no_history_ends_it(store: Store, streams: Streams) -> None:
    """As by a worker whose history is off: the next one starts with the state that it met."""
    first = streams.creation(key("a"))
    await keep(store, first)
    second = streams.next(first)
    await committed(store, second)
    found = await read(store, second.new, key("a"), 100)
    assert found == StoredHistory(encode_state(second.new))
    assert await store.histories.copy([key("a")]) == [(encode_state(second.new), None)]
    other = encode_state(as_version(second.new, bytes(16)))
    assert await store.histories.commit_versions([key("a")], [other]) == [False]
    third = streams.next(second)
    await keep(store, third)
    found = await read(store, third.new, key("a"), 8)
    assert ranges(found) == [range(8, 12)]
    assert found.positions == [8, 12]
    assert found.snapshot == encode_state(second.new)


async def test_a_stream_that_starts_over_starts_its_history(store: Store, streams: Streams) -> None:
    first = streams.creation(key("a"))
    await keep(store, first)
    again = streams.first()
    await keep(store, Commit(key("a"), first.new.head, again, None))
    found = await read(store, again, key("a"))
    assert ranges(found) == [range(4)]
    assert found.positions == [4]
    restored = streams.begin(position=2**60)
    value = encode_state(restored)
    result = await store.histories.write(key("a"), pack_head(again.head), value, HistoryCopy())
    assert result == Committed()
    found = await read(store, restored, key("a"), 2**60)
    assert (found.entries, found.positions) == ([], [2**60])
    assert found.snapshot == encode_state(restored)
    after = Commit(key("a"), restored.head, streams.after(restored), None)
    await keep(store, after)
    found = await read(store, after.new, key("a"), 2**60 + 1)
    assert ranges(found) == [range(2**60, 2**60 + 4)]


async def test_both_keys_have_the_idle_ttl(
    open_on: OpenStore, streams: Streams, server: RealServer | Cluster
) -> None:
    store, name = await open_on(idle_ttl_s=600), StoreSettings(server.url).keys.all_of(key("a"))
    first = streams.creation(key("a"))
    await keep(store, first)
    with server.client() as client:
        for each in (name[0], name[2], name[3]):
            assert 500_000 < client.pttl(each) <= 600_000
            client.pexpire(each, 400_000)
        await keep(store, streams.next(first))
        assert all(client.pttl(each) > 500_000 for each in (name[0], name[2], name[3]))


async def test_a_key_of_another_type_fails_only_its_own_stream(
    store: Store, streams: Streams, server: RealServer | Cluster
) -> None:
    commits = [streams.creation(key(name)) for name in ("a", "b", "c")]
    _, _, events, versions = StoreSettings(server.url).keys.all_of(key("b"))
    with server.client() as client:
        client.set(versions, "no hash")
        results = await commit_all(store, *commits)
        assert (results[0], results[2]) == (COMMITTED, COMMITTED)
        assert "WRONGTYPE" in str(results[1])
        assert await load(store, [key("b")]) == [None]
        client.delete(versions)
        await keep(store, commits[1])
        client.delete(events)
        client.set(events, "no list")
        assert "WRONGTYPE" in str((await commit_all(store, streams.next(commits[1])))[0])
        assert await store.histories.copy([key("b")]) == [(encode_state(commits[1].new), None)]
        client.delete(events)
    await keep(store, streams.next(commits[1]))


async def test_a_full_server_rejects_states_with_histories(
    store: Store, streams: Streams, server: RealServer
) -> None:
    last = await filled(store, streams, key("a"), [5] * 30)
    before = await read(store, last.new, key("a"), 150)
    back = streams.begin(position=45)._replace(fingerprint=last.new.fingerprint)
    history = HistoryCopy(CODEC.keep_until(before.entries, 45))
    server.configure("maxmemory", 1)
    try:
        for name, expected, keeps in (
            ("a", pack_head(last.new.head), True),
            ("a", pack_head(last.new.head), False),
            ("b", b"", False),
        ):
            with pytest.raises(StoreRefused, match="OOM"):
                await store.histories.write(
                    key(name), expected, encode_state(back), history, keeps_snapshots=keeps
                )
    finally:
        server.configure("maxmemory", 0)
    assert await read(store, last.new, key("a"), 150) == before
    assert await store.histories.copy([key("b")]) == [(None, None)]


async def filled(store: Store, streams: Streams, name: StreamKey, lengths: Sequence[int]) -> Commit:
    """A stream after chunks of these lengths; returns the last commit."""
    before: StreamState | None = None
    for length in lengths:
        new = streams.after(before or streams.begin(), length)
        last = Commit(name, before and before.head, new, streams.reply(new))
        await keep(store, last)
        before = new
    return last
