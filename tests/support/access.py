"""Access keys for tests."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from service.access.keys import AccessKey, encode_key, new_key
from service.access.principal import Verb


class WritesKeys(Protocol):
    """A store of access keys."""

    async def write_access_key(self, key_id: str, record: bytes) -> None:
        """Write the record of a key."""


async def new_authorization(
    store: WritesKeys, *, verbs: tuple[Verb, ...] = tuple(Verb), **scope: Any
) -> str:
    """The Authorization of a new key in the store; it allows everything that is not restricted."""
    record = AccessKey(
        **{"name": "test", "models": ("*",), "prefix": "", "created_ms": 0, **scope}, verbs=verbs
    )
    text, record = new_key(record)
    await store.write_access_key(text.key_id, encode_key(record))
    return f"Bearer {text}"


async def revoke(store: Any, authorization: str) -> None:
    """Revoke the key of an Authorization."""
    key_id = authorization.split("_")[1]
    found = await store.access_keys(None)
    record = msgspec.json.decode(found[1][key_id], type=AccessKey)
    revoked = msgspec.structs.replace(record, revoked_ms=1)
    await store.write_access_key(key_id, encode_key(revoked))
