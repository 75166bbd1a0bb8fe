"""The index of open alarms on Redis or Valkey (`service.store.capabilities.StoredAlarms`).

Each partition has a sorted set for each model, in the slot of its states, so that the script of a
commit writes both (`lua/compare_and_set.lua`). A commit without a change of the index is the same
call as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from service.core.values import StreamKey
from service.store.base import AlarmChange
from service.store.capabilities import IndexedAlarm, StoredAlarms
from service.store.codec import COMPARED, read_packed_head
from service.store.keys import KeySpace
from service.store.redis.commands import PendingCommand, Script, pack_arguments
from service.store.redis.outcomes import read_value
from service.store.redis.router import Router
from service.store.settings import StoreSettings

AT_ONCE: Final = 256
"""Indexes that one call reads, so that no commit waits long behind it."""

SEARCHED_AT_ONCE: Final = 8
"""Indexes that one call searches for a prefix; it may read each of them to its end."""

LEAST_ENTRIES: Final = 4
"""Entries that are read of each index at first, and so many times its share of a page."""


class PackedChanges(NamedTuple):
    """What the changes of the index add to the call of a script that commits.

    Attributes:
        number: of changes.
        ttls: the first two arguments, packed.
        names, arguments: further keys and arguments at the end, packed.
    """

    number: int
    ttls: bytes
    names: bytes
    arguments: bytes


class AlarmIndex:
    """Packs changes of the index for the scripts that commit.

    Attributes:
        unchanged: what a call without changes has.
    """

    def __init__(self, settings: StoreSettings):
        self._keys: KeySpace = settings.keys
        self._ttls = round(1000 * settings.idle_ttl_s), round(1000 * settings.reply_ttl_s)
        self.unchanged = PackedChanges(0, pack_arguments(*self._ttls), b"", b"")

    def pack(self, keys: Sequence[StreamKey], alarms: Sequence[AlarmChange]) -> PackedChanges:
        """Pack the changes of streams for one call of a script."""
        names, arguments = list[str](), list[str]()
        for key, change in zip(keys, alarms, strict=True):
            if change:
                self.add(key, change, names, arguments)
        ttls = pack_arguments(*self.ttls(len(names)))
        return PackedChanges(len(names), ttls, _pack(names), _pack(arguments))

    def ttls(self, count: int) -> tuple[int, int | str]:
        """The first two arguments of a call with so many changes."""
        idle_ms, reply_ms = self._ttls
        return idle_ms, f"{reply_ms}:{count}" if count else reply_ms

    def add(
        self, key: StreamKey, change: AlarmChange, names: list[str], arguments: list[str]
    ) -> None:
        """Add the key and the arguments of a change to those at the end of a call."""
        names.append(self._keys.alarm_index(self._keys.partition(key), key.model))
        arguments += (self._keys.state(key), key.stream, change)


class RedisAlarms(StoredAlarms):
    """The open alarms of a store."""

    def __init__(self, router: Router):
        self._router = router
        self._keys = router.settings.keys
        self._read_script = Script.load("alarms_read")
        self._drop_script = Script.load("alarms_drop")

    async def page(
        self,
        model: str,
        before_ms: int | None,
        limit: int,
        prefix: str = "",
        deadline_s: float = math.inf,
    ) -> list[IndexedAlarm]:
        # the newest ones are spread over all indexes
        most = LEAST_ENTRIES + LEAST_ENTRIES * limit // self._keys.partitions
        while True:
            most = min(most, limit)
            entries, complete_from = await self._read(model, before_ms, most, prefix, deadline_s)
            found = [each for each in entries if each.opened_ms >= complete_from]
            if len(found) >= limit or complete_from == -math.inf:
                break
            most *= 2
        newest = sorted(found, key=lambda each: (-each.opened_ms, each.key.stream))
        if len(newest) > limit:
            last_ms = newest[limit - 1].opened_ms
            newest = [each for each in newest if each.opened_ms >= last_ms]
        return newest

    async def _read(
        self, model: str, before_ms: int | None, most: int, prefix: str, deadline_s: float
    ) -> tuple[set[IndexedAlarm], float]:
        """The newest entries of each partition's index, and the time from which on they are all."""
        by_slot: dict[int, list[str]] = {}
        for partition in range(self._keys.partitions):
            name = self._keys.alarm_index(partition, model)
            by_slot.setdefault(self._router.slot(name), []).append(name)
        arguments = ("+inf" if before_ms is None else before_ms, most, prefix)
        at_once = SEARCHED_AT_ONCE if prefix else AT_ONCE
        commands = [
            PendingCommand.for_script(self._read_script, names[at : at + at_once], arguments, slot)
            for slot, names in by_slot.items()
            for at in range(0, len(names), at_once)
        ]
        found: set[IndexedAlarm] = set()
        complete_from = -math.inf
        for outcome in await self._router.execute(*commands, deadline_s=deadline_s):
            values: list[bytes] = read_value(outcome)
            complete_from = max(complete_from, float(values[0]))
            for stream, time_ms in zip(values[1::2], values[2::2], strict=True):
                found.add(IndexedAlarm(StreamKey(model, stream.decode()), int(float(time_ms))))
        return found, complete_from

    async def drop(self, alarms: Mapping[IndexedAlarm, bytes]) -> None:
        commands: list[PendingCommand] = []
        for (key, _), value in alarms.items():
            index = self._keys.alarm_index(self._keys.partition(key), key.model)
            head = read_packed_head(value)[COMPARED] if value else b""
            names = [self._keys.state(key), index]
            slot = self._router.slot(index)
            commands.append(
                PendingCommand.for_script(self._drop_script, names, (head, key.stream), slot)
            )
        await self._router.execute(*commands)


def _pack(arguments: Sequence[str]) -> bytes:
    return pack_arguments(*arguments) if arguments else b""
