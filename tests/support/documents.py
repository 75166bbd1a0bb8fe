"""Encodes objects with duplicate members, in JSON and in MessagePack."""

from __future__ import annotations

import json
from typing import Any

import ormsgpack

from service.transports.http.media import Media


class Members(list[tuple[str, Any]]):
    """The members of an object, in order; a name may occur twice."""

    def with_duplicate(self, name: str, value: Any) -> Members:
        """Return these members and one more at the end."""
        return Members([*self, (name, value)])


def members(value: Any) -> Any:
    """Return the value with each of its dicts as `Members`."""
    if isinstance(value, Members):
        return value
    if isinstance(value, dict):
        return Members((name, members(part)) for name, part in value.items())
    if isinstance(value, list):
        return [members(part) for part in value]
    return value


def document(media: Media, value: Any) -> bytes:
    """Encode a value made of `Members`, lists and plain values."""
    return _json(value).encode() if media is Media.JSON else _packed(value)


def _json(value: Any) -> str:
    if isinstance(value, Members):
        pairs = [f"{json.dumps(name)}:{_json(part)}" for name, part in value]
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_json, value))}]"
    return json.dumps(value)


def _packed(value: Any) -> bytes:
    if isinstance(value, Members):
        head = b"\xdf" + len(value).to_bytes(4, "big")
        return head + b"".join(_packed(name) + _packed(part) for name, part in value)
    if isinstance(value, list):
        return b"\xdd" + len(value).to_bytes(4, "big") + b"".join(map(_packed, value))
    return ormsgpack.packb(value)
