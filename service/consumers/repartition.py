"""Moves the entries of one topic to the topics of the partitions of their streams, each once.

The topic and those of the partitions are in different slots of a cluster, so nothing writes both in
one step. Instead, an append also stores the id of the last entry beside the topic of the partition,
and skips the entries up to that id. Entries are read in order, and appended before they are
acknowledged, one batch at a time; what fails is read and appended again. So a late or repeated call
changes nothing, also one of an earlier owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from service.consumers.config import START_IDS, ConsumerConfig
from service.consumers.events import ORIGIN_FIELD, StreamNames
from service.consumers.outputs import MAX_FIELDS, dead_letter
from service.consumers.shared_topics import LeasedTopic, SharedTopics
from service.core.errors import CarryError, InvalidInput, OperatorError
from service.core.values import StreamKey
from service.store.keys import KeySpace
from service.store.topics import Entry, SourceEntries, TopicItem, TopicKeys, Topics

AT_ONCE: Final = 500


def _keys_of(config: ConsumerConfig) -> TopicKeys:
    """The keys of the topic, on a cluster all in one slot."""
    topic = config.source
    if config.kafka_source is not None:
        raise OperatorError(
            "from: expected a topic of the store, since one of Kafka is partitioned"
        )
    beside = topic if "{" in topic else f"{{{topic}}}"
    return TopicKeys(
        topic,
        f"{beside}:lease:{config.group}",
        f"{beside}:halted:{config.group}",
        topic,
        config.dead_letters or f"{beside}:dead",
        config.group,
        deletes=config.delete,
    )


class Repartitioner(SharedTopics["RepartitionedTopic"]):
    """Moves the entries of the topic of a configuration.

    Attributes:
        counts: entries by result: `moved` (also those that an earlier owner appended),
            `dead_letters`, `deleted`; and `losses` of the topic.
    """

    def __init__(self, store: Topics, space: KeySpace, config: ConsumerConfig):
        pool = f"{config.group}/repartition:{config.source}"
        super().__init__(store, [_keys_of(config)], config, pool=pool, room=AT_ONCE)
        self._space = space
        self._config = config

    def _make_topic(self, keys: TopicKeys) -> RepartitionedTopic:
        return RepartitionedTopic(keys, self, self._space, self._config)


class RepartitionedTopic(LeasedTopic):
    """A topic whose entries are moved, one batch at a time."""

    def __init__(
        self,
        keys: TopicKeys,
        shared: Repartitioner,
        space: KeySpace,
        config: ConsumerConfig,
    ):
        super().__init__(keys, shared, min_read=AT_ONCE, max_read=AT_ONCE)
        self._space = space
        self._config = config
        self._names = StreamNames(config)

    async def _process(self, entries: Sequence[Entry]) -> None:
        """Append entries to the topics of their partitions, then acknowledge them."""
        parts: dict[str, list[Entry]] = {}
        items: list[tuple[str, TopicItem]] = []
        for entry in entries:
            if entry.fields is None:
                items.append(("deleted", TopicItem([entry.id])))
                continue
            try:
                name = self._destination(entry.fields)
            except CarryError as error:
                letter = dead_letter(entry, error.code, error.detail, None)
                items.append(("dead_letters", TopicItem([entry.id], [letter])))
            else:
                parts.setdefault(name, []).append(self._moved(entry))
                items.append(("moved", TopicItem([entry.id])))
        try:
            topic, append = self.keys.topic, self._topics.append
            calls = {
                name: [SourceEntries(topic, b"", part[-1].id, part)] for name, part in parts.items()
            }
            await asyncio.gather(*[append(name, part) for name, part in calls.items()])
        except CarryError:
            self._shared.release(len(entries))
            raise
        await self._acknowledge(items)

    def _moved(self, entry: Entry) -> Entry:
        """An entry as it is appended. If the group starts at an id, behind which are events that
        states were loaded with, it says where it comes from: a consumer skips those."""
        if self._config.start in START_IDS:
            return entry
        origin = b"%b:%b" % (self.keys.topic.encode(), entry.id)
        return Entry(entry.id, [*(entry.fields or ()), ORIGIN_FIELD, origin])

    def _destination(self, fields: Sequence[bytes]) -> str:
        """The topic of an entry's stream."""
        stream = self._names.read(dict(zip(fields[::2], fields[1::2], strict=True)))
        if len(fields) > 2 * MAX_FIELDS:
            raise InvalidInput(f"expected at most {MAX_FIELDS} fields, got {len(fields) // 2}")
        partition = self._space.partition(StreamKey(self._config.model, stream))
        return f"{self._space.partition_prefix(partition)}:in:{self._config.source}"
