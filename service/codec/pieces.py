"""Incremental encoding of long JSON documents: the event loop runs between the pieces.

Joined, the pieces are the bytes that `media.dumps` gives at once. In MessagePack a value takes less
than a tenth of the time, so that documents of any length are encoded at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.codec.media import encode_json

PIECE_VALUES: Final = 4096
"""Values in one piece: some tens of kilobytes, encoded in a fraction of a millisecond."""

LONG_VALUES: Final = 3 * PIECE_VALUES
"""Documents of more values are encoded in pieces; one of this size takes less than 1.5 ms."""

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


async def encode_in_turns(document: Any) -> bytes:
    """Encode a document while the event loop runs between its pieces."""
    pieces: list[bytes] = []
    for piece in encode_pieces(document):
        if pieces:
            await asyncio.sleep(0)
        pieces.append(piece)
    return b"".join(pieces)


def encode_pieces(document: Any) -> Iterator[bytes]:
    """Encode dictionaries, lists and NumPy arrays (C order, not 0-d) piece by piece."""
    if count_values(document) <= PIECE_VALUES:
        yield encode_json(document)
    elif isinstance(document, dict):
        lead = b"{"
        for name, value in document.items():
            yield b"%b%b:" % (lead, encode_json(name))
            yield from encode_pieces(value)
            lead = b","
        yield b"}"
    elif isinstance(document, list | tuple | np.ndarray):
        lead = b"["
        for first, last in _groups(document):
            yield lead
            if last == first + 1:
                yield from encode_pieces(document[first])
            else:
                yield encode_json(document[first:last])[1:-1]
            lead = b","
        yield b"]"
    else:
        yield encode_json(document)


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
