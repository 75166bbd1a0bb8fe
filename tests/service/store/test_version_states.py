"""States of streams for versions that did not write the stored ones, on real servers."""

from __future__ import annotations

import pytest

from service.core.values import StreamState
from service.store.base import Committed, Store
from service.store.codec import encode_state, pack_head
from service.store.history import HistoryCopy, StoredHistory
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied
from tests.support.stored_histories import as_version, keep, ranges, read
from tests.support.streams import Commit, Streams, key


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


async def test_the_state_of_the_version_before_is_kept(store: Store, streams: Streams) -> None:
    old, new = b"o" * 16, b"n" * 16
    first = streams.creation(key("a"))
    first = first._replace(new=as_version(first.new, old))
    await keep(store, first)
    second = streams.next(first)
    second = second._replace(new=as_version(second.new, new))
    await keep(store, second)
    for fingerprint, kept in ((old, encode_state(first.new)), (new, None), (b"x" * 16, None)):
        found = await store.histories.read(key("a"), fingerprint, 8)
        assert found.version_state == kept
    found = await store.histories.read(key("a"), old, 8)
    assert (found.positions, found.snapshot) == ([4], encode_state(first.new))
    third = streams.next(second)
    await keep(store, third._replace(new=as_version(third.new, old)))
    assert (await store.histories.read(key("a"), old)).version_state is None
    assert (await store.histories.read(key("a"), new)).version_state == encode_state(second.new)


async def test_states_for_versions_are_written_in_their_epoch_and_never_go_back(
    store: Store, streams: Streams
) -> None:
    first = streams.creation(key("a"))
    second = streams.next(first)
    await keep(store, first)
    await keep(store, second)
    early, late = (encode_state(as_version(each.new, b"v" * 16)) for each in (first, second))
    write = store.histories.commit_versions
    for value, is_written in ((early, True), (late, True), (early, False), (late, False)):
        assert await write([key("a")], [value]) == [is_written]
    foreign = encode_state(as_version(streams.first(), b"v" * 16))
    assert await write([key("a")], [foreign]) == [False]
    assert await write([key("missing")], [late]) == [False]
    assert await write([key("a")], [encode_state(second.new)]) == [False]
    assert (await store.histories.read(key("a"), b"v" * 16)).version_state == late


@pytest.mark.parametrize("order", ["vwx", "wvx"])
async def test_of_too_many_states_for_versions_the_one_furthest_behind_is_dropped(
    store: Store, streams: Streams, order: str
) -> None:
    first = streams.creation(key("a"))
    second = streams.next(first)
    await keep(store, first)
    await keep(store, second)
    for letter in order:
        version = letter.encode() * 16
        state = as_version(first.new if letter == "w" else second.new, version)
        assert await store.histories.commit_versions([key("a")], [encode_state(state)]) == [True]
    for letter in order:
        found = await store.histories.read(key("a"), letter.encode() * 16)
        assert (found.version_state is None) == (letter == "w")


async def test_a_version_state_of_an_earlier_epoch_is_not_written(
    store: Store, streams: Streams
) -> None:
    """Two epochs that begin at one position have the same tag there."""
    value: StreamState | None = None
    expected, write = b"", store.histories.commit_versions
    for _ in range(2):
        created = streams.begin(position=9)
        state = encode_state(created)
        result = await store.histories.write(key("a"), expected, state, HistoryCopy())
        assert result == Committed()
        await keep(store, Commit(key("a"), created.head, after := streams.after(created), None))
        expected, value = pack_head(after.head), value or as_version(created, b"v" * 16)
    assert await write([key("a")], [encode_state(value)]) == [False]
    assert await write([key("a")], [encode_state(as_version(created, b"v" * 16))]) == [True]


async def test_snapshots_of_a_version_with_a_similar_fingerprint_are_not_read(
    store: Store, streams: Streams
) -> None:
    first = streams.creation(key("a"))
    first = first._replace(new=as_version(first.new, b"o" * 8 + b"1" * 8))
    await keep(store, first)
    assert (await read(store, first.new, key("a"), 4)).snapshot is not None
    found = await store.histories.read(key("a"), b"o" * 8 + b"2" * 8, 4)
    assert found.snapshot is None


async def test_a_version_state_of_a_lost_branch_is_not_written(
    store: Store, server: RealServer | Cluster, streams: Streams
) -> None:
    """A failover may lose the last commits, and the stream goes on in the same epoch."""
    first = streams.creation(key("a"))
    await keep(store, first)
    names = StoreSettings(server.url).keys.all_of(key("a"))
    with server.client() as client:
        dumps = {name: client.dump(name) for name in names if client.exists(name)}
        lost = streams.next(first)
        await keep(store, lost)
        for name, dump in dumps.items():
            client.restore(name, 0, dump, replace=True)
    write, value = store.histories.commit_versions, as_version(lost.new, b"v" * 16)
    assert await write([key("a")], [encode_state(value)]) == [False]
    second = streams.next(first)
    await keep(store, second)
    assert await write([key("a")], [encode_state(value)]) == [False]
    third = streams.next(second)
    await keep(store, third)
    assert await write([key("a")], [encode_state(value)]) == [False]
    for commit in (second, third):
        current = as_version(commit.new, b"v" * 16)
        assert await write([key("a")], [encode_state(current)]) == [True]


async def test_without_events_only_the_states_for_versions_are_kept(
    store: Store, streams: Streams
) -> None:
    first = streams.creation(key("a"))
    await keep(store, first)
    second = streams.next(first)
    await keep(store, second, events=0, snapshots=1)
    other = encode_state(as_version(second.new, b"v" * 16))
    assert await store.histories.commit_versions([key("a")], [other]) == [True]
    third = streams.next(second)
    await keep(store, third, events=0, snapshots=1)
    found = await store.histories.read(key("a"), b"v" * 16, 100)
    assert found == StoredHistory(encode_state(third.new), True, [], None, [], other)
    fourth = streams.next(third)
    await keep(store, fourth)
    found = await read(store, fourth.new, key("a"), 12)
    assert ranges(found) == [range(12, 16)]
    assert found.snapshot == encode_state(third.new)
