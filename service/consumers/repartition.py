"""Moves the entries of one topic to the topics of the partitions of their streams, each once.

The topic and those of the partitions are in different slots of a cluster, so nothing writes both in
one step. Instead, an append also stores the id of the last entry beside the topic of the partition,
and skips the entries up to that id. Entries are read in order, and appended before they are
acknowledged, one batch at a time; what fails is read and appended again. So a late or repeated call
changes nothing, also one of an earlier owner.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Final

import structlog

from service.consumers.config import ConsumerConfig
from service.consumers.outputs import MAX_FIELDS, dead_letter
from service.core.errors import CarryError, InvalidInput, InvalidName
from service.core.values import STREAM_NAME_RULE, Check, StreamKey, is_stream_name
from service.store.base import COMMITTED
from service.store.keys import KeySpace
from service.store.topics import (
    FIRST_PENDING,
    NEW,
    Entry,
    NewEntry,
    TopicItem,
    TopicKeys,
    Topics,
    Unclear,
)

AT_ONCE: Final = 500
IDLE_POLL_S: Final = 0.01
RETRY_S: Final = 0.2

log = structlog.get_logger(__name__)


class _LostError(Exception):
    """The topic has to be acquired again."""


def _keys_of(config: ConsumerConfig) -> TopicKeys:
    """The keys of the topic, on a cluster all in one slot."""
    topic = config.source
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


class Repartitioner:
    """Moves the entries of the topic of a configuration; `run` once, `stop` at any time.

    Attributes:
        counts: entries by result: `moved` (also those that an earlier owner appended),
            `dead_letters`.
    """

    def __init__(self, topics: Topics, space: KeySpace, config: ConsumerConfig):
        self.counts: Counter[str] = Counter()
        self._topics = topics
        self._space = space
        self._config = config
        self._keys = _keys_of(config)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._fence = ""
        self._number = 0
        self._is_owner = False
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Shut down gracefully."""
        self._stopped.set()

    def check(self) -> Check:
        """Check readiness, which does not depend on the owner of the topic."""
        return Check("topics", True, "owned" if self._is_owner else "owned by another process")

    async def run(self) -> None:
        """Move entries until `stop`, whenever this process owns the topic."""
        while not self._stopped.is_set():
            try:
                if await self._acquire():
                    await self._move_all()
                else:
                    await self._pause(RETRY_S)
            except (CarryError, _LostError) as error:
                log.warning("topic_lost", topic=self._keys.topic, reason=str(error))
                await self._pause(RETRY_S)
        if self._is_owner:
            await self._renew(0)

    async def _acquire(self) -> bool:
        self._fence, self._number = secrets.token_hex(8), 0
        start = "0" if self._config.start == "beginning" else "$"
        lease_s = self._config.lease_s
        held = await self._topics.acquire(self._keys, self._owner, self._fence, lease_s, start)
        self._is_owner = held.is_held
        if held.is_held:
            await self._topics.claim(self._keys)
            log.info("topic_acquired", topic=self._keys.topic)
        return held.is_held

    async def _move_all(self) -> None:
        """Move what is pending, and then new entries, until it is stopped."""
        loop = asyncio.get_running_loop()
        after, renewed_s = FIRST_PENDING, loop.time()
        while not self._stopped.is_set():
            entries = await self._topics.read(self._keys, self._fence, after, AT_ONCE)
            if isinstance(entries, Unclear):
                raise _LostError(entries.value)
            if entries:
                await self._move(entries)
                after = NEW if after == NEW else entries[-1].id.decode()
            elif after == NEW:
                await self._pause(IDLE_POLL_S)
            else:
                after = NEW
            if loop.time() - renewed_s > self._config.lease_s / 3:
                renewed_s = loop.time()
                await self._renew(self._config.lease_s)

    async def _move(self, entries: Sequence[Entry]) -> None:
        """Append entries to the topics of their partitions, then acknowledge them."""
        parts: dict[str, list[Entry]] = {}
        items: list[TopicItem] = []
        for entry in entries:
            fields = entry.fields or ()
            try:
                name = self._destination(fields)
            except CarryError as error:
                letters: list[NewEntry] = []
                if fields:
                    letters.append(dead_letter(entry.id, fields, error, None))
                    self.counts["dead_letters"] += 1
                items.append(TopicItem([entry.id], letters))
            else:
                parts.setdefault(name, []).append(entry)
                items.append(TopicItem([entry.id]))
        source = self._keys.topic
        await asyncio.gather(
            *[self._topics.append(name, source, part) for name, part in parts.items()]
        )
        self._number += 1
        results = await self._topics.commit(self._keys, self._fence, self._number, items)
        if isinstance(results, Unclear):
            raise _LostError(results.value)
        if failed := [each for each in results if each is not COMMITTED]:
            raise _LostError(str(failed[0]))
        self.counts["moved"] += sum(map(len, parts.values()))

    def _destination(self, fields: Sequence[bytes]) -> str:
        """The topic of an entry's stream."""
        stream = self._config.stream.constant
        if stream is None:
            name = (self._config.stream.field or "").encode()
            value = dict(zip(fields[::2], fields[1::2], strict=True)).get(name)
            if value is None:
                raise InvalidInput(f"{name.decode()}: expected this field")
            stream = value.decode("latin-1")
        if not is_stream_name(stream):
            raise InvalidName(f"expected {STREAM_NAME_RULE}, got {stream[:300]!r}")
        if len(fields) > 2 * MAX_FIELDS:
            raise InvalidInput(f"expected at most {MAX_FIELDS} fields, got {len(fields) // 2}")
        partition = self._space.partition(StreamKey(self._config.model, stream))
        return f"{self._space.partition_prefix(partition)}:in:{self._config.source}"

    async def _renew(self, lease_s: float) -> None:
        keys, number = self._keys, self._number
        held = await self._topics.renew(keys, self._owner, self._fence, lease_s, number, b"")
        if not held.is_held:
            raise _LostError(Unclear.FENCED.value)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            pass
