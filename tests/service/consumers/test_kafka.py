"""A topic of Kafka is read into the input topics of a consumer, each record exactly once."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaError, TopicPartition
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from service.consumers import kafka
from service.consumers.config import make_config
from service.consumers.kafka import KafkaSource
from service.consumers.kafka_client import TopicDescription
from service.consumers.kafka_offsets import OffsetsLostError, StoredOffsets, entry_id
from service.core.errors import OperatorError
from service.store.settings import StoreSettings
from service.store.topics import Entry
from tests.support.cluster import Cluster, shared_cluster
from tests.support.consumers import PROBE, assert_outputs, consuming, outputs_of
from tests.support.kafka import (
    Broker,
    reading,
    record_of,
    running_broker,
)
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, emptied, opened, real_server

__all__ = ["shared_cluster"]

RANDOM = np.random.default_rng(19)
PARTITIONS = 8
GROUP = "carry:probe"
INPUT = f"events:{GROUP}"
SOURCES = f"{INPUT}:sources"


def records(rows: dict[str, NDArray[np.float32]]) -> list[dict[str, Any]]:
    """Records of several streams in turns."""
    count = len(next(iter(rows.values())))
    return [record_of(name, each[at]) for at in range(count) for name, each in rows.items()]


def input_of(client: Any) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in client.xrange(INPUT)]


async def test_records_are_consumed_on_a_cluster(
    shared_cluster: Cluster, artifact: Artifact, broker: Broker
) -> None:
    cluster = emptied(shared_cluster)
    rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(20)}
    sent, settings = records(rows), {"partitions": PARTITIONS}
    url = broker.create("events", 3)
    broker.produce("events", *sent[:150])
    outputs = [f"carry{{p{partition:04d}}}:out:scores" for partition in range(PARTITIONS)]
    with cluster.client() as client:
        async with (
            reading(cluster.url, settings, **{"from": url}),
            consuming(cluster.url, artifact, settings, **{"from": url}),
        ):
            broker.produce("events", *sent[150:])
            await becomes(lambda: sum(map(client.xlen, outputs)) >= 400, "all outputs")
        found = {
            name: each for topic in outputs for name, each in outputs_of(client, topic).items()
        }
        assert {*found} == {*rows}
        for name, each in rows.items():
            assert_outputs(artifact, found[name], each)
        inputs = [name.replace(":out:scores", f":in:{INPUT}") for name in outputs]
        assert sum(map(client.xlen, inputs)) == 0


def origins(client: Any, topic: str = INPUT) -> list[bytes]:
    return [fields[b"carry-origin"] for _, fields in client.xrange(topic)]


async def test_entry_has_key_value_configured_headers_and_origin(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    headers = {"position": "7", "other": "x"}
    broker.produce("events", {"key": "a", "value": "[1]", "headers": headers}, {"value": "[2]"})
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 2, "the entries")
    first, second = input_of(client)
    assert first == {
        b"carry-origin": b"events:0:0",
        b"position": b"7",
        b"stream": b"a",
        b"event": b"[1]",
    }
    assert second == {b"carry-origin": b"events:0:1", b"event": b"[2]"}


async def test_partitions_that_a_broker_does_not_know_yet_are_read_later(
    server: RealServer, client: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another broker than the coordinator's describes the topic."""
    monkeypatch.setattr(kafka, "RESTART_S", 0.01)
    describe, described = kafka.describe_topic, []

    def describe_too_few(*arguments: Any) -> TopicDescription:
        described.append(describe(*arguments))
        return described[-1]._replace(partitions=2 if len(described) > 2 else 1)

    monkeypatch.setattr(kafka, "describe_topic", describe_too_few)
    url = broker.create("events", 2)
    broker.produce("events", *[record_of("a", rows_of(RANDOM, 1)[0], partition=1)] * 3)
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 3, "the entries")
    assert len(described) > 2


