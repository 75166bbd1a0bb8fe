"""An item of a topic's commit is written whole or not at all, whatever the server rejects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from service.core.errors import CarryError
from service.core.values import Feed, Steps
from service.store.base import COMMITTED
from service.store.history import HistoryColumns
from service.store.history_codec import HistoryCodec, read_range
from service.store.redis.redis_store import RedisStore
from service.store.topics import Destination, NewEntry, TopicItem
from tests.service.store.test_topics import KEYS, add, entries, item, own, pending, read
from tests.support.servers import RealServer, emptied, opened
from tests.support.streams import Commit, Streams, assert_stored, key, load

STREAM = key("a")
LAST_ID = "18446744073709551615-18446744073709551615"
MANY = 9_000
"""More values than a script can pass to one command."""


@pytest.fixture
def server(every_store: RealServer) -> RealServer:
    """An empty one of each kind."""
    return emptied(every_store)


@pytest.fixture
async def store(server: RealServer) -> Any:
    """Streams of one partition, so that any stream is in the slot of the topic."""
    async with opened(server.url, partitions=1) as store:
        yield store


async def test_an_item_whose_last_output_is_rejected_changes_nothing(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    ids = add(server, "1", "2")
    with server.client() as client:
        client.xadd(KEYS.outputs, {"id": "the last but one"}, id=LAST_ID[:-1] + "4")
    await own(store)
    await read(store)
    chunk = item(streams.creation(STREAM), ids, "x", "y")
    (result,) = await store.topics.commit(KEYS, "f1", 1, [chunk])
    assert isinstance(result, CarryError)
    assert entries(server, KEYS.outputs) == [{b"id": b"the last but one"}]
    assert pending(server) == ids
    assert await load(store, [STREAM]) == [None]


async def test_a_chunk_and_its_history_are_written_with_outputs_or_not_at_all(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    ids = add(server, "1", "2", "3", "4")
    await own(store)
    await read(store)
    first = streams.creation(STREAM)
    second = streams.next(first)
    assert await store.topics.commit(KEYS, "f1", 1, [with_history(first, ids[:1])]) == [COMMITTED]

    async def kept() -> list[range]:
        history = await store.histories.read(STREAM, first.new.fingerprint)
        assert history.is_valid
        return [read_range(each) for each in history.entries]

    assert await kept() == [range(4)]
    (result,) = await store.topics.commit(KEYS, "f1", 2, [with_history(second, [b"1-1"])])
    assert isinstance(result, CarryError)
    assert await kept() == [range(4)]
    *_, versions = store._keys.all_of(STREAM)
    with server.client() as client:
        stored = client.dump(versions)
        client.set(versions, "not a hash")
        (result,) = await store.topics.commit(KEYS, "f1", 3, [with_history(second, ids[1:2])])
        assert isinstance(result, CarryError)
        client.restore(versions, 0, stored, replace=True)
    assert await kept() == [range(4)]
    assert pending(server) == ids[1:]
    assert entries(server, KEYS.outputs) == [{b"output": b"x"}]
    others = item(streams.creation(key("b")), ids[2:3], "y"), TopicItem(ids[3:])
    both = [with_history(second, ids[1:2]), *others]
    assert await store.topics.commit(KEYS, "f1", 4, both) == [COMMITTED] * 3
    assert await kept() == [range(4), range(4, 8)]
    assert pending(server) == []


def with_history(commit: Commit, ids: Sequence[bytes]) -> TopicItem:
    """An item with one output, whose chunk has a history."""
    assert commit.new.last is not None
    codec = HistoryCodec(None, 1)
    steps = Steps(Feed.INPUTS, 4, None, np.ones((4, 1), np.float32))
    histories = HistoryColumns([codec.encode(commit.new.last.start, steps)], 64, 4)
    plain = item(commit, ids, "x")
    assert plain.chunk is not None
    return plain._replace(chunk=plain.chunk._replace(history=histories))


async def test_a_dead_letter_that_a_script_cannot_write_leaves_its_entry_pending(
    server: RealServer, store: RedisStore
) -> None:
    ids = add(server, "1")
    await own(store)
    await read(store)
    letter = NewEntry(Destination.DEAD_LETTERS, ("field",) * 2 * MANY)
    (result,) = await store.topics.commit(KEYS, "f1", 1, [TopicItem(ids, [letter])])
    assert isinstance(result, CarryError)
    assert pending(server) == ids
    assert entries(server, KEYS.dead_letters) == []


async def test_a_chunk_of_many_entries_deletes_them(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    ids = add(server, *map(str, range(MANY)))
    await own(store)
    assert await read(store, count=MANY) == ids
    commit = streams.creation(STREAM)
    keys = KEYS._replace(deletes=True)
    assert await store.topics.commit(keys, "f1", 1, [item(commit, ids, "x")]) == [COMMITTED]
    await assert_stored(store, commit)
    assert entries(server, KEYS.topic) == []
    assert pending(server) == []


async def test_a_chunk_with_one_entry_too_many_leaves_all_others_pending(
    server: RealServer, store: RedisStore, streams: Streams
) -> None:
    ids = add(server, *map(str, range(MANY)))
    await own(store)
    await read(store, count=MANY)
    chunk = item(streams.creation(STREAM), [*ids, b"1-1"], "x")
    (result,) = await store.topics.commit(KEYS, "f1", 1, [chunk])
    assert isinstance(result, CarryError)
    with server.client() as client:
        assert client.xpending(KEYS.topic, KEYS.group)["pending"] == MANY
    assert await load(store, [STREAM]) == [None]


async def test_a_halted_key_of_another_type_rejects_the_commit(
    server: RealServer, store: RedisStore
) -> None:
    ids = add(server, "1")
    with server.client() as client:
        client.set(KEYS.halted, "not a hash")
    await own(store)
    await read(store)
    letter = NewEntry(Destination.DEAD_LETTERS, ("code", "bad"))
    with pytest.raises(CarryError):
        await store.topics.commit(KEYS, "f1", 1, [TopicItem(ids, [letter], halts="a")])
    assert pending(server) == ids
    assert entries(server, KEYS.dead_letters) == []
