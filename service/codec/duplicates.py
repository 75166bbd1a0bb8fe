"""Rejection of duplicate members: an object that has a member twice.

Decoders silently keep the last of duplicate members, so that two readers may see two different
requests in one body (RFC 8259, section 4). This module parses a body again that a decoder has
accepted, so it costs as much as the decoder: the fast decoder first compares counts and calls it
only if they differ, and long bodies pass their parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from service.codec.media import Media
from service.codec.validation_errors import BODY, Origin, Place
from service.core.errors import InvalidInput

EXPECTED: Final = "each member of an object once"

LONG_VALUE: Final = 1024
"""Longest value, in bytes, that is parsed only to find duplicate members in it."""

MAX_REST: Final = 64 * 1024
"""Maximum bytes of a document in JSON besides its long values."""

_ELEMENTS: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])
_NAME: Final = msgspec.msgpack.Decoder(str)
_MAX_DEPTH: Final = 32
"""No accepted body is nested deeper in MessagePack."""
_QUOTE: Final = np.uint8(ord('"'))
_FIXMAP, _MAP16, _MAP32 = 0x80, 0xDE, 0xDF
_FIXARRAY, _ARRAY16, _ARRAY32 = 0x90, 0xDC, 0xDD


class _Duplicate(NamedTuple):
    """Marker in place of an object that has this member more than once."""

    name: str


def find_duplicate(media: Media, body: bytes, origin: Origin = BODY) -> InvalidInput | None:
    """The error for a body in which an object has a member twice; None if none has.

    Args:
        body: what a decoder has accepted.
        origin: place of the document in the request.
    """
    tree = _packed_tree(body) if media is Media.MSGPACK else _json_tree(body)
    place = _find(tree, ())
    return None if place is None else duplicate_error(origin.place(place))


def find_duplicates(
    media: Media, body: bytes, parts: str, origin: Origin = BODY
) -> dict[int, InvalidInput]:
    """As `find_duplicate`, for each element of the body's list `parts`, by index.

    Raises:
        InvalidInput: the member is twice in the body itself.
    """
    tree = _packed_tree(body) if media is Media.MSGPACK else _json_tree(body)
    if isinstance(tree, _Duplicate):
        raise duplicate_error(tree.name)
    places = {at: _find(part, (parts, at)) for at, part in enumerate(tree[parts])}
    return {
        at: duplicate_error(origin.place(place))
        for at, place in places.items()
        if place is not None
    }


def replace_long_values(body: bytes | bytearray, values: Iterable[msgspec.Raw]) -> bytes:
    """Replace those of these values that are long in a JSON document, each by a number.

    The readers of these values check them; parsing them here would block other requests.

    Args:
        values: views of the document, none within another.

    Raises:
        InvalidInput: the rest is long, too, for example a value of a duplicate member.
    """
    start, end = _address(body), 0
    parts: list[bytes | bytearray] = []
    for at, length in sorted([(_address(each) - start, len(memoryview(each))) for each in values]):
        if length > LONG_VALUE:
            parts += (body[end:at], b"0")
            end = at + length
    rest = b"".join([*parts, body[end:]])
    if len(rest) > MAX_REST:
        expected = f"each member once, and at most {MAX_REST} bytes besides the values"
        raise InvalidInput(f"body: expected {expected}, got {len(rest)}", at="body")
    return rest


def _address(value: bytes | bytearray | msgspec.Raw) -> int:
    """The address of a value in memory."""
    address: int = np.frombuffer(value, np.uint8).__array_interface__["data"][0]
    return address


def duplicate_error(at: str) -> InvalidInput:
    """The error for a member that its object has more than once."""
    return InvalidInput(
        f"{at}: expected {EXPECTED}, got this one more than once",
        at=at,
        expected=EXPECTED,
        got="more than one",
    )


HEADER_BYTES: Final = 5
"""Longest header of a map or an array in MessagePack."""


def packed_length(value: bytes | memoryview) -> tuple[int, int] | None:
    """Length of a map or array in MessagePack, and the size of its header.

    Returns:
        None if the value is neither.
    """
    first = value[0]
    if first & 0xF0 in (_FIXMAP, _FIXARRAY):
        return first & 0x0F, 1
    if first in (_MAP16, _ARRAY16):
        return int.from_bytes(value[1:3], "big"), 3
    if first in (_MAP32, _ARRAY32):
        return int.from_bytes(value[1:5], "big"), 5
    return None


def is_packed_map(value: bytes | memoryview) -> bool:
    """Whether a value in MessagePack is a map."""
    return value[0] & 0xF0 == _FIXMAP or value[0] in (_MAP16, _MAP32)


def is_packed_array(value: bytes | memoryview) -> bool:
    """Whether a value in MessagePack is an array."""
    return value[0] & 0xF0 == _FIXARRAY or value[0] in (_ARRAY16, _ARRAY32)


def packed_pairs(value: bytes | memoryview) -> list[tuple[str, msgspec.Raw]]:
    """Names and values of a map in MessagePack, including those of duplicate members."""
    parts = packed_parts(value)
    return [(_name(parts[at]), parts[at + 1]) for at in range(0, len(parts), 2)]


def packed_parts(value: bytes | memoryview) -> list[msgspec.Raw]:
    """Names and values of a map in MessagePack, in turn, undecoded."""
    counted = packed_length(value)
    if counted is None:
        raise ValueError("expected a map")
    count, start = counted
    # A map is an array of its names and values under another header.
    header = _ARRAY32.to_bytes() + (2 * count).to_bytes(4, "big")
    return _ELEMENTS.decode(b"".join((header, value[start:])))


def _json_tree(body: bytes) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> Any:
        members = dict(pairs)
        if len(members) == len(pairs):
            return members
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                break
            seen.add(name)
        return _Duplicate(name)

    # Numbers are not needed, and Python limits the digits of an integer.
    return json.loads(body.decode(), object_pairs_hook=build, parse_int=len, parse_float=len)


def _packed_tree(packed: bytes | msgspec.Raw, depth: int = 0) -> Any:
    value = memoryview(packed)
    if depth > _MAX_DEPTH:
        return None
    if is_packed_array(value):
        return [_packed_tree(element, depth + 1) for element in _ELEMENTS.decode(value)]
    if not is_packed_map(value):
        return None
    members: dict[str, Any] = {}
    for name, part in packed_pairs(value):
        if name in members:
            return _Duplicate(name)
        members[name] = _packed_tree(part, depth + 1)
    return members


def _name(packed: msgspec.Raw) -> str:
    try:
        return _NAME.decode(packed)
    except msgspec.ValidationError:
        # Not text: no accepted body has such a name.
        return repr(bytes(packed))


def _find(tree: Any, at: Place) -> Place | None:
    if isinstance(tree, _Duplicate):
        return (*at, tree.name)
    parts: Iterable[tuple[int | str, Any]] = ()
    if isinstance(tree, dict):
        parts = tree.items()
    elif isinstance(tree, list):
        parts = enumerate(tree)
    for step, part in parts:
        if isinstance(part, list | dict | _Duplicate):
            place = _find(part, (*at, step))
            if place is not None:
                return place
    return None


class UndecidedError(Exception):
    """The strict validator has to decide."""


class _PackedChunk(msgspec.Struct):
    """The events of a body in MessagePack, undecoded."""

    events: list[msgspec.Raw] | None = None


class _Parts(msgspec.Struct):
    """The chunks or sequences of a body, undecoded."""

    chunks: list[msgspec.Raw] = []
    sequences: list[msgspec.Raw] = []


_PACKED_CHUNK = msgspec.msgpack.Decoder(_PackedChunk)
PACKED_PARTS = msgspec.msgpack.Decoder(_Parts)
_JSON_PARTS = msgspec.json.Decoder(_Parts)


def count_parts(media: Media, body: bytes) -> int:
    """Count the chunks or sequences of a body; 0 if it cannot be parsed."""
    decoder: Any = _JSON_PARTS if media is Media.JSON else PACKED_PARTS
    try:
        decoded: _Parts = decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return 0
    return len(decoded.chunks) + len(decoded.sequences)


def check_no_duplicates(
    media: Media,
    body: bytes,
    members: int,
    strings: int,
    maps: Sequence[bytes | msgspec.Raw],
    *,
    has_events: bool,
) -> None:
    """Raise UndecidedError for a body with duplicate members.

    The members that a decoder found, and in JSON the strings, are counted and compared with the
    body: in JSON each is a pair of quotation marks, in MessagePack the header of a map gives its
    length. A duplicate, a null or a quotation mark within a string can only increase the count of
    the body; the body is searched only if it is larger.

    Args:
        members: number of members that the decoder found and that are not null.
        strings: how many of them are strings.
        maps: those of a MessagePack body, without its events.
        has_events: whether one of them has events.
    """
    if media is Media.MSGPACK:
        if has_events:
            events = [_PACKED_CHUNK.decode(value).events or () for value in maps]
            maps = [*maps, *chain.from_iterable(events)]
        has_no_duplicates = _count_packed_members(maps) == members
    else:
        # NumPy counts five times as fast as bytes do.
        quotes = np.count_nonzero(np.frombuffer(body, np.uint8) == _QUOTE)
        has_no_duplicates = quotes == 2 * (members + strings)
    if not has_no_duplicates and find_duplicate(media, body) is not None:
        raise UndecidedError


def _count_packed_members(maps: Sequence[bytes | msgspec.Raw]) -> int:
    """Count the members of maps in MessagePack."""
    views = [memoryview(each) for each in maps]
    return sum(
        [
            view[0] - _FIXMAP if view[0] & 0xF0 == _FIXMAP else _map_length(view[:HEADER_BYTES])
            for view in views
        ]
    )


def _map_length(header: memoryview) -> int:
    counted = packed_length(header)
    if counted is None:
        raise UndecidedError
    return counted[0]
