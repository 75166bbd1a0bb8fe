"""Reader of requests for many streams whose chunks are rows: one pass over the body.

In MessagePack the rows of a chunk are one string of bytes; in JSON simdjson reads them. Like the
fast decoder, it accepts only what the strict validator accepts, with the same values, so what it
does not accept is left to the other readers.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from service.codec.fast_decoder import MAX_BYTES, UNDECIDED
from service.codec.field_rules import EPOCH, MAX_POSITION
from service.codec.media import Media
from service.codec.request_reader import RequestReader
from service.core.errors import CarryError
from service.core.values import Chunk, Feed, Steps, is_stream_name


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


class RowsItemsReader:
    """Reads the requests of many chunks of rows for one model."""

    def __init__(self, reader: RequestReader):
        self._reader = reader
        self._row_bytes = _F4_BYTES * reader.served.input_features
        self._max_bytes = self._row_bytes * reader.limits.max_chunk_steps
        self._max_items = reader.limits.max_items
        self._accepts_chunks = reader.served.artifact.spec.chunking != "whole"

    def items(self, body: bytes, media: Media) -> list[Chunk | CarryError] | None:
        """The chunks of a body; None if it is not certainly valid, has other members, or is too
        long to be read at once."""
        if len(body) > MAX_BYTES or not self._accepts_chunks:
            return None
        reader, is_json = self._reader, media is Media.JSON
        try:
            items = reader.fast.decode_rows_items(body) if is_json else self._unpack(body)
        except UNDECIDED:
            return None
        if items is None:
            return None
        return [
            reader.build_chunk(item, steps, reader.key(item.stream), None) for item, steps in items
        ]

    def _unpack(self, body: bytes) -> list[tuple[PackedItem, Steps]] | None:
        """The chunks of a body in MessagePack, whose rows are views of one array."""
        decoded = _DECODE(body)
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
        rows = self._reader.fast.check_rows(b"".join(packed))
        steps: list[Steps] = []
        end = 0
        for size in sizes:
            length, rest = divmod(size, self._row_bytes)
            if rest:
                return None
            start, end = end, end + length
            steps.append(Steps(Feed.INPUTS, length, None, rows[start:end]))
        return list(zip(items, steps, strict=True))
