"""The topics of a store on Redis or Valkey: Redis streams that scripts read and commit.

Every call goes through the pipelined connections of the store, so the calls of a topic are executed
in their order. A call that was sent again has no result (`Unclear`): what its first execution read
or wrote is unknown, and only the list of pending entries says it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from service.core.errors import StoreRefused, StoreUnavailable
from service.core.values import StreamKey
from service.store.base import COMMITTED
from service.store.codec import COMPARED, pack_head
from service.store.redis.alarm_index import AlarmIndex
from service.store.redis.commands import PendingCommand, Script
from service.store.redis.outcomes import (
    WRITTEN,
    Outcome,
    ReplyLost,
    ServerReply,
    parse_result,
    read_value,
)
from service.store.redis.router import Router
from service.store.redis.topic_watch import TopicWatch
from service.store.topics import (
    CONSUMER,
    NOT_PENDING,
    Appended,
    Entry,
    ItemResult,
    Ownership,
    SourceEntries,
    TopicEntry,
    TopicItem,
    TopicKeys,
    TopicRegistration,
    Topics,
    TopicStatus,
    Unclear,
)

CLAIMED_AT_ONCE: Final = 1000
READ_AT_ONCE: Final = 64
"""Topics of one call, so that no commit waits long behind it."""

_NO_STREAM: Final = StreamKey("", "")

Argument = str | bytes | int

log = structlog.get_logger(__name__)


class _Read(NamedTuple):
    """A call of `read`, and the future of its result."""

    keys: TopicKeys
    fence: str
    after: str
    most: int
    future: asyncio.Future[Sequence[Entry] | Unclear]


class RedisTopics(Topics):
    """The topics of a store."""

    def __init__(self, router: Router):
        self._router = router
        settings = router.settings
        self.space = settings.keys
        self._members = f"{settings.namespace}:consumers:"
        self._registrations = self.space.topics
        self._alarm_index = AlarmIndex(settings)
        self._max_reply_bytes = settings.reply_max_bytes
        self._watch = TopicWatch(router)
        self._reads: dict[int, list[_Read]] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._lease_script = Script.load("topic_lease")
        self._read_script = Script.load("topic_read")
        self._commit_script = Script.load("topic_commit")
        self._join_script = Script.load("topic_join")
        self._append_script = Script.load("topic_append")
        self._replay_script = Script.load("topic_replay")

    async def close(self) -> None:
        """Close what watches the topics."""
        await self._watch.close()

    async def acquire(
        self, keys: TopicKeys, owner: str, fence: str, lease_s: float, start: str
    ) -> Ownership:
        held = await self._lease(keys, "acquire", fence, owner, lease_s, start)
        if held.is_held:
            # a commit whose script is unknown would be overtaken by the next one
            await self._execute(keys.topic, "SCRIPT", "LOAD", self._commit_script.text)
        return held

    async def renew(
        self, keys: TopicKeys, owner: str, fence: str, lease_s: float, number: int, floor: bytes
    ) -> Ownership:
        action = "renew" if lease_s else "release"
        return await self._lease(keys, action, fence, owner, lease_s, floor, number)

    async def _lease(
        self,
        keys: TopicKeys,
        action: str,
        fence: str,
        owner: str,
        lease_s: float,
        entry_id: str | bytes,
        number: int = 0,
    ) -> Ownership:
        lease_ms = round(1000 * lease_s)
        arguments = (action, fence, owner, lease_ms, keys.group, entry_id, number)
        outcome = await self._call(self._lease_script, [keys.topic, keys.lease], arguments)
        is_held, stored, left_ms, has_new_group = read_value(outcome)
        return Ownership(bool(is_held), stored.decode(), left_ms / 1000, bool(has_new_group))

    async def claim(self, keys: TopicKeys) -> int:
        consumers = await self._execute(keys.topic, "XINFO", "CONSUMERS", keys.topic, keys.group)
        others = [each for each in map(_members_of, consumers) if each["name"] != CONSUMER.encode()]
        claimed, cursor = 0, b"0-0"
        while any(each["pending"] for each in others):
            cursor, ids, *_ = await self._execute(
                keys.topic, "XAUTOCLAIM", keys.topic, keys.group, CONSUMER, 0, cursor,
                "COUNT", CLAIMED_AT_ONCE, "JUSTID",
            )  # fmt: skip
            claimed += len(ids)
            if cursor == b"0-0":
                break
        return claimed

    async def read(
        self, keys: TopicKeys, fence: str, after: str, count: int
    ) -> Sequence[Entry] | Unclear:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Entry] | Unclear] = loop.create_future()
        read = _Read(keys, fence, after, count, future)
        slot = self._router.slot(keys.topic)
        reads = self._reads.get(slot)
        if reads is None:
            reads = self._reads[slot] = [read]
            # what else is read in this turn of the event loop becomes one call
            loop.call_soon(self._start_reads, slot)
        else:
            reads.append(read)
        return await future

    def _start_reads(self, slot: int) -> None:
        reads = self._reads.pop(slot)
        for at in range(0, len(reads), READ_AT_ONCE):
            task = asyncio.get_running_loop().create_task(self._read(reads[at : at + READ_AT_ONCE]))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)

    async def _read(self, reads: Sequence[_Read]) -> None:
        """Read topics of one slot in one call."""
        names: list[str] = []
        arguments: list[Argument] = [CONSUMER]
        for keys, fence, after, most, _ in reads:
            names += (keys.topic, keys.lease)
            arguments += (keys.group, fence, after, most)
        results: list[Sequence[Entry] | Unclear | Exception]
        try:
            outcome = await self._call(self._read_script, names, arguments)
            values = read_value(outcome)
            if isinstance(outcome, ServerReply) and outcome.is_retry:
                results = [Unclear.REPLY_LOST] * len(reads)
            else:
                pairs = zip(reads, values, strict=True)
                results = [self._entries(read.keys.topic, value) for read, value in pairs]
        except Exception as error:  # of whatever kind: every caller waits for it
            results = [error] * len(reads)
        for read, result in zip(reads, results, strict=True):
            if read.future.done():
                # its caller was cancelled
                continue
            if isinstance(result, Exception):
                read.future.set_exception(result)
            else:
                read.future.set_result(result)

    def _entries(self, name: str, value: Any) -> Sequence[Entry] | Unclear | StoreRefused:
        """What a call of `topic_read.lua` returned for one topic."""
        if isinstance(value, bytes):
            return Unclear.FENCED
        if value and value[0] == -1:
            return self._refusal(name, value[1].decode("utf-8", "replace"))
        return [Entry(*each) for each in value]

    def _refusal(self, name: str, text: str) -> StoreRefused:
        """The error of one topic in a call of a script."""
        if text.startswith("READONLY"):
            self._router.refresh()
        log.error("store_refused", topic=name, reason=text)
        return StoreRefused(f"the store at {self._router.redacted_url} refused {name!r}: {text}")

    async def last_id(self, keys: TopicKeys) -> bytes:
        entries = await self._execute(keys.topic, "XREVRANGE", keys.topic, "+", "-", "COUNT", 1)
        last: bytes = entries[0][0] if entries else b"0-0"
        return last

    def watch(self, keys: TopicKeys, after: bytes, notification: asyncio.Future[bool]) -> bool:
        return self._watch.watch(keys.topic, after, notification)

    async def commit(
        self,
        keys: TopicKeys,
        fence: str,
        number: int,
        items: Sequence[TopicItem],
        deadline_s: float = math.inf,
    ) -> Sequence[ItemResult] | Unclear:
        names = [keys.topic, keys.lease, keys.halted, keys.outputs, keys.dead_letters]
        indexes, changes = list[str](), list[str]()
        for item in items:
            if item.chunk is not None and item.chunk.alarm:
                self._alarm_index.add(item.chunk.key, item.chunk.alarm, indexes, changes)
        arguments: list[Argument] = [
            *self._alarm_index.ttls(len(indexes)),
            *(keys.group, CONSUMER, fence, number, keys.kept, int(keys.deletes)),
        ]
        for item in items:
            self._add_item(item, names, arguments)
        names += indexes
        arguments += changes
        outcome = await self._call(self._commit_script, names, arguments, deadline_s)
        if isinstance(outcome, ReplyLost):
            return Unclear.REPLY_LOST
        value = read_value(outcome)
        if isinstance(outcome, ServerReply) and outcome.is_retry:
            return Unclear.REPLY_LOST
        if len(value) == 2:
            return Unclear.FENCED if value[0] != fence.encode() else Unclear.COMMIT_MISSING
        return [self._result(item, each) for item, each in zip(items, value[0], strict=True)]

    def _add_item(self, item: TopicItem, names: list[str], arguments: list[Argument]) -> None:
        """Add the keys and arguments of an item to those of a call of `topic_commit.lua`."""
        if item.condition is not None:
            key, head = item.condition
            names += self.space.pair(key)
            arguments += (2, pack_head(head)[COMPARED])
        elif item.chunk is None:
            arguments.append(0)
        else:
            key, expected, state, reply, history, _ = item.chunk
            reply = reply if len(reply) <= self._max_reply_bytes else b""
            if history is None:
                names += self.space.pair(key)
                arguments += (1, expected[COMPARED], state, reply)
            else:
                names += self.space.all_of(key)
                arguments += (3, expected[COMPARED], state, reply)
                arguments += (history.entries[0], history.events, history.snapshots)
        halt = f"+{item.halts}" if item.halts else f"={item.halted}" if item.halted else ""
        arguments += (
            halt,
            len(item.ids),
            *item.ids,
            len(item.shared),
            *item.shared,
            len(item.entries),
        )
        for destination, fields in item.entries:
            arguments += (destination.value, len(fields), *fields)

    def _result(self, item: TopicItem, reply: list[Any]) -> ItemResult:
        if reply == WRITTEN:
            return COMMITTED
        if reply[0] == -1 and reply[1].startswith(NOT_PENDING.encode()):
            return StoreRefused(reply[1].decode("utf-8", "replace"))
        key = _NO_STREAM
        if item.chunk is not None:
            key = item.chunk.key
        elif item.condition is not None:
            key = item.condition[0]
        return parse_result(self._router, key, reply)

    async def status(self, keys: TopicKeys) -> TopicStatus | None:
        if await self.type_of(keys.topic) != "stream":
            return None
        groups = await self._execute(keys.topic, "XINFO", "GROUPS", keys.topic)
        name = keys.group.encode()
        group = next((each for each in map(_members_of, groups) if each["name"] == name), None)
        if group is None:
            return None
        # a renewal without a fence is rejected, and returns who holds the lease
        held = await self._lease(keys, "renew", "", "", 0, "")
        entries = await self._execute(keys.topic, "XLEN", keys.topic)
        pending = await self._execute(keys.topic, "XPENDING", keys.topic, keys.group)
        delivered = group["last-delivered-id"].decode()
        following = await self._execute(
            keys.topic, "XRANGE", keys.topic, f"({delivered}", "+", "COUNT", 1
        )
        oldest = pending[1] if pending[0] else following[0][0] if following else None
        return TopicStatus(
            held.owner if held.left_s else "",
            entries,
            pending[0],
            group.get("lag"),
            group.get("entries-read"),
            None if oldest is None else int(oldest.partition(b"-")[0]),
        )

    async def register(self, registration: TopicRegistration) -> TopicRegistration | None:
        field = f"{registration.group}:{registration.source}"
        value = msgspec.json.encode(registration)
        earlier = await self._execute(self._registrations, "HGET", self._registrations, field)
        await self._execute(self._registrations, "HSET", self._registrations, field, value)
        return None if earlier is None else msgspec.json.decode(earlier, type=TopicRegistration)

    async def registrations(self) -> Sequence[TopicRegistration]:
        values = await self._execute(self._registrations, "HVALS", self._registrations)
        return [msgspec.json.decode(value, type=TopicRegistration) for value in values]

    async def newest(self, name: str, count: int) -> Sequence[Entry]:
        entries = await self._execute(name, "XREVRANGE", name, "+", "-", "COUNT", count)
        return [Entry(*each) for each in entries]

    async def type_of(self, name: str) -> str:
        kind: bytes = await self._execute(name, "TYPE", name)
        return kind.decode()

    async def halted(self, keys: TopicKeys) -> set[str]:
        return {name.decode() for name in await self._execute(keys.halted, "HKEYS", keys.halted)}

    async def add(self, entries: Sequence[TopicEntry]) -> None:
        commands = [
            PendingCommand.of("XADD", name, "*", *fields, slot=self._router.slot(name))
            for name, fields in entries
        ]
        for outcome in await self._router.execute(*commands):
            read_value(outcome)
            if isinstance(outcome, ServerReply) and outcome.is_retry:
                raise StoreUnavailable(
                    "the connection to the store broke: some events may have been written twice, "
                    "which are duplicates if they have positions"
                )

    async def append(self, name: str, parts: Sequence[SourceEntries]) -> Appended:
        arguments: list[Argument] = []
        for source, known, upto, entries in parts:
            arguments += (source, known, upto, len(entries))
            for entry_id, fields in entries:
                arguments += (entry_id, len(fields or ()), *(fields or ()))
        outcome = await self._call(self._append_script, [name, _sources_of(name)], arguments)
        length, *counts = read_value(outcome)
        return Appended(length, [None if count < 0 else count for count in counts])

    async def read_sources(self, name: str, sources: Sequence[str]) -> Sequence[bytes | None]:
        ids: list[bytes | None] = await self._execute(name, "HMGET", _sources_of(name), *sources)
        return ids

    async def write_sources(
        self, name: str, ids: Mapping[str, bytes], *, only_missing: bool
    ) -> None:
        command = "HSETNX" if only_missing else "HSET"
        slot = self._router.slot(name)
        commands = [
            PendingCommand.of(command, _sources_of(name), source, entry_id, slot=slot)
            for source, entry_id in ids.items()
        ]
        for outcome in await self._router.execute(*commands):
            read_value(outcome)

    async def dead_letters(self, keys: TopicKeys, after: str, count: int) -> Sequence[Entry]:
        name, start = keys.dead_letters, after if after == "-" else f"({after}"
        entries = await self._execute(name, "XRANGE", name, start, "+", "COUNT", count)
        return [Entry(*each) for each in entries]

    async def replay(
        self,
        keys: TopicKeys,
        ids: Sequence[bytes],
        *,
        adds: bool = True,
        resumed: str = "",
        last: bytes = b"",
    ) -> int | None:
        names = [keys.topic, keys.dead_letters, keys.halted]
        arguments: list[Argument] = [int(adds), resumed, last, *ids]
        count: int = read_value(await self._call(self._replay_script, names, arguments))
        return None if count < 0 else count

    async def join(self, group: str, member: str, valid_s: float) -> Sequence[str]:
        names, arguments = [self._members + group], (member, round(1000 * valid_s))
        members = read_value(await self._call(self._join_script, names, arguments))
        return [each.decode() for each in members]

    async def _call(
        self,
        script: Script,
        names: Sequence[str],
        arguments: Sequence[Argument],
        deadline_s: float = math.inf,
    ) -> Outcome:
        command = PendingCommand.for_script(script, names, arguments, self._router.slot(names[0]))
        (outcome,) = await self._router.execute(command, deadline_s=deadline_s)
        return outcome

    async def _execute(self, key: str, *command: Argument) -> Any:
        pending = PendingCommand.of(*command, slot=self._router.slot(key))
        (outcome,) = await self._router.execute(pending)
        return read_value(outcome)


def _sources_of(name: str) -> str:
    """The key of the sources of a topic: up to which id the entries of each were appended."""
    return f"{name}:sources"


def _members_of(reply: Any) -> dict[str, Any]:
    """An object that a server returned as names and values in turns."""
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {name.decode(): value for name, value in pairs}
