"""Access keys for tests."""

from __future__ import annotations

from typing import Any

import msgspec

from service.access.caller import Verb
from service.access.keys import AccessKey, encode_key, new_key
from service.store.capabilities import StoredKeys


async def new_authorization(
    stored: StoredKeys, *, verbs: tuple[Verb, ...] = tuple(Verb), **scope: Any
) -> str:
    """The Authorization of a new key in the store; it allows everything that is not restricted."""
    record = AccessKey(
        **{"name": "test", "models": ("*",), "prefix": "", "created_ms": 0, **scope}, verbs=verbs
    )
    text, record = new_key(record)
    await stored.write({text.key_id: encode_key(record)})
    return f"Bearer {text}"


async def change_key(stored: StoredKeys, authorization: str, **changes: Any) -> None:
    """Change members of the record of an Authorization's key."""
    key_id = authorization.split("_")[1]
    found = await stored.read(None) or (b"", {})
    record = msgspec.json.decode(found[1][key_id], type=AccessKey)
    changed = msgspec.structs.replace(record, **changes)
    await stored.write({key_id: encode_key(changed)})


async def revoke(stored: StoredKeys, authorization: str) -> None:
    """Revoke the key of an Authorization."""
    await change_key(stored, authorization, revoked_ms=1)
