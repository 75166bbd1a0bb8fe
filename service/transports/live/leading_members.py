"""The members at the beginning of a long frame, read before the frame is admitted.

A long frame is split in steps, and may be rejected before its end is reached. The members before
its first list are read at once, so that its outcome has its id, and overload is noticed first.
Nothing is validated here: whatever is unusual ends the reading, and the frame is split in any case.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from service.codec.duplicates import (
    HEADER_BYTES,
    is_packed_map,
    packed_length,
)
from service.codec.media import Media

_MAX_MEMBERS: Final = 8
_OPENING: Final = re.compile(rb"[ \t\r\n]*\{")
_MEMBER: Final = re.compile(
    rb'[ \t\r\n]*"([a-z_]{1,32})"[ \t\r\n]*:[ \t\r\n]*'
    rb'("[^"\\]{0,4096}"|-?[0-9]{1,20}|true|false|null)[ \t\r\n]*,'
)
_SIZES: Final = {
    **dict.fromkeys(range(0x80), 1),
    **{0xA0 + length: 1 + length for length in range(32)},
    **dict.fromkeys((0xC0, 0xC2, 0xC3), 1),
    **dict.fromkeys((0xCC, 0xD0), 2),
    **dict.fromkeys((0xCD, 0xD1), 3),
    **dict.fromkeys((0xCA, 0xCE, 0xD2), 5),
    **dict.fromkeys((0xCB, 0xCF, 0xD3), 9),
    **dict.fromkeys(range(0xE0, 0x100), 1),
}
"""Bytes of a scalar in MessagePack by its first byte; of strings, only the short ones."""
_TEXT_OF_8_BITS: Final = 0xD9
_TEXT_OF_16_BITS: Final = 0xDA


def leading_members(media: Media, data: bytes | bytearray) -> dict[str, msgspec.Raw]:
    """The scalar members before the first other one, undecoded."""
    return _leading_json(data) if media is Media.JSON else _leading_packed(data)


def _leading_json(data: bytes | bytearray) -> dict[str, msgspec.Raw]:
    members: dict[str, msgspec.Raw] = {}
    match = _OPENING.match(data)
    while match is not None and len(members) < _MAX_MEMBERS:
        match = _MEMBER.match(data, match.end())
        if match is not None:
            members.setdefault(match[1].decode(), msgspec.Raw(match[2]))
    return members


def _leading_packed(data: bytes | bytearray) -> dict[str, msgspec.Raw]:
    members: dict[str, msgspec.Raw] = {}
    head = bytes(data[:HEADER_BYTES])
    counted = packed_length(head)
    if counted is None or not is_packed_map(head):
        return members
    count, at = counted
    for _ in range(min(count, _MAX_MEMBERS)):
        if not 0xA0 <= data[at] < 0xC0:
            break
        value = at + _SIZES[data[at]]
        end = value + _scalar_bytes(data[value : value + 3])
        if end == value or end >= len(data):
            break
        name = bytes(data[at + 1 : value]).decode("latin-1")
        members.setdefault(name, msgspec.Raw(bytes(data[value:end])))
        at = end
    return members


def _scalar_bytes(head: bytes | bytearray) -> int:
    """Bytes of the scalar that begins so; 0 for another value."""
    if not head:
        return 0
    if head[0] == _TEXT_OF_8_BITS and len(head) > 1:
        return 2 + head[1]
    if head[0] == _TEXT_OF_16_BITS and len(head) > 2:
        return 3 + int.from_bytes(head[1:3], "big")
    return _SIZES.get(head[0], 0)
