"""Reader of many chunks of packed rows: MessagePack with each chunk's rows as one string of bytes.

The usual body of a request for many streams, read in one pass with few steps for each chunk. Like
the fast decoder it accepts only what the strict validator accepts, with the same values.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from service.core.errors import CarryError
from service.core.values import Chunk, Feed, Steps
from service.transports.http.bodies.fast_decoder import UNDECIDED
from service.transports.http.bodies.request_reader import RequestReader
from service.transports.http.field_rules import EPOCH, MAX_POSITION, is_stream_name
from service.transports.http.limits import LONG_BYTES
from service.transports.http.media import Media

MAX_PACKED_BYTES: Final = 4 * LONG_BYTES
"""Longest body that is read at once: as many values of packed rows take a quarter of the time."""


class PackedItem(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A chunk of packed rows; an absent member is None."""

    stream: str
    inputs: bytes
    position: Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None = None
    epoch: Annotated[str, Meta(pattern=rf"^{EPOCH}\Z")] | None = None


class _PackedItems(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    chunks: list[PackedItem]


_F4_BYTES: Final = 4
_DECODE: Final = msgspec.msgpack.Decoder(_PackedItems).decode
_ENCODE: Final = msgspec.msgpack.Encoder().encode


class PackedItemsReader:
    """Reads the requests of many chunks of packed rows for one model."""

    def __init__(self, reader: RequestReader):
        self._reader = reader
        self._row_bytes = _F4_BYTES * reader.served.input_features
        self._max_bytes = self._row_bytes * reader.limits.max_chunk_steps
        self._max_items = reader.limits.max_items
        self._is_open = reader.served.artifact.spec.chunking != "whole"

    def items(self, body: bytes, media: Media) -> list[Chunk | CarryError] | None:
        """The chunks of a body; None if it is not certainly valid, has other members or rows that
        are not packed, or is too long to be read at once. Then another reader has to read it."""
        if media is not Media.MSGPACK or len(body) > MAX_PACKED_BYTES or not self._is_open:
            return None
        try:
            decoded = _DECODE(body)
        except UNDECIDED:
            return None
        items = decoded.chunks
        # a duplicate or null member would be missing from the shortest encoding of what was read
        if not 0 < len(items) <= self._max_items or len(_ENCODE(decoded)) != len(body):
            return None
        packed = [item.inputs for item in items]
        sizes = list(map(len, packed))
        if not (min(sizes) > 0 and max(sizes) <= self._max_bytes):
            return None
        if None in [is_stream_name(item.stream) for item in items]:
            return None
        try:
            rows = self._reader.fast.check_rows(b"".join(packed))
        except UNDECIDED:
            return None
        reader = self._reader
        chunks: list[Chunk | CarryError] = []
        end = 0
        for item, size in zip(items, sizes, strict=True):
            length, rest = divmod(size, self._row_bytes)
            if rest:
                return None
            start, end = end, end + length
            steps = Steps(Feed.INPUTS, length, None, rows[start:end])
            chunks.append(reader.build_chunk(item, steps, reader.key(item.stream), None))
        return chunks
