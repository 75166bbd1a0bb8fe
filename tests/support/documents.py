"""Encodes objects with duplicate members, in JSON and in MessagePack, and finds them in JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import ormsgpack

from service.codec.media import Media


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


def has_duplicates(text: bytes) -> bool:
    """Whether an object has a member twice, by Python's parser."""
    found: list[bool] = []
    json.loads(text, object_pairs_hook=lambda pairs: found.append(len(pairs) > len(dict(pairs))))
    return any(found)


def with_escapes(choose: random.Random, value: Any) -> str:
    """The value in JSON, with some characters of its names and strings escaped."""
    if isinstance(value, Members):
        pairs = [
            f"{with_escapes(choose, each)}:{with_escapes(choose, part)}" for each, part in value
        ]
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{','.join(with_escapes(choose, part) for part in value)}]"
    if not isinstance(value, str):
        return json.dumps(value)
    share = choose.choice((0, 0.3, 1))
    characters = [
        f"\\u{ord(each):04x}" if choose.random() < share else json.dumps(each)[1:-1]
        for each in value
    ]
    return f'"{"".join(characters)}"'


def with_duplicates(choose: random.Random, value: Any) -> bytes:
    """A value in JSON with escapes; about half of the documents have members twice."""
    changed = members(value)
    for _ in range(choose.choice((0, 0, 1, 2))):
        one = choose.choice(_objects(changed))
        one.insert(choose.randint(0, len(one)), choose.choice(one))
    return with_escapes(choose, changed).encode()


def quoted(choose: random.Random) -> str:
    """A string that is easily misread; often with as many quotation marks as members have."""
    return "".join(choose.choices('"\\/ab:,{}[]\n\u00e9', k=choose.randint(0, 3))) + choose.choice(
        ("", '""', '""""')
    )


def _objects(value: Any) -> list[Members]:
    """The objects of a value that have members."""
    parts = [part for _, part in value] if isinstance(value, Members) else value
    found = [value] if isinstance(value, Members) and value else []
    if isinstance(parts, list):
        found += [each for part in parts for each in _objects(part)]
    return found
