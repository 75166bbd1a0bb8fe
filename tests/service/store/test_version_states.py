"""States of streams for versions that did not write the stored ones, on real servers."""

from __future__ import annotations

import pytest

from service.core.values import StreamState
from service.store.base import Committed, Store
from service.store.codec import encode_state, pack_head
from service.store.history import HistoryCopy, StoredHistory
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied
from tests.support.stored_histories import as_version, keep, ranges, read
from tests.support.streams import Commit, Streams, key


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


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
