"""A broker of Kafka in this process: the mock cluster of librdkafka, by its interface in C.

It has groups with rebalances, commits, idempotent producers, headers, errors and retention. It
creates, grows and deletes no topics by request, and keeps at most 5 MB of a partition.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ctypes import c_char_p, c_int, c_int16, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import confluent_kafka
import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition
from numpy.typing import NDArray

from service.consumers.config import make_config
from service.consumers.kafka import KafkaSource
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.consumers import PROBE

ONE_BROKER = 1
JOIN_GROUP = 11

QUICK = {"session.timeout.ms": 1500, "heartbeat.interval.ms": 100}
"""Properties of members of a group. When one leaves or joins, this broker waits for the others for
the session timeout less 1 s."""

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "rd_kafka_conf_new": (c_void_p, []),
    "rd_kafka_new": (c_void_p, [c_int, c_void_p, c_char_p, c_size_t]),
    "rd_kafka_destroy": (None, [c_void_p]),
    "rd_kafka_mock_cluster_new": (c_void_p, [c_void_p, c_int]),
    "rd_kafka_mock_cluster_destroy": (None, [c_void_p]),
    "rd_kafka_mock_cluster_bootstraps": (c_char_p, [c_void_p]),
    "rd_kafka_mock_set_controller_id": (c_int, [c_void_p, c_int32]),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [c_void_p, c_int32]),
    "rd_kafka_mock_topic_create": (c_int, [c_void_p, c_char_p, c_int, c_int]),
    "rd_kafka_mock_topic_set_error": (None, [c_void_p, c_char_p, c_int]),
    "rd_kafka_mock_partition_delete_records": (
        c_int,
        [c_void_p, c_char_p, c_int32, c_int64],
    ),
    "rd_kafka_mock_push_request_errors_array": (
        None,
        [c_void_p, c_int16, c_size_t, c_void_p],
    ),
    "rd_kafka_mock_clear_request_errors": (None, [c_void_p, c_int16]),
    "rd_kafka_mock_broker_set_down": (c_int, [c_void_p, c_int32]),
    "rd_kafka_mock_broker_set_up": (c_int, [c_void_p, c_int32]),
}


@cache
def _library() -> ctypes.CDLL:
    folder = Path(confluent_kafka.__file__).parent.parent
    (path,) = folder.glob("confluent_kafka.libs/librdkafka*")
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Broker:
    """A broker, its producer, and what tests do to it."""

    def __init__(self) -> None:
        library = _library()
        error = ctypes.create_string_buffer(512)
        self._handle = library.rd_kafka_new(0, library.rd_kafka_conf_new(), error, len(error))
        self._cluster = library.rd_kafka_mock_cluster_new(self._handle, ONE_BROKER)
        library.rd_kafka_mock_set_controller_id(self._cluster, ONE_BROKER)
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        self.servers: str = library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self._producer = Producer({"bootstrap.servers": self.servers, "enable.idempotence": True})

    def close(self) -> None:
        # closes it
        del self._producer
        _library().rd_kafka_mock_cluster_destroy(self._cluster)
        _library().rd_kafka_destroy(self._handle)

    def create(self, topic: str, partitions: int) -> str:
        """Create a topic; returns its URL."""
        created = _library().rd_kafka_mock_topic_create(
            self._cluster, topic.encode(), partitions, 1
        )
        assert created == 0
        return f"kafka://{self.servers}/{topic}"

    def produce(self, topic: str, *records: dict[str, Any]) -> None:
        """Produce records, and wait until they are stored."""
        failed: list[Any] = []
        for record in records:
            self._producer.produce(
                topic, **record, on_delivery=lambda error, _: error and failed.append(error)
            )
            self._producer.poll(0)
        assert self._producer.flush(60) == 0
        assert not failed

    def read_all(self, topic: str, partitions: int) -> list[Any]:
        """Every record of a topic, those of a partition in order."""
        settings = {"bootstrap.servers": self.servers, "group.id": "tests"}
        client = Consumer(settings | {"enable.auto.commit": False})
        try:
            places = [TopicPartition(topic, each, 0) for each in range(partitions)]
            expected = sum(client.get_watermark_offsets(each, 30)[1] for each in places)
            client.assign(places)
            records: list[Any] = []
            while len(records) < expected:
                records += client.consume(expected - len(records), 1)
            return records
        finally:
            client.close()

    def committed(self, group: str, topic: str, partitions: int) -> list[int]:
        """The offsets that a group has committed."""
        client = Consumer({"bootstrap.servers": self.servers, "group.id": group})
        try:
            places = [TopicPartition(topic, each) for each in range(partitions)]
            return [each.offset for each in client.committed(places, 30)]
        finally:
            client.close()

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Delete the first records of a partition, as retention does."""
        deleted = _library().rd_kafka_mock_partition_delete_records(
            self._cluster, topic.encode(), partition, before
        )
        assert deleted == 0

    def set_error(self, topic: str, code: int) -> None:
        """Answer requests for a topic with an error; 0 for none."""
        _library().rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), code)

    def fail_joins(self, code: int) -> None:
        """Answer attempts to join a group with an error; 0 for none."""
        errors = (c_int * 10_000)(*[code] * 10_000)
        _library().rd_kafka_mock_clear_request_errors(self._cluster, JOIN_GROUP)
        if code:
            _library().rd_kafka_mock_push_request_errors_array(
                self._cluster, JOIN_GROUP, len(errors), errors
            )

    def stop(self) -> None:
        """Close all connections, and accept none."""
        _library().rd_kafka_mock_broker_set_down(self._cluster, ONE_BROKER)

    def start(self) -> None:
        """Accept connections again; it has lost nothing."""
        _library().rd_kafka_mock_broker_set_up(self._cluster, ONE_BROKER)


@contextmanager
def running_broker() -> Iterator[Broker]:
    """A broker that runs."""
    broker = Broker()
    try:
        yield broker
    finally:
        broker.close()


def record_of(stream: str, row: NDArray[np.float32], **others: Any) -> dict[str, Any]:
    """A record with a row of the probe model."""
    return {"key": stream, "value": json.dumps(row.tolist()), **others}


@asynccontextmanager
async def reading(
    url: str, settings: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[KafkaSource]:
    """A source that reads a topic; it is stopped at the end."""
    loaded = StoreSettings(url, **{"store_wait_s": 20, **(settings or {})})
    store = RedisStore(loaded)
    await store.start()
    source = KafkaSource(store, loaded.keys, make_config(PROBE | {"kafka": QUICK} | config, "test"))
    task = asyncio.create_task(source.run())
    try:
        yield source
    finally:
        source.stop()
        await task
        await store.close()
