"""The offsets of a Kafka topic in the store, and the append of its records beside them.

Each input topic has, for each partition of Kafka, the offset up to which it has the records that
belong to it. An append moves both in one step.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

from service.consumers.kafka_client import TopicDescription
from service.core.errors import OperatorError
from service.store.topics import Entry, SourceEntries, Topics

CALLS_AT_ONCE: Final = 64
"""Input topics that are called at a time."""

REMEDY: Final = "`carry consume --reset-offsets beginning|end` says where to continue"

Offsets = dict[int, dict[str, int | None]]
"""By partition of Kafka: the offset of each input topic."""

Result = TypeVar("Result")


class OffsetsLostError(Exception):
    """The store has lost records that it had confirmed, or the offsets were reset."""


class StoredOffsets:
    """The offsets of one topic of Kafka; use from one event loop, one call at a time.

    Args:
        name: of the topic of Kafka.
        inputs: the names of the input topics.

    Attributes:
        counts: records by result: `appended`, `redelivered` (the store had them).
        lengths: of the input topics, as far as they are known.
    """

    def __init__(self, topics: Topics, name: str, inputs: Sequence[str]):
        self.counts: Counter[str] = Counter()
        self.lengths: Counter[str] = Counter()
        self._topics = topics
        self._name = name
        self._inputs = inputs
        self._known: dict[tuple[str, int], int] = {}

    async def read(self, topic: TopicDescription) -> Offsets:
        """Read the offsets, which later appends then rely on.

        Raises:
            OperatorError: they are of another topic of this name.
            StoreUnavailable, StoreRefused
        """
        sources = [self._id_field, *map(self._source, range(topic.partitions))]
        rows = await _in_parts(self._inputs, lambda name: self._topics.read_sources(name, sources))
        offsets: Offsets = {partition: {} for partition in range(topic.partitions)}
        for name, (stored_id, *row) in rows.items():
            if stored_id not in (None, topic.id.encode()):
                raise OperatorError(
                    f"kafka topic {self._name!r}: it was created again, or is of another cluster: "
                    f"expected the id {stored_id.decode()}, got {topic.id}; {REMEDY}"
                )
            for partition, stored in enumerate(row):
                offset = None if stored is None else _offset(stored)
                offsets[partition][name] = offset
                self._known[name, partition] = offset or 0
        return offsets

    async def write(
        self, topic: TopicDescription, offsets: Mapping[int, int], *, only_missing: bool
    ) -> None:
        """Store offsets, the same in all input topics."""
        ids = {self._id_field: topic.id.encode()}
        ids |= {self._source(partition): _id(offset) for partition, offset in offsets.items()}
        await _in_parts(
            self._inputs,
            lambda name: self._topics.write_sources(name, ids, only_missing=only_missing),
        )

    async def append(
        self, ends: Mapping[int, int], entries: Mapping[str, Mapping[int, Sequence[Entry]]]
    ) -> None:
        """Append the next records; the call may be repeated until it succeeds.

        Args:
            ends: by partition, the offset behind its last record.
            entries: by input topic and partition.

        Raises:
            OffsetsLostError: reading has to start again at the stored offsets.
            StoreUnavailable, StoreRefused: some may have been appended.
        """
        calls = {
            name: [
                self._part(name, partition, ends[partition], part)
                for partition, part in parts.items()
            ]
            for name, parts in entries.items()
        }
        await self._append(calls)

    async def save(self, ends: Mapping[int, int]) -> None:
        """Store offsets also where no record was appended lately; as `append`."""
        calls: dict[str, list[SourceEntries]] = {}
        for (name, partition), known in self._known.items():
            if (end := ends.get(partition, 0)) > known:
                calls.setdefault(name, []).append(self._part(name, partition, end))
        await self._append(calls)

    async def read_lengths(self) -> None:
        """Read the lengths of the input topics that had entries."""
        await self._append({name: [] for name, length in self.lengths.items() if length})

    async def _append(self, calls: Mapping[str, Sequence[SourceEntries]]) -> None:
        results = await _in_parts([*calls], lambda name: self._topics.append(name, calls[name]))
        for name, result in results.items():
            self.lengths[name] = result.length
            for part, count in zip(calls[name], result.counts, strict=True):
                if count is None:
                    raise OffsetsLostError(
                        f"the store is behind {part.known.decode()} of {part.source}"
                    )
                partition = int(part.source.rpartition(":")[2])
                self._known[name, partition] = _offset(part.upto)
                self.counts["appended"] += count
                self.counts["redelivered"] += len(part.entries) - count

    def _part(
        self, name: str, partition: int, end: int, entries: Sequence[Entry] = ()
    ) -> SourceEntries:
        known = _id(self._known[name, partition])
        return SourceEntries(self._source(partition), known, _id(end), entries)

    @property
    def _id_field(self) -> str:
        return f"kafka:{self._name}"

    def _source(self, partition: int) -> str:
        return f"kafka:{self._name}:{partition}"


def entry_id(offset: int) -> bytes:
    """The id of a record in the store."""
    return _id(offset + 1)


def _id(end: int) -> bytes:
    """The id of all records in front of an offset."""
    return b"%d-0" % end


def _offset(source_id: bytes) -> int:
    return int(source_id.partition(b"-")[0])


async def _in_parts(
    names: Sequence[str], call: Callable[[str], Coroutine[Any, Any, Result]]
) -> dict[str, Result]:
    """Call for each name, a few at a time."""
    results: dict[str, Result] = {}
    for at in range(0, len(names), CALLS_AT_ONCE):
        part = names[at : at + CALLS_AT_ONCE]
        results |= zip(part, await asyncio.gather(*map(call, part)), strict=True)
    return results
