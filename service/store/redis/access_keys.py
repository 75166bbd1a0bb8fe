"""The records of the access keys in the store: one hash, read whole when its version has changed.

Version and record are written by one command, so that no reader sees one without the other. The
version stays if there is no record: it marks a store that has had keys.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Final

from service.core.errors import NotDurable
from service.store.keys import KeySpace
from service.store.redis.commands import PendingCommand
from service.store.redis.outcomes import Reply, read_value
from service.store.redis.router import Router

VERSION: Final = "version"
"""Field beside the records; no id of a key."""


async def read_access_keys(
    router: Router, keys: KeySpace, version: bytes | None, deadline_s: float
) -> tuple[bytes, Mapping[str, bytes]] | None:
    """Read version and records (`StateStore.access_keys`)."""
    name = keys.access_keys
    slot = router.slot(name)
    if version is not None:
        get = PendingCommand.of("HGET", name, VERSION, slot=slot)
        (outcome,) = await router.execute(get, deadline_s=deadline_s)
        if (read_value(outcome) or b"") == version:
            return None
    get_all = PendingCommand.of("HGETALL", name, slot=slot)
    (outcome,) = await router.execute(get_all, deadline_s=deadline_s)
    fields: list[bytes] = read_value(outcome)
    names = [field.decode("utf-8", "replace") for field in fields[::2]]
    records = dict(zip(names, fields[1::2], strict=True))
    return records.pop(VERSION, b""), records


async def write_access_keys(router: Router, keys: KeySpace, records: Mapping[str, bytes]) -> None:
    """Write records and a new version (`StateStore.write_access_keys`)."""
    name = keys.access_keys
    fields = [each for item in records.items() for each in item]
    arguments = ("HSET", name, *fields, VERSION, secrets.token_hex(8))
    command = PendingCommand.of(*arguments, slot=router.slot(name))
    (outcome,) = await router.execute(command, durably=True)
    read_value(outcome)
    if isinstance(outcome, Reply) and not outcome.is_durable:
        raise NotDurable(
            f"the access keys {', '.join(records)} were written, but are not yet as durable as "
            "CARRY_DURABILITY requires; repeat the command"
        )
