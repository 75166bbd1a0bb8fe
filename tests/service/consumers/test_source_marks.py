"""Consumers continue streams that were loaded from a history: what that contains is skipped."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from service.consumers.config import make_config
from service.core.errors import OperatorError, StoreUnavailable
from service.core.values import SourceMark, StreamKey
from service.store.base import COMMITTED, CommitColumns
from service.store.codec import encode_state, pack_head
from service.store.keys import KeySpace
from service.store.redis.topics import RedisTopics
from service.store.source_mark import source_name
from tests.support.cluster import Cluster, shared_cluster
from tests.support.consumers import (
    PROBE,
    add,
    consuming,
    fields_of,
    interleaved,
    outputs_of,
    until_count,
)
from tests.support.kafka import Broker, reading, record_of
from tests.support.marked import assert_continued, create_streams, mark_of, stream_after
from tests.support.pipelines import rows_of
from tests.support.servers import KINDS, RealServer, becomes, emptied, opened, real_server
from tests.support.streams import load

__all__ = ["shared_cluster"]

RANDOM = np.random.default_rng(29)
PARTITIONS = 8
Rows = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Any:
    """Each kind of server."""
    with real_server(request.param) as running:
        yield running


def pending(client: Any) -> int:
    return client.xpending("events", "carry")["pending"]


async def test_events_of_the_history_are_skipped_and_later_ones_computed(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 40) for number in range(12)}
    known = {name: 3 * number for number, name in enumerate(rows)}
    ids = add(client, "events", *interleaved(rows)[:300])
    async with opened(server.url) as store:
        streams = {
            name: stream_after(
                artifact, rows[name][:count], mark_of("events", ids[12 * (count - 1) + at])
            )
            for at, (name, count) in enumerate(known.items())
            if 0 < count <= 25  # what was added so far
        }
        await create_streams(store, streams)
        async with consuming(server.url, artifact, where=None) as consumer:
            total = 480 - sum(known[name] for name in streams)
            add(client, "events", *interleaved(rows)[300:])
            await until_count(client, "scores", total)
            await becomes(lambda: pending(client) == 0, "no pending entry")
        assert consumer.counts["skipped"] == sum(known[name] for name in streams)
        assert consumer.counts["losses"] == 0
        found = outputs_of(client, "scores")
        for name, each in rows.items():
            assert_continued(artifact, found[name], each, known[name] if name in streams else 0)
        stored = await load(store, [StreamKey("probe", name) for name in rows])
        assert [each.source for each in stored] == [None] * 12


@pytest.mark.parametrize(
    ("mark", "skipped"),
    [(SourceMark("events", 2**63), 5), (SourceMark("others", 2**63), 0), (None, 0)],
    ids=["its topic", "another topic", "no mark"],
)
async def test_only_a_mark_of_the_topic_skips_its_events(
    server: RealServer, client: Any, artifact: Artifact, mark: SourceMark | None, skipped: int
) -> None:
    rows = rows_of(RANDOM, 9)
    add(client, "events", *[fields_of("a", row) for row in rows[:5]])
    async with opened(server.url) as store:
        await create_streams(store, {"a": stream_after(artifact, rows[5:], mark)})
    async with consuming(server.url, artifact) as consumer:
        await becomes(lambda: consumer.counts.total() == 5, "five entries")
    assert consumer.counts["skipped"] == skipped
    assert client.xlen("scores") == 5 - skipped


async def test_a_stream_that_is_overwritten_under_a_running_consumer_continues_the_history(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    """The consumer has the state before in memory."""
    rows = rows_of(RANDOM, 30)
    async with consuming(server.url, artifact) as consumer, opened(server.url) as store:
        add(client, "events", *[fields_of("a", row) for row in rows[:10]])
        await until_count(client, "scores", 10)
        key = StreamKey("probe", "a")
        (stored,) = await load(store, [key])
        (last,) = add(client, "events", {"stream": "b", "event": "[0, 0, 0]"})
        future = int(last.split(b"-")[0]) + 10**9
        loaded = stream_after(artifact, rows[:12], SourceMark("events", future))
        commit = CommitColumns([key], [pack_head(stored.head)], [encode_state(loaded)], [b""])
        assert await store.commit(commit) == [COMMITTED]
        add(client, "events", *[fields_of("a", row) for row in rows[10:12]])
        await becomes(lambda: consumer.counts["skipped"] == 2, "two skipped events")
        client.xadd("events", fields_of("a", rows[12]), id=f"{future + 1}-0")
        await until_count(client, "scores", 12)
    found = outputs_of(client, "scores")["a"]
    assert_continued(artifact, found[:10], rows[:10], 0)
    assert_continued(artifact, found[10:], rows[:13], 12)


@pytest.mark.parametrize("fault", ["reply is late", "is not sent", "reply is lost"])
async def test_events_are_never_computed_before_those_in_front_are_skipped(
    server: RealServer,
    client: Any,
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """The chunk that follows drops the mark: a skip that fails after it could not be repeated."""
    commit, faults = RedisTopics.commit, [0]

    async def commit_with_faults(self: RedisTopics, *arguments: Any) -> Any:
        is_faulty = faults[0] < 3 and any(item.chunk is None for item in arguments[3])
        faults[0] += is_faulty
        if is_faulty and fault == "is not sent":
            raise StoreUnavailable("no connection")
        results = await commit(self, *arguments)
        if is_faulty and fault == "reply is lost":
            raise StoreUnavailable("no answer")
        for _ in range(100 * is_faulty):
            await asyncio.sleep(0.001)
        return results

    monkeypatch.setattr(RedisTopics, "commit", commit_with_faults)
    rows = {f"s{number}": rows_of(RANDOM, 40) for number in range(5)}
    # its rejection is being written when the others are skipped
    add(client, "events", {"stream": "invalid", "event": "?"})
    ids = add(client, "events", *interleaved(rows))
    async with opened(server.url) as store:
        streams = {
            name: stream_after(artifact, each[:20], mark_of("events", ids[5 * 19 + at]))
            for at, (name, each) in enumerate(rows.items())
        }
        await create_streams(store, streams)
    async with consuming(server.url, artifact) as consumer:
        await until_count(client, "scores", 100)
        await becomes(lambda: pending(client) == 0, "no pending entry")
    assert faults[0]
    assert consumer.counts["skipped"] <= 100
    found = outputs_of(client, "scores")
    for name, each in rows.items():
        assert_continued(artifact, found[name], each, 20)


async def test_partitioned_topics_of_a_cluster_are_continued(
    shared_cluster: Cluster, artifact: Artifact
) -> None:
    cluster, space = emptied(shared_cluster), KeySpace("carry", PARTITIONS)
    rows: Rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(20)}
    settings = {"partitions": PARTITIONS}
    outputs = [f"{space.partition_prefix(each)}:out:scores" for each in range(PARTITIONS)]
    with cluster.client() as client:
        streams = {}
        for number, (name, each) in enumerate(rows.items()):
            topic = f"{space.partition_prefix(space.partition(StreamKey('probe', name)))}:in:events"
            ids = [client.xadd(topic, fields_of(name, row)) for row in each]
            if number:
                mark = mark_of("events", ids[number - 1])
                streams[name] = stream_after(artifact, each[:number], mark)
        async with opened(cluster.url, **settings) as store:
            await create_streams(store, streams)
        async with consuming(cluster.url, artifact, settings, partitioned=True) as consumer:
            total = 400 - sum(range(20))
            await becomes(lambda: sum(map(client.xlen, outputs)) >= total, "all outputs")
            await becomes(lambda: consumer.counts["skipped"] == sum(range(20)), "skipped events")
        found = {
            name: each for topic in outputs for name, each in outputs_of(client, topic).items()
        }
        for number, (name, each) in enumerate(rows.items()):
            assert_continued(artifact, found.get(name, []), each, number)


async def test_a_topic_of_kafka_is_continued_at_the_offsets_of_its_partitions(
    server: RealServer, client: Any, artifact: Artifact, broker: Broker
) -> None:
    rows: Rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(6)}
    url = broker.create("events", 2)
    streams = {}
    for number, (name, each) in enumerate(rows.items()):
        partition = number % 2
        broker.produce("events", *[record_of(name, row, partition=partition) for row in each])
        # the last record of the history, each partition having those of three streams
        offset = 20 * (number // 2) + number - 1
        if number:
            mark = SourceMark(source_name("events", partition), offset)
            streams[name] = stream_after(artifact, each[:number], mark)
    async with opened(server.url) as store:
        await create_streams(store, streams)
    total = 120 - sum(range(6))
    async with (
        reading(server.url, **{"from": url}),
        consuming(server.url, artifact, **{"from": url}) as consumer,
    ):
        await until_count(client, "scores", total)
        await becomes(lambda: consumer.counts["skipped"] == sum(range(6)), "skipped records")
    found = outputs_of(client, "scores")
    for number, (name, each) in enumerate(rows.items()):
        assert_continued(artifact, found[name], each, number)


async def test_a_new_group_starts_behind_an_id(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 9)
    ids = add(client, "events", *[fields_of("a", row) for row in rows])
    async with opened(server.url) as store:
        await create_streams(store, {"a": stream_after(artifact, rows[:4], None)})
    async with consuming(server.url, artifact, start=ids[3].decode()):
        await until_count(client, "scores", 5)
    assert_continued(artifact, outputs_of(client, "scores")["a"], rows, 4)


async def test_a_new_group_starts_at_the_offsets_of_kafka(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 3)
    broker.produce("events", *[{"partition": each % 3, "value": "0"} for each in range(12)])
    async with reading(server.url, **{"from": url, "start": {0: 1, 2: 3}}):
        await becomes(lambda: client.xlen("events:carry:probe") == 8, "the records")
    origins = [fields[b"carry-origin"] for _, fields in client.xrange("events:carry:probe")]
    expected = {0: range(1, 4), 1: range(4), 2: range(3, 4)}
    assert {*origins} == {b"events:%d:%d" % (p, n) for p, each in expected.items() for n in each}


@pytest.mark.parametrize(
    ("start", "source", "expected"),
    [
        ("first", "events", "start: expected beginning, end, the id of an entry such as 17"),
        ("1-2-3", "events", "expected beginning, end, the id"),
        (True, "events", "expected beginning, end, the id"),
        ({}, "events", "expected beginning, end, the id"),
        ({0: -1}, "events", "expected beginning, end, the id"),
        ({"0": 1}, "kafka://h:9/events", "expected beginning, end, the id"),
        ({0: 1}, "events", "start: expected beginning, end or an id with a topic of the store"),
        ("7-0", "kafka://h:9/events", "start: expected beginning, end or offsets with a topic of"),
    ],
)
def test_where_a_group_cannot_start_is_rejected(start: Any, source: str, expected: str) -> None:
    with pytest.raises(OperatorError, match=expected):
        make_config(PROBE | {"from": source, "start": start}, "test")


def test_ids_of_entries_are_read_as_numbers_too() -> None:
    starts = [make_config(PROBE | {"start": each}, "test").start_id for each in (7, "7", "7-1")]
    assert starts == ["7-0", "7-0", "7-1"]
    assert make_config(PROBE, "test").start_id == "0"
    assert make_config(PROBE | {"start": "end"}, "test").start_id == "$"
