"""Bytes of a source mark, which follow the values of a stored state (`service.store.codec`).

    offset  size  what
         0     8  offset, u64
         8     8  sequence, u64
        16     2  L, u16
        18     L  name of the source, UTF-8

A mark is read and written only with whole states, never on the way of a chunk: the first commit of
a chunk drops it.
"""

from __future__ import annotations

import re
import struct
from typing import Final

from service.core.values import SourceMark

KAFKA: Final = "kafka:"
_MARK: Final = struct.Struct("<QQH")
_is_offset: Final = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII).fullmatch


def encode_mark(mark: SourceMark) -> bytes:
    """Encode a mark.

    Raises:
        struct.error: a value does not fit the layout.
    """
    name = mark.source.encode()
    return _MARK.pack(mark.offset, mark.sequence, len(name)) + name


def decode_mark(value: bytes, at: int) -> tuple[SourceMark, int]:
    """Decode the mark at an offset of a state; returns it with its size.

    Raises:
        ValueError, struct.error: it is not a mark.
    """
    offset, sequence, length = _MARK.unpack_from(value, at)
    start = at + _MARK.size
    name = value[start : start + length].decode()
    return SourceMark(name, offset, sequence), _MARK.size + length


def source_name(topic: str, partition: int | None = None) -> str:
    """The name of a source: a topic of the store, or a partition of a topic of Kafka."""
    return topic if partition is None else f"{KAFKA}{topic}:{partition}"


def format_offset(mark: SourceMark) -> str:
    """The offset of a mark as its source names it."""
    is_number = mark.source.startswith(KAFKA)
    return str(mark.offset) if is_number else f"{mark.offset}-{mark.sequence}"


def parse_offset(text: str) -> tuple[int, int]:
    """Parse the offset of an event in its source: the number of a record of Kafka, or the id of an
    entry of a Redis stream, such as 1700000000000-3; returns offset and sequence.

    Raises:
        ValueError: it is neither.
    """
    match = _is_offset(text)
    numbers = (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
    if not 0 <= min(numbers) <= max(numbers) < 2**64:
        raise ValueError(
            "expected an offset of Kafka, or the id of an entry such as 1700000000000-3, got "
            f"{text[:100]!r}"
        )
    return numbers
