"""The usage of access keys with quotas (`StreamUsage`): one hash for each key."""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from service.core.values import StreamKey
from service.store.capabilities import Quota, Registration, RegistrationId
from service.store.keys import KeySpace, join_name, split_name
from service.store.redis.commands import PendingCommand, Script
from service.store.redis.outcomes import read_value
from service.store.redis.router import Router

PAGE_STREAMS: Final = 100
"""Streams that are reconciled together: few, so that chunks hardly wait behind them."""

_TOTAL: Final = b"total"


class RedisStreamUsage:
    """A `StreamUsage` on a single server or a cluster.

    Args:
        fence: writes a tombstone for each stream that does not exist, and returns for which it did.
    """

    def __init__(
        self,
        router: Router,
        keys: KeySpace,
        fence: Callable[[Sequence[StreamKey]], Awaitable[set[StreamKey]]],
    ) -> None:
        self._router = router
        self._keys = keys
        self._fence = fence
        self._register_script = Script.load("register")
        self._release_script = Script.load("release")

    async def register(
        self,
        key_id: str,
        streams: Sequence[tuple[StreamKey, int]],
        quota: Quota,
        deadline_s: float = math.inf,
    ) -> Registration:
        # Lua's numbers are exact up to 2**53
        registration = secrets.randbelow(2**53)
        arguments: list[str | bytes | int] = [
            quota.streams or 0,
            quota.state_bytes or 0,
            registration,
        ]
        for key, state_bytes in streams:
            arguments += (join_name(key), state_bytes)
        count, total, results = await self._run(
            self._register_script, key_id, arguments, deadline_s
        )
        return Registration([result == 1 for result in results], count, total)

    async def find_registrations(
        self, key_id: str, streams: Sequence[StreamKey]
    ) -> list[RegistrationId]:
        name = self._keys.stream_usage(key_id)
        slot = self._router.slot(name)
        commands = [PendingCommand.of("HGET", name, join_name(key), slot=slot) for key in streams]
        outcomes = await self._router.execute(*commands)
        return [RegistrationId(read_value(outcome) or b"") for outcome in outcomes]

    async def release(
        self, key_id: str, registrations: Sequence[tuple[StreamKey, RegistrationId]]
    ) -> None:
        arguments: list[str | bytes | int] = []
        for key, registered in registrations:
            if registered:
                arguments += (join_name(key), registered)
        if arguments:
            await self._run(self._release_script, key_id, arguments)

    async def reconcile(self, key_id: str) -> None:
        name, cursor = self._keys.stream_usage(key_id), 0
        while True:
            following, page = read_value(
                await self._router.execute_one("HSCAN", name, cursor, "COUNT", PAGE_STREAMS)
            )
            registrations = [
                (split_name(field.decode()), RegistrationId(value))
                for field, value in zip(page[::2], page[1::2], strict=True)
                if field != _TOTAL
            ]
            # HSCAN returns a small hash as a whole
            for at in range(0, len(registrations), PAGE_STREAMS):
                part = registrations[at : at + PAGE_STREAMS]
                fenced = await self._fence([key for key, _ in part])
                await self.release(key_id, [each for each in part if each[0] in fenced])
            cursor = int(following)
            if not cursor:
                return

    async def _run(
        self,
        script: Script,
        key_id: str,
        arguments: Sequence[str | bytes | int],
        deadline_s: float = math.inf,
    ) -> Any:
        name = self._keys.stream_usage(key_id)
        slot = self._router.slot(name)
        command = PendingCommand.for_script(script, [name], list(arguments), slot)
        (outcome,) = await self._router.execute(command, deadline_s=deadline_s)
        return read_value(outcome)