async def test_record_in_hand_at_a_rebalance_hides_no_loss_of_the_store(
    server: RealServer, client: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store loses records, and the partition is assigned again behind the next record."""
    url = broker.create("events", 1)
    sent = records({"a": rows_of(RANDOM, 11)})
    broker.produce("events", *sent[:10])
    make_client, is_due = KafkaSource._make_client, threading.Event()

    class Rebalanced:
        """A client that is assigned its partition again behind the first record that it reads."""

        def __init__(self, source: KafkaSource):
            self._client = make_client(source)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._client, name)

        def subscribe(self, names: list[str], on_assign: Any, on_revoke: Any) -> None:
            self._on_assign = on_assign
            self._client.subscribe(names, on_assign=on_assign, on_revoke=on_revoke)

        def consume(self, count: int, timeout_s: float) -> list[Any]:
            if count > 1 and is_due.is_set():
                is_due.clear()
                for entry_id, _ in client.xrange(INPUT)[6:]:
                    client.xdel(INPUT, entry_id)
                client.hset(SOURCES, "kafka:events:0", "6-0")
                self._on_assign(self._client, [TopicPartition("events", 0)])
            found: list[Any] = self._client.consume(count, timeout_s)
            return found

    monkeypatch.setattr(KafkaSource, "_make_client", lambda source: Rebalanced(source))
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 10, "the entries")
        is_due.set()
        broker.produce("events", sent[10])
        await becomes(lambda: client.hget(SOURCES, "kafka:events:0") == b"11-0", "the last record")
    assert origins(client) == [b"events:0:%d" % each for each in range(11)]


async def test_reading_continues_where_the_store_is_whatever_was_committed_to_kafka(
    server: RealServer, client: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "SAVE_INTERVAL_S", 0)
    url = broker.create("events", 1)
    broker.produce("events", *records({"a": rows_of(RANDOM, 10)}))
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: broker.committed(GROUP, "events", 1) == [10], "the committed offset")
    assert client.xlen(INPUT) == 10
    assert client.hget(SOURCES, "kafka:events:0") == b"10-0"
    # the store loses its last entries: those of a replica that was promoted, say
    client.xtrim(INPUT, maxlen=0)
    client.hset(SOURCES, "kafka:events:0", "6-0")
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 4, "the lost entries")
    assert origins(client) == [b"events:0:%d" % each for each in range(6, 10)]


async def test_reading_continues_at_the_lowest_offset_of_the_input_topics(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url, settings = broker.create("events", 1), {"partitions": 2}
    config = {"from": url, "partitioned": True}
    inputs = [f"carry{{p{partition:04d}}}:in:{INPUT}" for partition in range(2)]
    rows = {f"s{number}": rows_of(RANDOM, 5) for number in range(8)}
    broker.produce("events", *records(rows))
    async with reading(server.url, settings, **config):
        await becomes(lambda: sum(map(client.xlen, inputs)) == 40, "the entries")
    first, second = (origins(client, name) for name in inputs)
    assert first
    assert second
    # one partition of the store loses everything
    client.delete(inputs[1])
    client.hset(f"{inputs[1]}:sources", "kafka:events:0", "0-0")
    async with reading(server.url, settings, **config):
        await becomes(lambda: client.xlen(inputs[1]) == len(second), "the lost entries")
    assert (origins(client, inputs[0]), origins(client, inputs[1])) == (first, second)


async def test_records_that_the_store_loses_are_read_again_in_order(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    sent = records({"a": rows_of(RANDOM, 12)})
    broker.produce("events", *sent[:10])
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 10, "the entries")
        with client.pipeline() as pipe:
            pipe.xdel(INPUT, *[each for each, _ in client.xrange(INPUT)[6:]])
            pipe.hset(SOURCES, "kafka:events:0", "6-0")
            pipe.execute()
        broker.produce("events", *sent[10:])
        await becomes(lambda: client.xlen(INPUT) == 12, "all entries")
    assert origins(client) == [b"events:0:%d" % each for each in range(12)]


async def test_late_and_repeated_appends_change_nothing(server: RealServer, client: Any) -> None:
    topic = TopicDescription("id", 1)
    async with opened(server.url) as store:
        suspended = StoredOffsets(store.topics, "events", [INPUT])
        owner = StoredOffsets(store.topics, "events", [INPUT])
        for each in (suspended, owner):
            await each.read(topic)

        async def append(offsets: StoredOffsets, first: int, end: int) -> None:
            entries = [
                Entry(entry_id(each), [b"carry-origin", b"%d" % each]) for each in range(first, end)
            ]
            await offsets.append({0: end}, {INPUT: {0: entries}})

        await append(suspended, 0, 3)
        await append(owner, 0, 5)
        await append(owner, 5, 9)
        await append(suspended, 3, 6)
        await append(suspended, 3, 6)
        assert origins(client) == [b"%d" % each for each in range(9)]
        assert (owner.counts["appended"], owner.counts["redelivered"]) == (6, 3)
        # nothing is appended behind records that the store has lost
        client.hset(SOURCES, "kafka:events:0", "7-0")
        with pytest.raises(OffsetsLostError, match="9-0"):
            await append(owner, 9, 10)
        assert client.xlen(INPUT) == 9


async def test_records_without_a_value_or_a_name_become_dead_letters_with_their_origin(
    server: RealServer, client: Any, artifact: Artifact, broker: Broker
) -> None:
    url = broker.create("events", 1)
    row = rows_of(RANDOM, 1)[0]
    sent: list[dict[str, Any]] = [
        {"key": "a"}, {"value": "[1]"}, {"key": "a", "value": b"\xff\x00"}, record_of("a", row),
    ]  # fmt: skip
    broker.produce("events", *sent)
    async with (
        reading(server.url, **{"from": url}),
        consuming(server.url, artifact, **{"from": url}),
    ):
        await becomes(lambda: client.xlen("scores") == 1, "the output")
        await becomes(lambda: client.xlen(f"{INPUT}:dead") == 3, "the dead letters")
    letters = [fields for _, fields in client.xrange(f"{INPUT}:dead")]
    assert [(each[b"carry-origin"], each[b"carry-code"]) for each in letters] == [
        (b"events:0:0", b"invalid_input"),
        (b"events:0:1", b"invalid_input"),
        (b"events:0:2", b"malformed_body"),
    ]


async def test_records_without_a_value_are_skipped_if_configured(
    server: RealServer, client: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "SAVE_INTERVAL_S", 0)
    url = broker.create("events", 1)
    broker.produce("events", {"key": "a"}, {"key": "a", "value": "[1]"}, {"key": "a"})
    async with reading(server.url, **{"from": url, "tombstones": "skip"}) as source:
        await becomes(lambda: client.hget(SOURCES, "kafka:events:0") == b"3-0", "the offset")
        assert source.counts["skipped"] >= 2
    assert origins(client) == [b"events:0:1"]


async def test_records_are_consumed_from_the_configured_end_on(
    server: RealServer, client: Any, artifact: Artifact, broker: Broker
) -> None:
    url, rows = broker.create("events", 1), rows_of(RANDOM, 5)
    broker.produce("events", {"key": "a", "value": "0"})
    config = {"from": url, "start": "end", "stream": "key"}
    async with reading(server.url, **config) as source:
        await becomes(lambda: source.check().ok, "the assignment")
        # before a consumer has created its group
        broker.produce("events", *records({"a": rows}))
        await becomes(lambda: client.xlen(INPUT) == 5, "the entries")
        async with consuming(server.url, artifact, **config):
            await becomes(lambda: client.xlen("scores") >= 5, "the outputs")
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)


async def test_a_new_group_starts_at_the_configured_end(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 2)
    broker.produce("events", *[{"partition": each, "value": "0"} for each in (0, 0, 1)])
    async with reading(server.url, **{"from": url, "start": "end"}) as source:
        await becomes(lambda: source.check().ok, "the assignment")
        broker.produce("events", {"partition": 0, "value": "1"}, {"partition": 1, "value": "1"})
        await becomes(lambda: client.xlen(INPUT) == 2, "the new records")
    assert {*origins(client)} == {b"events:0:2", b"events:1:1"}
    # a partition without an offset beside others that have one was added later
    client.hdel(SOURCES, "kafka:events:1")
    client.xtrim(INPUT, maxlen=0)
    async with reading(server.url, **{"from": url, "start": "end"}):
        await becomes(lambda: client.xlen(INPUT) == 2, "all of the partition")
    assert origins(client) == [b"events:1:0", b"events:1:1"]


async def test_partition_halts_whose_records_were_deleted_before_they_were_read(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 2)
    sent = [{"partition": each % 2, "value": "0"} for each in range(20)]
    broker.produce("events", *sent)
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 20, "the entries")
    broker.produce("events", *sent)
    broker.delete_records("events", 0, 15)
    client.xtrim(INPUT, maxlen=0)
    async with reading(server.url, **{"from": url}) as source:
        await becomes(lambda: client.xlen(INPUT) == 10, "the other partition")
        check = source.check()
        assert not check.ok
        assert (
            "partition 0: the records 10 to 14 were deleted before they were read" in check.detail
        )
        assert "--reset-offsets" in check.detail
        await source.reset("beginning")
    client.xtrim(INPUT, maxlen=0)
    async with reading(server.url, **{"from": url}) as source:
        await becomes(lambda: client.xlen(INPUT) == 25, "what there is, in all partitions")
        assert source.check().ok


async def test_topic_that_was_created_again_is_not_read(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    broker.produce("events", {"value": "0"}, {"value": "1"})
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 2, "the entries")
    with running_broker() as other:
        url = other.create("events", 1)
        other.produce("events", {"value": "2"}, {"value": "3"}, {"value": "4"})
        async with reading(server.url, **{"from": url}) as source:
            await becomes(lambda: "created again" in source.check().detail, "the failed check")
            with pytest.raises(OperatorError, match=r"created again.*--reset-offsets"):
                await source.check_topic()
            assert client.xlen(INPUT) == 2
            await source.reset("end")
            await becomes(lambda: source.check().ok, "the assignment")
            other.produce("events", {"value": "5"})
            await becomes(lambda: client.xlen(INPUT) == 3, "the new record")
    assert origins(client)[2] == b"events:0:3"


async def test_topic_that_ends_in_front_of_its_offset_is_not_read(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    broker.produce("events", {"value": "0"})
    async with reading(server.url, **{"from": url}):
        await becomes(lambda: client.xlen(INPUT) == 1, "the entry")
    client.hset(SOURCES, "kafka:events:0", "5-0")
    async with reading(server.url, **{"from": url}) as source:
        await becomes(lambda: "ends at 1, but was read up to 5" in source.check().detail, "it")


async def test_missing_topic_and_missing_permission_are_errors_at_the_start(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    async with opened(server.url) as store:
        keys = StoreSettings(server.url).keys
        missing = make_config(PROBE | {"from": url + "2"}, "test")
        with pytest.raises(OperatorError, match="'events2': there is no such topic"):
            await KafkaSource(store, keys, missing).check_topic()
        broker.set_error("events", KafkaError.TOPIC_AUTHORIZATION_FAILED)
        source = KafkaSource(store, keys, make_config(PROBE | {"from": url}, "test"))
        with pytest.raises(OperatorError, match="'events': the client is not authorized"):
            await source.check_topic()


async def test_reading_starts_when_the_client_may_join_the_group(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    broker.fail_joins(KafkaError.GROUP_AUTHORIZATION_FAILED)
    async with reading(server.url, **{"from": url}) as source:
        await becomes(
            lambda: "not authorized to use the consumer group" in source.check().detail, "it"
        )
        broker.fail_joins(0)
        await becomes(lambda: source.check().ok, "the assignment")


async def test_invalid_properties_are_errors_at_the_start(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    async with opened(server.url) as store:
        keys = StoreSettings(server.url).keys
        for properties in ({"no.such": 1}, {"session.timeout.ms": "x"}, {"fetch.min.bytes": 0}):
            config = make_config(PROBE | {"from": url, "kafka": properties}, "test")
            with pytest.raises(OperatorError, match=f"kafka: .*{next(iter(properties))}"):
                await KafkaSource(store, keys, config).check_topic()


async def test_reading_continues_when_the_broker_is_back(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("events", 1)
    async with reading(server.url, **{"from": url}) as source:
        await becomes(lambda: source.check().ok, "the assignment")
        broker.stop()
        await becomes(lambda: "no broker answers" in source.check().detail, "the failed check")
        broker.start()
        await becomes(lambda: source.check().ok, "the check")
        broker.produce("events", {"value": "0"})
        await becomes(lambda: client.xlen(INPUT) == 1, "the entry")


async def test_reading_continues_when_the_store_is_back(artifact: Artifact, broker: Broker) -> None:
    url = broker.create("events", 1)
    with real_server("valkey", "--appendonly", "yes") as server:
        async with reading(server.url, {"store_wait_s": 1}, **{"from": url}) as source:
            await becomes(lambda: source.check().ok, "the assignment")
            server.pause()
            broker.produce("events", *records({"a": rows_of(RANDOM, 10)}))
            await becomes(lambda: not source.check().ok, "the failed check")
            server.resume()
            with server.client() as client:
                await becomes(lambda: client.xlen(INPUT) == 10, "the entries")
                await becomes(lambda: source.check().ok, "the check")
                assert origins(client) == [b"events:0:%d" % each for each in range(10)]


async def test_reading_pauses_while_the_consumers_have_a_backlog(
    server: RealServer, client: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "MAX_BACKLOG", 20)
    monkeypatch.setattr(kafka, "AT_ONCE", 10)
    url = broker.create("events", 1)
    broker.produce("events", *records({"a": rows_of(RANDOM, 100)}))
    async with reading(server.url, **{"from": url}) as source:
        await becomes(lambda: source.is_paused, "the pause")
        seen = origins(client)
        assert 20 < len(seen) < 100
        while len(seen) < 100:
            client.xtrim(INPUT, maxlen=0)
            await becomes(lambda: client.xlen(INPUT), "more entries")
            await becomes(lambda: source.is_paused or source.lags.get(0) == 0, "the next pause")
            seen += origins(client)
    assert seen == [b"events:0:%d" % each for each in range(100)]
