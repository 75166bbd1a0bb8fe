"""Keys, rates and usage of access keys on Redis or Valkey (`service.store.capabilities`).

The records of the access keys are one hash, read whole when its version has changed. Version and
record are written by one command, so that no reader sees one without the other. The version stays
if there is no record: it marks a store that has had keys. A token bucket, and the usage of a key,
are a hash each, changed by scripts.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from service.core.errors import CarryError, NotDurable, StoreRefused
from service.core.values import StreamKey
from service.store.capabilities import (
    Lease,
    LeaseRequest,
    Quota,
    RateLeases,
    Registration,
    RegistrationId,
    StoredKeys,
    StoredModels,
    StreamUsage,
)
from service.store.keys import join_name, split_name
from service.store.redis.commands import PendingCommand, Script
from service.store.redis.outcomes import Outcome, ServerReply, read_value
from service.store.redis.router import Router

VERSION: Final = "version"
"""Field beside the records; no id of a key."""

MODELS_VERSION: Final = ":version"
"""Field beside the records; no name of a model."""

REPORT_LIFETIME_MS = 10_000
"""After that long a report is of a process that has ended; one that runs renews it before."""

TOKEN_KEY_BYTES: Final = 32
PAGE_STREAMS: Final = 100
"""Streams that are reconciled together: few, so that chunks hardly wait behind them."""

_TOTAL: Final = b"total"


class RedisStoredKeys(StoredKeys):
    """The records of access keys in a store."""

    def __init__(self, router: Router):
        self._router = router
        self._keys = router.settings.keys

    async def read(
        self, version: bytes | None, deadline_s: float = math.inf
    ) -> tuple[bytes, Mapping[str, bytes]] | None:
        name = self._keys.access_keys
        return await _read_records(self._router, name, VERSION, version, deadline_s)

    async def write(self, records: Mapping[str, bytes]) -> None:
        fields = [each for item in records.items() for each in item]
        arguments = ("HSET", self._keys.access_keys, *fields, VERSION, secrets.token_hex(8))
        outcome = await self._router.execute_one(*arguments, durably=True)
        read_value(outcome)
        if isinstance(outcome, ServerReply) and not outcome.is_durable:
            raise NotDurable(
                f"the access keys {', '.join(records)} were written, but are not yet as durable as "
                "CARRY_DURABILITY requires; repeat the command"
            )

    async def token_key(self) -> bytes:
        key = self._keys.token_key
        drawn = secrets.token_bytes(TOKEN_KEY_BYTES)
        read_value(await self._router.execute_one("SET", key, drawn, "NX"))
        value = read_value(await self._router.execute_one("GET", key))
        if not isinstance(value, bytes) or len(value) != TOKEN_KEY_BYTES:
            raise StoreRefused(
                f"key {key!r} of the store at {self._router.redacted_url} was not written by Carry"
            )
        return value


class RedisStoredModels(StoredModels):
    """The records of models in a store."""

    def __init__(self, router: Router):
        self._router = router
        self._keys = router.settings.keys
        self._write_script = Script.load("model_write")
        self._report_script = Script.load("model_report")

    async def read(
        self, version: bytes | None, deadline_s: float = math.inf
    ) -> tuple[bytes, Mapping[str, bytes]] | None:
        name = self._keys.models
        return await _read_records(self._router, name, MODELS_VERSION, version, deadline_s)

    async def write(self, version: bytes, model: str, record: bytes) -> bool:
        arguments = (version, secrets.token_hex(8), model, record)
        outcome = await self._run(self._write_script, self._keys.models, arguments, durably=True)
        is_written = bool(read_value(outcome))
        if is_written and isinstance(outcome, ServerReply) and not outcome.is_durable:
            raise NotDurable(
                f"the record of model {model!r} was written, but is not yet as durable as "
                "CARRY_DURABILITY requires"
            )
        return is_written

    async def report(
        self, process: str, report: bytes, deadline_s: float = math.inf
    ) -> Sequence[bytes]:
        name, arguments = self._keys.loaded_models, (process, report, REPORT_LIFETIME_MS)
        outcome = await self._run(self._report_script, name, arguments, deadline_s)
        reports: list[bytes] = read_value(outcome)
        return reports

    async def _run(
        self,
        script: Script,
        name: str,
        arguments: Sequence[str | bytes | int],
        deadline_s: float = math.inf,
        *,
        durably: bool = False,
    ) -> Outcome:
        slot = self._router.slot(name)
        command = PendingCommand.for_script(script, [name], arguments, slot)
        [outcome] = await self._router.execute(command, deadline_s=deadline_s, durably=durably)
        return outcome


async def _read_records(
    router: Router, name: str, version_field: str, version: bytes | None, deadline_s: float
) -> tuple[bytes, Mapping[str, bytes]] | None:
    """The version and the records of a hash; None if `version` is the current one."""
    if version is not None:
        outcome = await router.execute_one("HGET", name, version_field, deadline_s=deadline_s)
        if (read_value(outcome) or b"") == version:
            return None
    fields: list[bytes] = read_value(
        await router.execute_one("HGETALL", name, deadline_s=deadline_s)
    )
    names = [field.decode("utf-8", "replace") for field in fields[::2]]
    records = dict(zip(names, fields[1::2], strict=True))
    return records.pop(version_field, b""), records


class RedisRateLeases(RateLeases):
    """The token buckets of a store, for one process."""

    def __init__(self, router: Router):
        self._router = router
        self._keys = router.settings.keys
        self._process = secrets.token_hex(4)
        self._script = Script.load("lease")

    async def lease(
        self, requests: Sequence[LeaseRequest], deadline_s: float = math.inf
    ) -> list[Lease | CarryError]:
        commands: list[PendingCommand] = []
        for bucket, rate_per_s, burst, spent in requests:
            name = self._keys.rate(bucket)
            arguments = (repr(rate_per_s), repr(burst), self._process, repr(spent))
            slot = self._router.slot(name)
            commands.append(PendingCommand.for_script(self._script, [name], arguments, slot))
        return list(map(_lease, await self._router.execute(*commands, deadline_s=deadline_s)))


def _lease(outcome: Outcome) -> Lease | CarryError:
    try:
        tokens, free, processes = read_value(outcome)
    except CarryError as error:
        return error
    return Lease(float(tokens), float(free), processes)


class RedisStreamUsage(StreamUsage):
    """The streams that access keys with quotas have created in a store.

    Args:
        fence: writes a tombstone for each stream that does not exist, and returns for which it did.
    """

    def __init__(
        self, router: Router, fence: Callable[[Sequence[StreamKey]], Awaitable[set[StreamKey]]]
    ) -> None:
        self._router = router
        self._keys = router.settings.keys
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
