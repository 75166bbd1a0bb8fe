"""The secret of a store that signs state tokens; drawn by whoever reads it first."""

from __future__ import annotations

import secrets
from typing import Any, Final

from service.core.errors import StoreRefused
from service.store.keys import KeySpace
from service.store.redis.commands import PendingCommand
from service.store.redis.outcomes import read_value
from service.store.redis.router import Router

TOKEN_KEY_BYTES: Final = 32


async def read_token_key(router: Router, keys: KeySpace) -> bytes:
    """Read the secret (`StateStore.token_key`).

    Raises:
        StoreRefused: something else is stored under its key.
        StoreUnavailable: the store does not answer.
    """
    key = keys.token_key
    slot = router.slot(key)
    drawn = secrets.token_bytes(TOKEN_KEY_BYTES)
    value: Any = None
    for arguments in (("SET", key, drawn, "NX"), ("GET", key)):
        (outcome,) = await router.execute(PendingCommand.of(*arguments, slot=slot))
        value = read_value(outcome)
    if not isinstance(value, bytes) or len(value) != TOKEN_KEY_BYTES:
        raise StoreRefused(
            f"key {key!r} of the store at {router.redacted_url} was not written by Carry"
        )
    return value
