"""Reads a topic of Kafka into the input topics of a consumer, each record once and in order.

The offsets are in the store: an append to an input topic also stores the offset up to which it has
the records of a partition of Kafka, and skips those that it has. So a record that is delivered
again, to this process or another one, changes nothing, and an owner of a partition that was
suspended does no harm. An append also names the offset that it relies on: if the store has lost it
(a replica was promoted), reading starts again at the store's offsets. The offsets that are
committed to Kafka are for monitoring tools only. The reasons are in `docs/decisions/consumers.md`.

The client is used in one thread, and its callbacks run there. They use the store by the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from service.consumers.config import ConsumerConfig
from service.consumers.events import ORIGIN_FIELD, StreamNames
from service.consumers.kafka_client import (
    REQUEST_TIMEOUT_S,
    TopicDescription,
    describe_topic,
    explain,
    load_library,
    make_client,
    with_logs,
)
from service.consumers.kafka_offsets import (
    REMEDY,
    Offsets,
    OffsetsLostError,
    StoredOffsets,
    entry_id,
)
from service.core.errors import CarryError, OperatorError
from service.core.values import Check, StreamKey
from service.store.keys import KeySpace
from service.store.redis.redis_store import RedisStore
from service.store.topics import Entry

if TYPE_CHECKING:
    from confluent_kafka import Consumer as Client
    from confluent_kafka import KafkaError, Message, TopicPartition

POLL_S: Final = 0.2
AT_ONCE: Final = 500
MAX_QUEUE_KBYTES: Final = 16_384
"""Most records in memory that the client has read ahead."""

MAX_BACKLOG: Final = 20_000
"""Entries of the input topics above which reading pauses, until half of them are processed."""

SAVE_INTERVAL_S: Final = 5.0
RETRY_S: Final = 0.2
RESTART_S: Final = 2.0
"""Pauses before a call of the store is repeated, and before the group is joined again."""

KEY_FIELD: Final = b"stream"

Result = TypeVar("Result")
WaitFor = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine in the event loop, from the thread of the client."""

log = structlog.get_logger(__name__)


