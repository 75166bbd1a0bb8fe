"""Documents in which the translation of errors looks up what is wrong: parsed JSON, or MessagePack.

Of MessagePack only what is looked up is decoded, since a byte of it can be an object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

Path = list[str | int]
Check = Callable[[Any, Any, str], object]

MAX_MEMBERS: Final = 10_000
"""Most members of an object in MessagePack that are searched for a wrong value, to show it."""

_MAPS: Final = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
_ARRAYS: Final = frozenset([*range(0x90, 0xA0), 0xDC, 0xDD])


class ParsedDocument:
    """Python's objects, in which an error is looked up.

    Args:
        check: raises the error of a value that does not fit a type, at a place.
    """

    def __init__(self, value: Any, check: Check):
        self._value, self._check = value, check

    def value(self, path: Path) -> Any:
        """The value at a path; raises LookupError."""
        value = self._value
        for step in path:
            try:
                value = value[step]
            except (TypeError, KeyError) as error:
                raise LookupError from error
        return value

    def members(self, path: Path) -> Mapping[str, Any]:
        """The members of the object at a path; raises LookupError."""
        value = self.value(path)
        if not isinstance(value, dict):
            raise LookupError
        return value

    def element(self, member: Any) -> Any:
        """The value of a member."""
        return member

    def check(self, member: Any, kind: Any, at: str) -> None:
        """Raise the error of a member that does not fit its type."""
        self._check(member, kind, at)


class MsgpackDocument:
    """A document in MessagePack, in which an error is looked up without decoding the rest.

    The methods are those of `ParsedDocument`; a damaged one raises MsgspecError or ValueError.
    """

    def __init__(self, raw: msgspec.Raw, check: Check):
        self._raw, self._check = raw, check

    def _at(self, path: Path) -> msgspec.Raw:
        raw = self._raw
        for step in path:
            raw = _members(raw)[step] if isinstance(step, str) else _elements(raw)[step]
        return raw

    def value(self, path: Path) -> Any:
        return self.element(self._at(path))

    def element(self, raw: msgspec.Raw) -> Any:
        first = memoryview(raw)[0]
        if first in _MAPS:
            return {}
        return _Elements(raw) if first in _ARRAYS else msgspec.msgpack.decode(raw)

    def members(self, path: Path) -> Mapping[str, Any]:
        return _members(self._at(path))

    def check(self, member: Any, kind: Any, at: str) -> None:
        self._check(member, kind, at)


Document = ParsedDocument | MsgpackDocument


class _Elements(list[Any]):
    """The elements of an array in MessagePack, of which only the number is read."""

    def __init__(self, raw: msgspec.Raw):
        super().__init__()
        self._length = _msgpack_length(raw)

    def __len__(self) -> int:
        return self._length


def _msgpack_length(raw: msgspec.Raw) -> int:
    """The number of elements of an array or members of a map in MessagePack, by its header."""
    header = bytes(memoryview(raw)[:5])
    if header[0] < 0xA0:
        return header[0] & 0x0F
    return int.from_bytes(header[1:3] if header[0] in (0xDC, 0xDE) else header[1:5], "big")


def _members(raw: msgspec.Raw) -> dict[str, msgspec.Raw]:
    if memoryview(raw)[0] not in _MAPS or _msgpack_length(raw) > MAX_MEMBERS:
        raise LookupError
    try:
        return msgspec.msgpack.decode(raw, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise LookupError from error


def _elements(raw: msgspec.Raw) -> list[msgspec.Raw]:
    try:
        return msgspec.msgpack.decode(raw, type=list[msgspec.Raw])
    except msgspec.ValidationError as error:
        raise LookupError from error
