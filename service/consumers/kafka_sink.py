"""A topic of Kafka as the sink of outputs: records keyed by stream, in order, at least once.

The producer is idempotent, and never sends what follows a record that failed: then all that was not
confirmed is delivered again, by another producer. So records come twice only with the same stream,
epoch and position, and those of a stream that come for the first time are in order.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from service.consumers.kafka_client import (
    describe_topic,
    explain,
    load_library,
    make_client,
    with_logs,
)
from service.consumers.kafka_config import KafkaTopic
from service.consumers.relay import DELIVERIES_AT_ONCE, DeliveryFailed, DeliveryRejected
from service.store.topics import Entry

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message, Producer

TIMEOUT_S: Final = 15.0
"""Duration after which a delivery has failed."""

POLL_S: Final = 0.01


class KafkaSink:
    """A sink (`service.consumers.relay.Sink`) that produces records; `close` after use.

    Raises:
        OperatorError: the extra is missing, or the configuration is incomplete.
    """

    batch = 500
    on_error = "continue"

    def __init__(self, topic: KafkaTopic, properties: Mapping[str, Any]):
        self._library = load_library()
        self._topic = topic.name
        self._properties = with_logs(topic.properties(properties))
        self._producer: Producer | None = None
        self._producing = threading.Lock()
        self._executor = ThreadPoolExecutor(DELIVERIES_AT_ONCE, "kafka-sink")
        codes = self._library.KafkaError
        self._rejection_codes = {
            codes.MSG_SIZE_TOO_LARGE,
            codes.INVALID_RECORD,
            codes.INVALID_MSG,
            codes.INVALID_TIMESTAMP,
        }

    async def check(self) -> None:
        """Check that the topic exists.

        Raises:
            OperatorError
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, describe_topic, self._properties, self._topic)

    async def deliver(self, topic: str, entries: Sequence[Entry]) -> None:
        """Produce records, and wait until the brokers have confirmed them; see `Sink`."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._deliver, entries)

    async def close(self) -> None:
        """Close the connections."""
        self._producer = None
        self._executor.shutdown(wait=False)

    def _deliver(self, entries: Sequence[Entry]) -> None:
        # appended by whichever thread polls
        reports: list[KafkaError | None] = []
        failure: DeliveryRejected | DeliveryFailed | None = None
        sent = 0
        # otherwise another thread may discard the producer in between, and later outputs precede
        with self._producing:
            producer = self._producer = self._producer or self._make_producer()
            try:
                for entry in entries:
                    self._produce(producer, entry, lambda error, _: reports.append(error))
                    sent += 1
            except (DeliveryRejected, DeliveryFailed) as error:
                failure = error
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(reports) < sent and time.monotonic() < deadline_s:
            producer.poll(POLL_S)
        errors = [error for error in reports if error is not None]
        if errors:
            rejected = [each for each in errors if each.code() in self._rejection_codes]
            failure = self._failure((rejected or errors)[0])
        elif len(reports) < sent:
            failure = DeliveryFailed("the brokers have not confirmed")
        if errors or len(reports) < sent or isinstance(failure, DeliveryFailed):
            self._discard(producer)
        if failure is not None:
            raise failure

    def _produce(
        self, producer: Producer, entry: Entry, on_delivery: Callable[[Any, Message], None]
    ) -> None:
        """Hand an output to the producer.

        Raises:
            DeliveryRejected, DeliveryFailed
        """
        fields = entry.fields or ()
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        key, value = values.pop(b"stream", None), values.pop(b"outputs", None)
        if value is None:
            raise DeliveryRejected("the entry is not an output: expected the field `outputs`")
        headers: list[tuple[str, str | bytes | None]] = [
            (name.decode("latin-1"), content) for name, content in values.items()
        ]
        try:
            producer.produce(self._topic, value, key, headers=headers, on_delivery=on_delivery)
        except self._library.KafkaException as error:
            raise self._failure(error.args[0]) from error
        except BufferError as error:
            raise DeliveryFailed(f"kafka topic {self._topic!r}: {error}") from error

    def _failure(self, error: KafkaError) -> DeliveryRejected | DeliveryFailed:
        """The failure that an error means: only a few errors are about the output."""
        kind = DeliveryRejected if error.code() in self._rejection_codes else DeliveryFailed
        return kind(explain(error, self._topic))

    def _discard(self, producer: Producer) -> None:
        """Discard a producer, so that it sends nothing after what failed; the next delivery makes
        another one."""
        with self._producing:
            if self._producer is producer:
                self._producer = None
            producer.purge()

    def _make_producer(self) -> Producer:
        properties = {
            **self._properties,
            "acks": "all",
            "enable.idempotence": True,
            "enable.gapless.guarantee": True,
            # no limit for each record: all are discarded together after `TIMEOUT_S`
            "message.timeout.ms": 0,
        }
        producer: Producer = make_client(self._library.Producer, properties)
        return producer
