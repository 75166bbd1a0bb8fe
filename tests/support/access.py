"""Access keys for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from service.access.keys import AccessKey, encode_key, new_key
from service.access.principal import Verb


class WritesKeys(Protocol):
    """A store of access keys."""

    async def write_access_keys(self, records: Mapping[str, bytes]) -> None:
        """Write records of keys by id."""


async def new_authorization(
    store: WritesKeys, *, verbs: tuple[Verb, ...] = tuple(Verb), **scope: Any
) -> str:
    """The Authorization of a new key in the store; it allows everything that is not restricted."""
    record = AccessKey(
        **{"name": "test", "models": ("*",), "prefix": "", "created_ms": 0, **scope}, verbs=verbs
    )
    text, record = new_key(record)
    await store.write_access_keys({text.key_id: encode_key(record)})
    return f"Bearer {text}"


async def change_key(store: Any, authorization: str, **changes: Any) -> None:
    """Change members of the record of an Authorization's key."""
    key_id = authorization.split("_")[1]
    found = await store.access_keys(None)
    record = msgspec.json.decode(found[1][key_id], type=AccessKey)
    changed = msgspec.structs.replace(record, **changes)
    await store.write_access_keys({key_id: encode_key(changed)})


async def revoke(store: Any, authorization: str) -> None:
    """Revoke the key of an Authorization."""
    await change_key(store, authorization, revoked_ms=1)
