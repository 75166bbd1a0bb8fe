"""Writes events to the topics that `carry consume` reads, each to the partition of its stream."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class RedisClient(Protocol):
    """What is used of a client of Redis, such as `redis.Redis` or `redis.asyncio.Redis`."""

    def xadd(self, name: str, fields: Any) -> Any:
        """Add an entry to a stream of Redis."""


class Producer:
    """Writes events of streams to a topic.

        producer = Producer(redis.Redis(), "events", model="flights")
        producer.send("N793JB", {"departed": "2013-01-01T05:17:00-05:00", ...}, position=0)

    A producer that sends an event again, since it does not know whether the first attempt arrived,
    gives both the same position: the second one is then a duplicate, without an output.

    Args:
        client: may be asynchronous: `send` returns what it returns, which is then awaited.
        topic: as in the configuration of the consumer, `from`.
        model: that reads the topic; with partitions it decides about the partition.
        partitions: of the store (`CARRY_PARTITIONS`), if there is a topic for each of them; None
            for one topic.
        namespace: of the store (`CARRY_NAMESPACE`).
    """

    def __init__(
        self,
        client: RedisClient,
        topic: str,
        *,
        model: str,
        partitions: int | None = None,
        namespace: str = "carry",
    ):
        self._client = client
        self._topic = topic
        self._model = model
        self._partitions = partitions
        self._namespace = namespace

    def topic(self, stream: str) -> str:
        """The key of the topic of a stream."""
        if self._partitions is None:
            return self._topic
        partition = zlib.crc32(f"{self._model}/{stream}".encode()) % self._partitions
        return f"{self._namespace}{{p{partition:04d}}}:in:{self._topic}"

    def fields(
        self,
        stream: str,
        event: Mapping[str, Any] | Sequence[float],
        position: int | None = None,
    ) -> dict[str, str]:
        """The fields of an entry."""
        fields = {"stream": stream, "event": json.dumps(event, separators=(",", ":"))}
        return fields if position is None else {**fields, "position": str(position)}

    def send(
        self,
        stream: str,
        event: Mapping[str, Any] | Sequence[float],
        position: int | None = None,
    ) -> Any:
        """Add an event of a stream, an object or a row of numbers; returns the id of its entry."""
        return self._client.xadd(self.topic(stream), self.fields(stream, event, position))
