"""Structural index of a long JSON text: where the members of its object and their elements end.

NumPy finds brackets and commas outside of strings, a block at a time, so that the elements of a
list are counted, and the body is split between them, before an object is made for any. Nothing is
validated: if the JSON is malformed, so are its parts, and their decoder rejects them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import pydantic_core
from numpy.typing import NDArray

BLOCK_BYTES: Final = 64 * 1024

_QUOTE, _COMMA = np.uint8(ord('"')), np.uint8(ord(","))
_BRACKET_BIT: Final = np.uint8(ord("{") ^ ord("["))
_OPENING, _CLOSING = np.uint8(ord("{")), np.uint8(ord("}"))
_STEPS: Final = np.zeros(256, np.int64)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
_SPACE: Final = b" \t\r\n"
_LEADING: Final = re.compile(rb"[ \t\r\n]*+")
_NAME: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_NAME_BYTES: Final = 4096
"""A longer member name is cut: no accepted body has it."""
_SHOWN_NAME_BYTES: Final = 256


class JsonMember(NamedTuple):
    """A member of an object.

    Attributes:
        start: where its value begins in the text, and `stop` where it ends.
    """

    name: str
    start: int
    stop: int


class JsonElements:
    """The elements of a list, cut out of the text as they are read: to make an object for each of a
    hundred thousand would hold the event loop.

    Args:
        bounds: offsets of the list's brackets and of the commas between.
    """

    def __init__(self, text: memoryview, bounds: list[int]):
        self._text = text
        self._bounds = bounds

    def __len__(self) -> int:
        return max(0, len(self._bounds) - 1)

    def __iter__(self) -> Iterator[memoryview]:
        for start, stop in pairwise(self._bounds):
            yield self._text[start + 1 : stop]


class JsonStructure:
    """The commas of an object and of the containers directly within it.

    Attributes:
        members: offsets of the commas between members, as far as the text is scanned.
        elements: number of commas between elements, of all members together.
    """

    def __init__(self, text: bytes | memoryview):
        self._text = memoryview(text)
        self.members: list[int] = []
        self.elements = 0
        self._elements: list[NDArray[np.int64]] = []

    def scan(self) -> Iterator[None]:
        """Scan the text, one block per iteration."""
        depth = quotes = 0
        escaped = False
        for start in range(0, len(self._text), BLOCK_BYTES):
            block = bytes(self._text[start : start + BLOCK_BYTES])
            if escaped:
                block = b"_" + block[1:]
            escaped = False
            if b"\\" in block:
                block = block.replace(b"\\\\", b"__").replace(b'\\"', b"__")
                escaped = block.endswith(b"\\")
            characters = np.frombuffer(block, np.uint8)
            at = np.flatnonzero(_is_structural(characters))
            heads = characters[at]
            is_quote = heads == _QUOTE
            parity = np.cumsum(is_quote) + quotes
            quotes = int(parity[-1]) & 1 if len(parity) else quotes
            is_outside = (parity & 1 == 0) & ~is_quote
            at, heads = at[is_outside] + start, heads[is_outside]
            depths = depth + np.cumsum(_STEPS[heads])
            depth = int(depths[-1]) if len(depths) else depth
            is_comma = heads == _COMMA
            self.members += at[is_comma & (depths == 1)].tolist()
            elements = at[is_comma & (depths == 2)]
            self.elements += len(elements)
            self._elements.append(elements)
            yield

    def member_of_element(self, index: int) -> str:
        """The name of the member that the comma between elements with this index belongs to."""
        at = np.concatenate(self._elements)[index]
        return self.names()[int(np.searchsorted(self.members, at))]

    def names(self) -> list[str]:
        """The names of the members, as far as the text is scanned; "" for a malformed one."""
        starts = [_skip_whitespace(self._text), *self.members]
        names = [self._name(start) for start in starts]
        return [name[0] if name else "" for name in names]

    def _name(self, start: int) -> tuple[str, int] | None:
        """The member name after a bracket or comma, and the offset of its value."""
        begin = _skip_whitespace(self._text, start + 1)
        match = _NAME.match(self._text, begin)
        if match is None:
            return None
        end = _skip_whitespace(self._text, match.end())
        if match.end() - begin > _NAME_BYTES:
            name = bytes(self._text[begin + 1 : begin + _SHOWN_NAME_BYTES]).decode(errors="replace")
        else:
            try:
                # rejects what the decoders of bodies reject
                name = pydantic_core.from_json(match[0])
            except ValueError:
                return None
        return (name, end + 1) if bytes(self._text[end : end + 1]) == b":" else None

    def split_members(self) -> list[JsonMember] | None:
        """The members of a scanned text; None if it is not an object."""
        span = _find_brackets(self._text, b"{}")
        if span is None:
            return None
        begin, end = span
        if _skip_whitespace(self._text, begin + 1) == end:
            return []
        members = []
        for start, stop in zip([begin, *self.members], [*self.members, end], strict=True):
            name = self._name(start)
            if name is None or name[1] > stop:
                return None
            members.append(JsonMember(*name, stop))
        return members

    def split_elements(self, member: JsonMember) -> JsonElements | None:
        """The elements of a member of a scanned text; None if it is not a list."""
        value = self._text[member.start : member.stop]
        span = _find_brackets(value, b"[]")
        if span is None:
            return None
        begin, end = span
        if _skip_whitespace(value, begin + 1) == end:
            return JsonElements(value, [])
        commas = np.concatenate([np.zeros(0, np.int64), *self._elements]) - member.start
        within = commas[(commas > begin) & (commas < end)].tolist()
        return JsonElements(value, [begin, *within, end])


def _is_structural(text: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mask of the quotes, commas and brackets; a lookup table would take six times as long."""
    brackets = text | _BRACKET_BIT
    return np.asarray(
        (text == _QUOTE) | (text == _COMMA) | (brackets == _OPENING) | (brackets == _CLOSING)
    )


def is_blank(text: memoryview) -> bool:
    """Whether JSON is only white space."""
    return _skip_whitespace(text) == len(text)


def _skip_whitespace(text: memoryview, start: int = 0) -> int:
    """The offset of the first character that is not white space."""
    space = _LEADING.match(text, start)
    return start if space is None else space.end()


def _find_brackets(text: memoryview, brackets: bytes) -> tuple[int, int] | None:
    """The offsets of the two brackets that enclose a text; None if it is not enclosed."""
    begin, end = _skip_whitespace(text), len(text)
    while end > begin and text[end - 1] in _SPACE:
        last = bytes(text[max(begin, end - BLOCK_BYTES) : end])
        end -= len(last) - len(last.rstrip(_SPACE))
    if end - begin < len(brackets) or text[begin] != brackets[0] or text[end - 1] != brackets[1]:
        return None
    return begin, end - 1
