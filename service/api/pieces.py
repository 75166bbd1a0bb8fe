"""Long documents, written in pieces: the event loop runs between, and the reader sets the pace.

Joined, the pieces are the bytes that `media.dumps` writes at once, in JSON and in MessagePack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.api.media import Media, dumps

PIECE_VALUES: Final = 4096
"""Values that are written at once: some tens of kilobytes, in a fraction of a millisecond."""

LONG_VALUES: Final = 2 * PIECE_VALUES
"""Documents of more values are written in pieces."""

Elements = Sequence[Any] | NDArray[Any]


def count_values(value: Any) -> int:
    """How many numbers, texts and other scalars a document holds."""
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 1
    count = len(value)
    for each in value:
        kind = type(each)
        if kind is dict or kind is list or kind is tuple:
            count += count_values(each)
        elif kind is np.ndarray:
            count += each.size
    return count


def pieces(media: Media, document: Any) -> Iterator[bytes]:
    """The bytes of a document made of plain data and NumPy arrays (C order, not 0-d)."""
    if count_values(document) <= PIECE_VALUES:
        yield dumps(media, document)
    elif isinstance(document, dict):
        yield _map_head(media, len(document))
        for at, (name, value) in enumerate(document.items()):
            yield _key(media, name, at)
            yield from pieces(media, value)
        yield _end(media, b"}")
    elif isinstance(document, list | tuple | np.ndarray):
        yield _array_head(media, len(document))
        for at, (first, last) in enumerate(_groups(document)):
            if at and media is Media.JSON:
                yield b","
            if last == first + 1:
                yield from pieces(media, document[first])
            else:
                yield _elements(media, document[first:last])
        yield _end(media, b"]")
    else:
        yield dumps(media, document)


def _groups(elements: Elements) -> Iterator[tuple[int, int]]:
    """Where the elements are cut, so that each group but of one element is of a piece's size."""
    if isinstance(elements, np.ndarray):
        count = max(1, PIECE_VALUES * len(elements) // elements.size)
        for first in range(0, len(elements), count):
            yield first, min(first + count, len(elements))
        return
    first = values = 0
    for at, element in enumerate(elements):
        more = count_values(element)
        if at > first and values + more > PIECE_VALUES:
            yield first, at
            first, values = at, 0
        values += more
    yield first, len(elements)


def _elements(media: Media, elements: Elements) -> bytes:
    """Elements of an array without what stands around them."""
    written = dumps(media, elements)
    if media is Media.JSON:
        return written[1:-1]
    return written[len(_array_head(media, len(elements))) :]


def _key(media: Media, name: str, at: int) -> bytes:
    if media is Media.MSGPACK:
        return dumps(media, name)
    return b"%b%b:" % (b"," if at else b"", dumps(media, name))


def _end(media: Media, bracket: bytes) -> bytes:
    return bracket if media is Media.JSON else b""


def _map_head(media: Media, count: int) -> bytes:
    return b"{" if media is Media.JSON else _head(count, 0x80, b"\xde", b"\xdf")


def _array_head(media: Media, count: int) -> bytes:
    return b"[" if media is Media.JSON else _head(count, 0x90, b"\xdc", b"\xdd")


def _head(count: int, small: int, of_16_bits: bytes, of_32_bits: bytes) -> bytes:
    """The head of a MessagePack map or array: within one byte, or with a count behind it."""
    if count < 16:
        return bytes([small | count])
    if count < 2**16:
        return of_16_bits + count.to_bytes(2, "big")
    return of_32_bits + count.to_bytes(4, "big")
