"""How a consumer waits for new entries: it reads when there are some, and does not read in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from models.artifact.artifact import Artifact
from service.consumers.arrivals import Arrivals
from service.store.redis.topics import RedisTopics
from service.store.topics import Entry, TopicKeys
from tests.support.consumers import (
    add,
    assert_outputs,
    consuming,
    fields_of,
    outputs_of,
    until_count,
)
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, server, shared_server

__all__ = ["server", "shared_server"]

RANDOM = np.random.default_rng(5)
KEYS = TopicKeys.of("events", "scores", "events:dead", "carry")
NEVER_S = 600.0
LAST = b"5-0"


class Watched(RedisTopics):
    """Topics with a last entry, whose watches the test ends."""

    def __init__(self) -> None:
        self.watches: list[tuple[bytes, asyncio.Future[bool]]] = []

    async def last_id(self, keys: TopicKeys) -> bytes:
        return LAST

    def watch(self, keys: TopicKeys, after: bytes, notification: asyncio.Future[bool]) -> bool:
        self.watches.append((after, notification))
        return True


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


def entries(*ids: bytes) -> list[Entry]:
    return [Entry(each, ()) for each in ids]


async def notice(arrivals: Arrivals, topics: Watched, *ids: bytes, found: bool) -> bytes:
    """Wait after a read of entries, until the watch notices something; returns the id behind which
    it looked."""
    count = len(topics.watches)
    waiting = asyncio.create_task(arrivals.wait(entries(*ids), NEVER_S))
    await becomes(lambda: len(topics.watches) > count, "a watch")
    after, notification = topics.watches[-1]
    notification.set_result(found)
    await waiting
    return after


async def test_a_watch_looks_behind_the_last_entry_that_was_read() -> None:
    topics = Watched()
    arrivals = Arrivals(topics, KEYS)
    assert await notice(arrivals, topics, b"7-0", found=False) == b"7-0"
    assert await notice(arrivals, topics, found=False) == b"7-0"


async def test_a_topic_that_was_read_to_its_end_before_is_read_again_behind_its_last_entry() -> (
    None
):
    """An entry that is added in front of the watch is in that read."""
    topics = Watched()
    arrivals = Arrivals(topics, KEYS)
    await arrivals.wait([], NEVER_S)
    assert topics.watches == []
    assert await notice(arrivals, topics, found=False) == LAST
    arrivals.restart()
    await arrivals.wait([], NEVER_S)
    assert len(topics.watches) == 1


async def test_entries_that_others_of_the_group_read_are_not_looked_for_again() -> None:
    """Otherwise each look would find them, and the topic would be read without a pause."""
    topics = Watched()
    arrivals = Arrivals(topics, KEYS)
    assert await notice(arrivals, topics, b"7-0", found=True) == b"7-0"
    await arrivals.wait([], NEVER_S)
    assert await notice(arrivals, topics, found=False) == LAST


async def test_a_busy_topic_is_read_again_without_a_watch() -> None:
    topics = Watched()
    arrivals = Arrivals(topics, KEYS)
    await notice(arrivals, topics, b"7-0", found=True)
    await arrivals.wait(entries(b"8-0", b"9-0"), NEVER_S)
    assert len(topics.watches) == 1
    assert await notice(arrivals, topics, found=False) == b"9-0"


async def test_a_watch_lasts_until_it_notices_something() -> None:
    topics = Watched()
    arrivals = Arrivals(topics, KEYS)
    waiting = asyncio.create_task(arrivals.wait(entries(b"7-0"), NEVER_S))
    await becomes(lambda: topics.watches, "a watch")
    arrivals.wake()
    await waiting
    again = asyncio.create_task(arrivals.wait([], NEVER_S))
    await asyncio.sleep(0)
    topics.watches[0][1].set_result(False)
    await again
    assert len(topics.watches) == 1


async def test_a_topic_that_may_have_moved_is_watched_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.consumers.arrivals.MAX_READ_INTERVAL_S", 0.001)
    topics = Watched()
    arrivals = Arrivals(topics, KEYS)
    await arrivals.wait(entries(b"7-0"), NEVER_S)
    await arrivals.wait([], NEVER_S)
    assert [after for after, _ in topics.watches] == [b"7-0", b"7-0"]


async def test_no_arrival_is_missed(
    server: RealServer, client: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.consumers.arrivals.MAX_READ_INTERVAL_S", NEVER_S)
    """Nothing depends on further reads."""
    rows = rows_of(RANDOM, 40)
    async with consuming(server.url, artifact):
        for at, row in enumerate(rows, 1):
            add(client, "events", fields_of("a", row))
            await until_count(client, "scores", at)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)


async def test_events_are_read_where_the_server_permits_no_watch(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 20)
    with capture_logs() as lines, without_looking(client):
        async with consuming(server.url, artifact):
            for at, row in enumerate(rows):
                add(client, "events", fields_of("a", row))
                await until_count(client, "scores", at + 1)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)
    assert "topics_not_watched" in {each["event"] for each in lines}


@contextmanager
def without_looking(client: Any) -> Iterator[None]:
    """The default user may not use `XREAD`."""
    client.execute_command("ACL", "SETUSER", "default", "-xread")
    try:
        yield
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+xread")
