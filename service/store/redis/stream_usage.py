"""The usage of access keys with quotas (`service.store.usage`): one hash for each key."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from service.core.values import StreamKey
from service.store.codec import TOMBSTONE_PREFIX
from service.store.keys import KeySpace
from service.store.redis.commands import PendingCommand, Script
from service.store.redis.outcomes import read_value
from service.store.redis.router import Router
from service.store.usage import Quota, Registration

UNWRITTEN_S: Final = 120
"""How long a stream may be registered before it is written: longer than any deadline's commit."""

PAGE_STREAMS: Final = 500
_TOTAL: Final = b"total"


class RedisStreamUsage:
    """A `StreamUsage` on a single server or a cluster."""

    def __init__(
        self, router: Router, keys: KeySpace, now_s: Callable[[], float] = time.time
    ) -> None:
        self._router = router
        self._keys = keys
        self._now_s = now_s
        self._register_script = Script.load("register")
        self._release_script = Script.load("release")

    async def register(
        self, key_id: str, streams: Sequence[tuple[StreamKey, int]], quota: Quota
    ) -> Registration:
        arguments: list[str | bytes | int] = [
            quota.streams or 0,
            quota.state_bytes or 0,
            int(self._now_s()),
        ]
        for key, state_bytes in streams:
            arguments += (_field(key), state_bytes)
        count, total, results = await self._run(self._register_script, key_id, arguments)
        return Registration([result == 1 for result in results], count, total)

    async def release(self, key_id: str, streams: Sequence[StreamKey]) -> None:
        await self._release(key_id, list(map(_field, streams)), int(self._now_s()))

    async def reconcile(self, key_id: str) -> None:
        name, cursor = self._keys.stream_usage(key_id), 0
        while True:
            arguments = ("HSCAN", name, cursor, "COUNT", PAGE_STREAMS)
            command = PendingCommand.of(*arguments, slot=self._router.slot(name))
            (outcome,) = await self._router.execute(command)
            following, page = read_value(outcome)
            fields = [field for field in page[::2] if field != _TOTAL]
            missing = await self._missing(fields)
            if missing:
                await self._release(key_id, missing, int(self._now_s()) - UNWRITTEN_S)
            cursor = int(following)
            if not cursor:
                return

    async def _missing(self, fields: Sequence[bytes]) -> list[bytes]:
        """The fields whose stream does not exist; a tombstone is none."""
        commands: list[PendingCommand] = []
        for field in fields:
            model, _, stream = field.decode().partition(":")
            name = self._keys.state(StreamKey(model, stream))
            arguments = ("GETRANGE", name, 0, len(TOMBSTONE_PREFIX) - 1)
            commands.append(PendingCommand.of(*arguments, slot=self._router.slot(name)))
        if not commands:
            return []
        outcomes = await self._router.execute(*commands)
        gone = (b"", TOMBSTONE_PREFIX)
        return [
            field
            for field, outcome in zip(fields, outcomes, strict=True)
            if read_value(outcome) in gone
        ]

    async def _release(self, key_id: str, fields: Sequence[str | bytes], until_s: int) -> None:
        await self._run(self._release_script, key_id, [until_s, *fields])

    async def _run(
        self, script: Script, key_id: str, arguments: Sequence[str | bytes | int]
    ) -> Any:
        name = self._keys.stream_usage(key_id)
        slot = self._router.slot(name)
        command = PendingCommand.for_script(script, [name], list(arguments), slot)
        (outcome,) = await self._router.execute(command)
        return read_value(outcome)


def _field(key: StreamKey) -> str:
    # no name of a model contains a colon
    return f"{key.model}:{key.stream}"
