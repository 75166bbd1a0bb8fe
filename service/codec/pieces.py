"""Incremental encoding of long documents: the event loop runs between the pieces.

Joined, the pieces are the bytes that `media.dumps` gives at once, in JSON and in MessagePack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.codec.media import Media, dumps

PIECE_VALUES: Final = 4096
"""Values in one piece: some tens of kilobytes, encoded in a fraction of a millisecond."""

LONG_VALUES: Final = {Media.JSON: 3 * PIECE_VALUES, Media.MSGPACK: 8 * PIECE_VALUES}
"""Documents of more values are encoded in pieces; one of this size takes less than 1.5 ms. In
MessagePack a value takes less than a quarter of the time."""

Elements = Sequence[Any] | NDArray[Any]


class CountedList(list[Any]):
    """A list of documents, counted once: those with outputs of one size by one of them.

    Args:
        sizes: the values of each element's outputs; they tell how many it has in all, within a few.

    Attributes:
        counts: the values of each element.
    """

    def __init__(self, elements: Sequence[Any], sizes: Sequence[int]):
        super().__init__(elements)
        by_size = dict(zip(sizes, elements, strict=True))
        counts = {size: count_values(element) for size, element in by_size.items()}
        self.counts = [counts[size] for size in sizes]


def count_values(value: Any) -> int:
    """Count the numbers, strings and other scalars of a document."""
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, CountedList):
        return len(value) + sum(value.counts)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 1
    count = len(value)
    for each in value:
        kind = type(each)
        if kind is np.ndarray:
            count += each.size
        elif kind is dict or kind is list or kind is tuple or kind is CountedList:
            count += count_values(each)
    return count


def encode_pieces(media: Media, document: Any) -> Iterator[bytes]:
    """Encode dictionaries, lists and NumPy arrays (C order, not 0-d) piece by piece."""
    if count_values(document) <= PIECE_VALUES:
        yield dumps(media, document)
    elif isinstance(document, dict):
        yield _map_header(media, len(document))
        for at, (name, value) in enumerate(document.items()):
            yield _key(media, name, at)
            yield from encode_pieces(media, value)
        yield _end(media, b"}")
    elif isinstance(document, list | tuple | np.ndarray):
        yield _array_header(media, len(document))
        for at, (first, last) in enumerate(_groups(document)):
            if at and media is Media.JSON:
                yield b","
            if last == first + 1:
                yield from encode_pieces(media, document[first])
            else:
                yield _elements(media, document[first:last])
        yield _end(media, b"]")
    else:
        yield dumps(media, document)


def _groups(elements: Elements) -> Iterator[tuple[int, int]]:
    """Bounds of groups of elements; a group is at most one piece, or a single longer element."""
    if isinstance(elements, np.ndarray):
        count = max(1, PIECE_VALUES * len(elements) // elements.size)
        for first in range(0, len(elements), count):
            yield first, min(first + count, len(elements))
        return
    first = values = 0
    counts = elements.counts if isinstance(elements, CountedList) else map(count_values, elements)
    for at, more in enumerate(counts):
        if at > first and values + more > PIECE_VALUES:
            yield first, at
            first, values = at, 0
        values += more
    yield first, len(elements)


def _elements(media: Media, elements: Elements) -> bytes:
    """Encode elements of an array without its brackets or header."""
    written = dumps(media, elements)
    if media is Media.JSON:
        return written[1:-1]
    return written[len(_array_header(media, len(elements))) :]


def _key(media: Media, name: str, at: int) -> bytes:
    if media is Media.MSGPACK:
        return dumps(media, name)
    return b"%b%b:" % (b"," if at else b"", dumps(media, name))


def _end(media: Media, bracket: bytes) -> bytes:
    return bracket if media is Media.JSON else b""


def _map_header(media: Media, count: int) -> bytes:
    return b"{" if media is Media.JSON else _header(count, 0x80, b"\xde", b"\xdf")


def _array_header(media: Media, count: int) -> bytes:
    return b"[" if media is Media.JSON else _header(count, 0x90, b"\xdc", b"\xdd")


def _header(count: int, small: int, of_16_bits: bytes, of_32_bits: bytes) -> bytes:
    """The header of a MessagePack map or array of this length."""
    if count < 16:
        return bytes([small | count])
    if count < 2**16:
        return of_16_bits + count.to_bytes(2, "big")
    return of_32_bits + count.to_bytes(4, "big")
