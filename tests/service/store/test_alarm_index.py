"""The index of open alarms, on real servers: written with the states, read in pages."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from service.core.values import StreamKey
from service.store.base import CLOSED, CONTINUING, CommitColumns, Committed, Conflicted, Store
from service.store.capabilities import IndexedAlarm
from service.store.codec import encode_state
from service.store.history import HistoryColumns
from service.store.keys import KeySpace
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied
from tests.support.streams import Commit, OpenStore, Streams, columns, key

MODEL = "flights"


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


def with_alarms(commits: Sequence[Commit], *alarms: str) -> CommitColumns:
    """Commits with their changes of the index."""
    return msgspec.structs.replace(columns(*commits), alarms=alarms)


async def opened(store: Store) -> dict[str, int]:
    """The streams of the index, newest first, with their times."""
    return {each.key.stream: each.opened_ms for each in await store.alarms.page(MODEL, None, 100)}


async def test_alarms_are_read_in_pages_from_the_newest_on_and_a_time_is_not_divided(
    store: Store, streams: Streams
) -> None:
    times = [5, 3, 9, 9, 9, 1, 7]
    commits = [streams.creation(key(f"s{at}")) for at in range(len(times))]
    plain = streams.creation(key("plain"))
    results = await store.commit(with_alarms([*commits, plain], *map(str, times), ""))
    assert results == [Committed()] * 8
    pages: list[list[str]] = []
    before_ms = None
    while page := await store.alarms.page(MODEL, before_ms, 2):
        pages.append([each.key.stream for each in page])
        before_ms = page[-1].opened_ms
    assert pages == [["s2", "s3", "s4"], ["s6", "s0"], ["s1", "s5"]]
    assert await store.alarms.page("other", None, 2) == []


async def test_entries_of_one_partition_with_the_same_time_come_together(
    open_on: OpenStore, streams: Streams
) -> None:
    store = await open_on(partitions=1)
    commits = [streams.creation(key(f"s{at}")) for at in range(5)]
    await store.commit(with_alarms(commits, "9", "9", "9", "9", "8"))
    first = await store.alarms.page(MODEL, None, 2)
    assert [each.key.stream for each in first] == ["s0", "s1", "s2", "s3"]
    assert await store.alarms.page(MODEL, 9, 2) == [IndexedAlarm(key("s4"), 8)]


async def test_an_index_keeps_the_newest_streams(open_on: OpenStore, streams: Streams) -> None:
    """Streams that expire in alarm are not removed one by one."""
    store = await open_on(partitions=1)
    commits = [streams.creation(key(f"s{at}")) for at in range(4098)]
    await store.commit(with_alarms(commits, *(str(at + 1) for at in range(4098))))
    entries = await store.alarms.page(MODEL, None, 5000)
    assert [each.opened_ms for each in entries] == [*range(4098, 2, -1)]


async def test_pages_are_whole_if_the_newest_entries_are_in_one_partition(
    open_on: OpenStore, streams: Streams
) -> None:
    """They are more than the share of a page that is read of each index at first."""
    store, space = await open_on(partitions=64), KeySpace("carry", 64)
    keys = [key(f"s{at}") for at in range(1200)]
    crowded = [each for each in keys if space.partition(each) == 7]
    random = np.random.default_rng(1)
    times = {each: int(random.integers(60)) + 40 * (each in crowded) for each in keys[:300]}
    times |= {each: 40 + int(random.integers(60)) for each in crowded}
    creations = [streams.creation(each) for each in times]
    await store.commit(with_alarms(creations, *map(str, times.values())))
    expected = sorted(times, key=lambda each: (-times[each], each.stream))
    for limit in (1, 9, 1000):
        found: list[StreamKey] = []
        before_ms = None
        while len(found) < len(times):
            page = await store.alarms.page(MODEL, before_ms, limit)
            assert len(page) >= min(limit, len(times) - len(found))
            found += [each.key for each in page]
            assert len({each.opened_ms for each in page[limit - 1 :]}) <= 1
            before_ms = page[-1].opened_ms
        assert found == expected


async def test_pages_of_a_prefix_have_nothing_of_other_streams(
    open_on: OpenStore, streams: Streams
) -> None:
    """Neither names nor times: a cursor is the time of an entry."""
    store = await open_on(partitions=2)
    names = [*(f"a:{at}" for at in range(9)), *(f"b:{at}" for at in range(300)), "a"]
    times = [*range(10, 100, 10), *range(11, 311), 400]
    times[1:4] = [20, 20, 20]
    commits = [streams.creation(key(name)) for name in names]
    await store.commit(with_alarms(commits, *map(str, times)))
    own = [(time, name) for time, name in zip(times, names, strict=True) if name[:2] == "a:"]
    for limit in (1, 2, 4, 100):
        found: list[tuple[int, str]] = []
        before_ms = None
        while page := await store.alarms.page(MODEL, before_ms, limit, "a:"):
            before_ms = page[-1].opened_ms
            assert len(page) >= min(limit, len(own) - len(found))
            found += [(each.opened_ms, each.key.stream) for each in page]
        assert sorted(found) == sorted(own)
        assert [time for time, _ in found] == sorted((time for time, _ in own), reverse=True)


@pytest.mark.parametrize("has_history", [False, True])
async def test_a_commit_changes_the_index_with_the_state_or_not_at_all(
    store: Store, streams: Streams, has_history: bool
) -> None:
    async def commit(commits: Sequence[Commit], *alarms: str) -> list[type]:
        of_commits = with_alarms(commits, *alarms)
        if has_history:
            entries = HistoryColumns([b"\0" * 8 + b"\1\0\0\0" + b"entry"] * len(commits), 4, 2)
            of_commits = msgspec.structs.replace(of_commits, histories=entries)
        return [type(each) for each in await store.commit(of_commits)]

    first = [streams.creation(key("a")), streams.creation(key("b")), streams.creation(key("c"))]
    assert await commit(first, "100", "", "101") == [Committed] * 3
    assert await opened(store) == {"c": 101, "a": 100}
    second = [streams.next(each) for each in first]
    # a conflict: another chunk has changed it
    await store.commit(columns(streams.next(first[2])))
    changes = (f"{CONTINUING}200", f"{CONTINUING}200", CLOSED)
    assert await commit(second, *changes) == [Committed, Committed, Conflicted]
    assert await opened(store) == {"b": 200, "c": 101, "a": 100}
    third = [streams.next(each) for each in second[:2]]
    assert await commit(third, "300", CLOSED) == [Committed] * 2
    assert await opened(store) == {"a": 300, "c": 101}


async def test_an_entry_is_dropped_only_while_its_stream_is_as_it_was_read(
    store: Store, streams: Streams
) -> None:
    commits = [streams.creation(key("a")), streams.creation(key("b"))]
    await store.commit(with_alarms(commits, "100", "101"))
    read = [encode_state(each.new) for each in commits]
    await store.commit(with_alarms([streams.next(commits[0])], f"{CONTINUING}102"))
    entries = [IndexedAlarm(key("a"), 100), IndexedAlarm(key("b"), 101)]
    await store.alarms.drop(dict(zip(entries, read, strict=True)))
    assert await opened(store) == {"a": 100}
    await store.alarms.drop({entries[0]: b""})
    assert await opened(store) == {"a": 100}
    assert await store.delete(key("a")) == Committed()
    (value,) = await store.load([key("a")])
    assert isinstance(value, bytes)
    await store.alarms.drop({entries[0]: value})
    assert await opened(store) == {}


async def test_an_index_lives_as_long_as_states_and_in_their_slot(
    open_on: OpenStore, streams: Streams, server: RealServer | Cluster
) -> None:
    store = await open_on(idle_ttl_s=5000)
    await store.commit(with_alarms([streams.creation(key("a"))], "100"))
    with server.client() as client:
        (state,) = client.scan_iter("*:s:*")
        index = state.replace(b":s:flights:a", b":a:flights")
        assert 4_000_000 < client.pttl(index) <= 5_000_000


async def test_a_value_of_another_kind_in_place_of_an_index_fails_no_commit(
    store: Store, streams: Streams, server: RealServer | Cluster
) -> None:
    commit = streams.creation(key("a"))
    await store.commit(with_alarms([commit], "100"))
    with server.client() as client:
        (index,) = client.scan_iter("*:a:*")
        client.set(index, "?")
    following = streams.next(commit)
    assert await store.commit(with_alarms([following], f"{CONTINUING}101")) == [Committed()]
    (value,) = await store.load([StreamKey(MODEL, "a")])
    assert value == encode_state(following.new)