class KafkaSource:
    """Reads the topic of Kafka of a configuration; `run` once, `stop` at any time.

    Attributes:
        counts: records by result: `appended`, `redelivered` (the store had them), `skipped`
            (without a value).
        is_paused: whether reading pauses, since the consumers have a backlog.
        lags: by partition that this process reads: how many records it has not read yet.

    Raises:
        OperatorError: the extra is missing, or the configuration is incomplete.
    """

    def __init__(self, store: RedisStore, space: KeySpace, config: ConsumerConfig):
        topic = config.kafka_source
        if topic is None:
            raise OperatorError(f"from: expected kafka://HOST:PORT/TOPIC, got {config.source!r}")
        self.lags: dict[int, int] = {}
        self._library = load_library()
        self._config = config
        self._space = space
        self._names = StreamNames(config)
        self._inputs = [each.topic for each in config.topics(space, is_cluster=store.is_cluster)]
        self._topic = topic.name
        self._properties = with_logs(topic.properties(config.kafka))
        self._offsets = StoredOffsets(store.topics, topic.name, self._inputs)
        self._next: dict[int, int] = {}
        self.is_paused = False
        self._halted: dict[int, str] = {}
        self._problems = {"group": "the consumer group was not joined yet"}
        self._stopped = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, "kafka")

    @property
    def counts(self) -> Counter[str]:
        return self._offsets.counts

    async def check_topic(self) -> None:
        """Check that the topic can be read.

        Raises:
            OperatorError, StoreUnavailable, StoreRefused
        """
        await self._offsets.read(await self._in_thread(self._describe))
        await self._in_thread(lambda: self._make_client().close())

    def check(self) -> Check:
        """Check readiness: whether every partition that is assigned to this process is read."""
        problems = [*self._problems.values(), *self._halted.values()]
        detail = "; ".join(problems) or f"{len(self._next)} partitions are read"
        return Check("kafka", not problems, detail)

    def stop(self) -> None:
        """Shut down gracefully."""
        self._stopped.set()

    async def reset(self, start: str) -> None:
        """Continue at the `beginning` or the `end` of every partition.

        Raises:
            OperatorError, StoreUnavailable, StoreRefused
        """

        def read_starts() -> tuple[TopicDescription, dict[int, int]]:
            client, topic = self._make_client(), self._describe()
            try:
                side = ("beginning", "end").index(start)
                return topic, {
                    each: self._watermarks(client, each)[side] for each in range(topic.partitions)
                }
            finally:
                client.close()

        await self._offsets.write(*await self._in_thread(read_starts), only_missing=False)

    async def run(self) -> None:
        """Read until `stop`."""
        while not self._stopped.is_set():
            try:
                await self._read()
            except OffsetsLostError as error:
                log.warning("kafka_rewound", topic=self._topic, reason=str(error))
            except (CarryError, OperatorError, self._library.KafkaException) as error:
                self._problems["group"] = str(error)
                log.warning("kafka_failed", topic=self._topic, reason=str(error))
                await self._pause(RESTART_S)

    async def _read(self) -> None:
        """Read as a new member of the group, until `stop` or an error."""
        loop = asyncio.get_running_loop()
        self._client = client = self._make_client()

        def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

        client.subscribe(
            [self._topic],
            on_assign=lambda _, assigned: self._on_assign(assigned, wait_for),
            on_revoke=lambda _, revoked: self._on_revoke(wait_for),
        )
        saved_s = loop.time()
        try:
            while not self._stopped.is_set():
                await self._append(await self._in_thread(self._poll))
                await self._limit_backlog()
                if loop.time() - saved_s > SAVE_INTERVAL_S:
                    await self._repeat(lambda: self._offsets.save(self._next))
                    await self._in_thread(self._commit)
                    saved_s = loop.time()
        finally:
            await self._in_thread(client.close)

    # in the thread of the client

    def _make_client(self) -> Client:
        properties = {
            "queued.max.messages.kbytes": MAX_QUEUE_KBYTES,
            **self._properties,
            "group.id": self._config.kafka_group,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            "partition.assignment.strategy": "range",
            "error_cb": self._on_error,
        }
        client: Client = make_client(self._library.Consumer, properties)
        return client

    def _describe(self) -> TopicDescription:
        return describe_topic(self._properties, self._topic)

    def _poll(self) -> list[Message]:
        records = self._client.consume(1, POLL_S)
        if records:
            assignment = self._next
            # what is in memory; with a timeout it would wait for as many
            more = self._client.consume(AT_ONCE - 1, 0)
            # the first record is read again if its partition was assigned again in between
            records = records + more if self._next is assignment else more
        if "topic" in self._problems:
            try:
                self._describe()
                del self._problems["topic"]
            except OperatorError as error:
                self._problems["topic"] = str(error)
        ends = {each: self._watermarks(self._client, each, cached=True)[1] for each in self._next}
        self.lags = {each: max(0, end - self._next[each]) for each, end in ends.items()}
        return records

    def _on_error(self, error: KafkaError) -> None:
        """Called for errors of every kind that the client may recover from."""
        if error.code() == self._library.KafkaError._ALL_BROKERS_DOWN:
            self._problems["topic"] = explain(error, self._topic)

    def _on_assign(self, assigned: Sequence[TopicPartition], wait_for: WaitFor) -> None:
        self._next, self._halted = {}, {}
        try:
            self._find_starts(assigned, wait_for)
        finally:
            # also if it failed: the client cannot be closed without an assignment
            self._client.assign([self._partition(*each) for each in self._next.items()])
        self.is_paused = False
        self._problems.pop("group", None)
        log.info("kafka_assigned", topic=self._topic, offsets=self._next)

    def _find_starts(self, assigned: Sequence[TopicPartition], wait_for: WaitFor) -> None:
        """Set where each partition is read from, or why it is not."""
        topic = self._describe()
        if unknown := [each for each in assigned if each.partition >= topic.partitions]:
            raise OperatorError(
                f"kafka topic {self._topic!r}: a broker does not know partition "
                f"{unknown[0].partition} yet, which is assigned"
            )
        stored = wait_for(self._offsets.read(topic))
        if first := self._first_offsets(stored):
            wait_for(self._offsets.write(topic, first, only_missing=True))
            stored = wait_for(self._offsets.read(topic))
        for partition in [each.partition for each in assigned]:
            start = min(stored[partition].values())
            low, high = self._watermarks(self._client, partition)
            if start < low:
                reason = f"the records {start} to {low - 1} were deleted before they were read"
                self._halt(partition, reason)
            elif start > high:
                reason = f"it ends at {high}, but was read up to {start}"
                self._halt(partition, reason)
            else:
                self._next[partition] = start

    def _on_revoke(self, wait_for: WaitFor) -> None:
        try:
            wait_for(self._offsets.save(self._next))
            self._commit(is_last=True)
        except (CarryError, OffsetsLostError, self._library.KafkaException) as error:
            log.warning("kafka_offsets_not_saved", topic=self._topic, reason=str(error))
        self._next, self._halted = {}, {}

    def _first_offsets(self, stored: Offsets) -> dict[int, int]:
        """Where partitions begin that are not stored in all input topics."""
        is_new = all(value is None for row in stored.values() for value in row.values())
        starts, start = {}, self._config.start
        for partition, row in stored.items():
            known = [value for value in row.values() if value is not None]
            if len(known) < len(row):
                low, high = self._watermarks(self._client, partition)
                # a partition that was added later is read from its beginning
                first = high if is_new and start == "end" else low
                if is_new and isinstance(start, dict):
                    first = start.get(partition, low)
                starts[partition] = min(known, default=first)
        return starts

    def _halt(self, partition: int, reason: str) -> None:
        reason = f"kafka topic {self._topic!r}, partition {partition}: {reason}; {REMEDY}"
        self._halted[partition] = reason
        log.error("kafka_halted", reason=reason)

    def _commit(self, *, is_last: bool = False) -> None:
        offsets = [self._partition(*each) for each in self._next.items()]
        if offsets and is_last:
            self._client.commit(offsets=offsets, asynchronous=False)
        elif offsets:
            self._client.commit(offsets=offsets, asynchronous=True)

    def _watermarks(
        self, client: Client, partition: int, *, cached: bool = False
    ) -> tuple[int, int]:
        """The first offset of a partition, and the one behind the last."""
        place = self._partition(partition)
        return client.get_watermark_offsets(place, REQUEST_TIMEOUT_S, cached)

    def _partition(self, partition: int, *offset: int) -> TopicPartition:
        place: TopicPartition = self._library.TopicPartition(self._topic, partition, *offset)
        return place

    # in the event loop

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def _append(self, records: Iterable[Message]) -> None:
        """Append records to the input topics of their streams."""
        ends: dict[int, int] = {}
        entries: dict[str, dict[int, list[Entry]]] = {}
        for record in records:
            error, partition, offset = record.error(), record.partition(), record.offset()
            if error is not None:
                self._check_error(error)
            # of a partition that was revoked in the same poll, the next owner reads them
            elif partition in self._next and offset is not None:
                ends[partition] = offset + 1
                if record.value() is None and self._config.tombstones == "skip":
                    self.counts["skipped"] += 1
                    continue
                fields = self._fields(record)
                parts = entries.setdefault(self._input_for(fields), {})
                parts.setdefault(partition, []).append(Entry(entry_id(offset), [*_flat(fields)]))
        if ends:
            await self._repeat(lambda: self._offsets.append(ends, entries))
            self._next |= ends

    def _fields(self, record: Message) -> dict[bytes, bytes]:
        """The fields of the entry of a record; of its headers, those that are configured."""
        config, key, value = self._config, record.key(), record.value()
        origin = f"{self._topic}:{record.partition()}:{record.offset()}"
        fields = {ORIGIN_FIELD: origin.encode()}
        headers: Any = record.headers() or ()
        for name, content in headers:
            if name in (config.stream_field, config.position) and content is not None:
                fields[name.encode()] = content
        if key is not None:
            fields[KEY_FIELD] = key
        if value is not None:
            fields[(config.event.field or "").encode()] = value
        return fields

    def _input_for(self, fields: dict[bytes, bytes]) -> str:
        """The input topic of an entry; any for one without a valid name, which is a dead letter."""
        if len(self._inputs) == 1:
            return self._inputs[0]
        try:
            stream = self._names.read(fields)
        except CarryError:
            return self._inputs[0]
        return self._inputs[self._space.partition(StreamKey(self._config.model, stream))]

    async def _repeat(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call the store until it has confirmed.

        Raises:
            CarryError: it was stopped before.
        """
        while True:
            try:
                await call()
            except CarryError as error:
                self._problems["store"] = error.detail
                log.warning("kafka_append_failed", topic=self._topic, reason=error.detail)
                await self._pause(RETRY_S)
                if self._stopped.is_set():
                    raise
            else:
                self._problems.pop("store", None)
                return

    async def _limit_backlog(self) -> None:
        """Pause reading while the consumers have a backlog."""
        lengths, limit = self._offsets.lengths, MAX_BACKLOG // (2 if self.is_paused else 1)
        if lengths.total() > limit:
            await self._repeat(self._offsets.read_lengths)
        is_paused = lengths.total() > limit
        if is_paused != self.is_paused:
            log.info("kafka_paused" if is_paused else "kafka_resumed", topic=self._topic)
            switch = self._client.pause if is_paused else self._client.resume
            partitions = [self._partition(each) for each in self._next]
            await self._in_thread(lambda: switch(partitions))
            self.is_paused = is_paused

    def _check_error(self, error: KafkaError) -> None:
        """Record an error that the client returned instead of a record.

        Raises:
            KafkaException: the client does not recover from it.
        """
        codes, reason = self._library.KafkaError, explain(error, self._topic)
        if error.fatal() or error.code() == codes._AUTO_OFFSET_RESET:
            raise self._library.KafkaException(error)
        of_group = error.code() in (codes.GROUP_AUTHORIZATION_FAILED, codes._MAX_POLL_EXCEEDED)
        self._problems["group" if of_group else "topic"] = reason
        log.warning("kafka_error", reason=reason)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            pass


def _flat(fields: dict[bytes, bytes]) -> Iterable[bytes]:
    for each in fields.items():
        yield from each
