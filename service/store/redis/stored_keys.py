"""The keys that a store has on Redis or Valkey.

The records of the access keys are one hash, read whole when its version has changed. Version and
record are written by one command, so that no reader sees one without the other. The version stays
if there is no record: it marks a store that has had keys.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Final

from service.core.errors import NotDurable, StoreRefused
from service.store.keys import KeySpace
from service.store.redis.outcomes import Reply, read_value
from service.store.redis.router import Router

VERSION: Final = "version"
"""Field beside the records; no id of a key."""

TOKEN_KEY_BYTES: Final = 32


class RedisStoredKeys:
    """`StoredKeys` on a single server or a cluster."""

    def __init__(self, router: Router, keys: KeySpace):
        self._router = router
        self._keys = keys

    async def read(
        self, version: bytes | None, deadline_s: float = math.inf
    ) -> tuple[bytes, Mapping[str, bytes]] | None:
        """Read version and records; None if `version` is the current one."""
        name = self._keys.access_keys
        if version is not None:
            outcome = await self._router.execute_one("HGET", name, VERSION, deadline_s=deadline_s)
            if (read_value(outcome) or b"") == version:
                return None
        fields: list[bytes] = read_value(
            await self._router.execute_one("HGETALL", name, deadline_s=deadline_s)
        )
        names = [field.decode("utf-8", "replace") for field in fields[::2]]
        records = dict(zip(names, fields[1::2], strict=True))
        return records.pop(VERSION, b""), records

    async def write(self, records: Mapping[str, bytes]) -> None:
        """Write records and a new version."""
        fields = [each for item in records.items() for each in item]
        arguments = ("HSET", self._keys.access_keys, *fields, VERSION, secrets.token_hex(8))
        outcome = await self._router.execute_one(*arguments, durably=True)
        read_value(outcome)
        if isinstance(outcome, Reply) and not outcome.is_durable:
            raise NotDurable(
                f"the access keys {', '.join(records)} were written, but are not yet as durable as "
                "CARRY_DURABILITY requires; repeat the command"
            )

    async def token_key(self) -> bytes:
        """Read the secret that signs state tokens; drawn by whoever reads it first."""
        key = self._keys.token_key
        drawn = secrets.token_bytes(TOKEN_KEY_BYTES)
        read_value(await self._router.execute_one("SET", key, drawn, "NX"))
        value = read_value(await self._router.execute_one("GET", key))
        if not isinstance(value, bytes) or len(value) != TOKEN_KEY_BYTES:
            raise StoreRefused(
                f"key {key!r} of the store at {self._router.redacted_url} was not written by Carry"
            )
        return value
