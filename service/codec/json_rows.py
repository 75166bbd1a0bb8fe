"""Decoder of chunks of rows in JSON, in the usual form, by simdjson.

It makes one array of all numbers, without an object for each, and makes no errors: what it does not
accept, because it is invalid or only unusual, is decoded by `decoding`. Both give the same values
for what both accept.
"""

from __future__ import annotations

from contextvars import Context
from itertools import chain, permutations
from typing import Any, Final

import msgspec
import numpy as np
import simdjson
from numpy.typing import NDArray

from service.codec.field_rules import MAX_FRAME_ID_CHARS, MAX_POSITION, is_epoch
from service.core.values import FloatRows, is_stream_name

MAX_BYTES: Final = 256 * 1024
"""Longest body that simdjson parses: its parser keeps its memory, and takes up to 0.5 us for a byte
of hostile numbers."""

_F4: Final = np.dtype("<f4")
_F8: Final = np.dtype(np.float64)
_INPUTS: Final = b'"inputs"'
_NEAR_BEGIN: Final = 96
"""A chunk of rows has `inputs` within this many bytes; other bodies are not parsed by simdjson."""


def _orders(*names: str) -> frozenset[tuple[str, ...]]:
    """The orders in which an object may have some of these members, and always `inputs`."""
    counts = range(1, len(names) + 1)
    orders = chain.from_iterable(permutations(names, count) for count in counts)
    return frozenset(order for order in orders if "inputs" in order)


_MEMBERS: Final = _orders("inputs", "position", "epoch")
_ITEM_MEMBERS: Final = _orders("inputs", "position", "epoch", "stream")
_FRAME_MEMBERS: Final = _orders("inputs", "position", "epoch", "stream", "id")
_NEAR_BEGIN_OF_ITEMS: Final = 512
MAX_DOT: Final = 10_000
"""Largest `dot` that OpenBLAS computes in the calling thread alone; waiting for its other threads
may take milliseconds."""

_LARGEST_SQUARES: Final = 1e76
"""A sum of squares below this has no member that overflows float32."""

_PARSER_ERRORS: Final = (ValueError, TypeError, KeyError, RuntimeError)
"""What simdjson raises for malformed JSON, and for a list of values other than numbers."""


class RowsChunk(msgspec.Struct, gc=False):
    """A chunk of rows.

    Attributes:
        rows: float32 [T, F], finite.
        stream: in a body for many streams, and in a frame that names one.
        id: of a frame.
    """

    rows: FloatRows
    position: int | None
    epoch: str | None
    stream: str | None = None
    id: str | int | None = None
    if_match: None = None


class JsonRowsDecoder:
    """Decodes chunks of rows in JSON with simdjson: into one array, without an object per number.

    For the usual chunks of one model: `inputs`, with `position` and `epoch` or without. simdjson
    flattens any list, so the shape is checked here: as many lists as rows, each as wide as the
    model's rows, and no list within a row. Use from one thread.

    Args:
        features: F, numbers in a row.
        max_rows: maximum rows in one body.
    """

    def __init__(self, features: int, max_rows: int):
        self._features = features
        self._max_rows = max_rows
        self._parser = simdjson.Parser()
        # entering `np.errstate` for each body would cost twice as much as the call in it
        self._ignoring_overflow = Context()
        self._ignoring_overflow.run(np.seterr, over="ignore")

    def decode_chunk(self, body: bytes) -> RowsChunk | None:
        """The chunk of a body; None if it is not a valid chunk of rows in the usual form."""
        # simdjson would skip a byte order mark
        is_usual = body[:1] == b"{" and body.find(_INPUTS, 0, _NEAR_BEGIN) > 0
        if not is_usual or len(body) > MAX_BYTES:
            return None
        try:
            members = self._parser.parse(body)
            if not isinstance(members, simdjson.Object):
                return None
            count, numbers, position, epoch = self._read(members, _MEMBERS)
            return RowsChunk(self._rows(body, numbers, 1 + count), position, epoch)
        except _PARSER_ERRORS:
            return None

    def decode_frame(self, body: bytes) -> RowsChunk | None:
        """As `decode_chunk`, for the frame of a live socket."""
        try:
            members = self._parse(body, _NEAR_BEGIN_OF_ITEMS)
            count, numbers, position, epoch = self._read(members, _FRAME_MEMBERS)
            chunk = RowsChunk(self._rows(body, numbers, 1 + count), position, epoch)
            chunk.stream, chunk.id = _stream(members), _frame_id(members)
        except _PARSER_ERRORS:
            return None
        return chunk

    def decode_items(self, body: bytes, max_items: int) -> tuple[FloatRows, list[RowsChunk]] | None:
        """The rows of all chunks of a body for many streams, and the chunks, whose rows are views
        of them; None if one is no chunk of rows in the usual form."""
        try:
            members = self._parse(body, _NEAR_BEGIN_OF_ITEMS)
            if tuple(members) != ("chunks",):
                return None
            chunks = members["chunks"]
            if not isinstance(chunks, simdjson.Array) or not 0 < len(chunks) <= max_items:
                return None
            streams: list[str] = []
            read: list[tuple[int, memoryview, int | None, str | None]] = []
            for item in chunks:
                if not isinstance(item, simdjson.Object):
                    return None
                read.append(self._read(item, _ITEM_MEMBERS))
                stream = item["stream"]
                if type(stream) is not str or not is_stream_name(stream):
                    return None
                streams.append(stream)
            brackets = 1 + sum([1 + count for count, *_ in read])
            rows = self._rows(body, b"".join([numbers for _, numbers, *_ in read]), brackets)
        except _PARSER_ERRORS:
            return None
        items: list[RowsChunk] = []
        end = 0
        for stream, (count, _, position, epoch) in zip(streams, read, strict=True):
            start, end = end, end + count
            items.append(RowsChunk(rows[start:end], position, epoch, stream))
        return rows, items

    def _parse(self, body: bytes, near_begin: int) -> simdjson.Object:
        """Parse a body that may be in the usual form.

        Raises:
            ValueError, RuntimeError
        """
        # simdjson would skip a byte order mark
        is_usual = body[:1] == b"{" and body.find(_INPUTS, 0, near_begin) > 0
        if not is_usual or len(body) > MAX_BYTES:
            raise ValueError("another form")
        members = self._parser.parse(body)
        if not isinstance(members, simdjson.Object):
            raise ValueError("no object")
        return members

    def _read(
        self, members: simdjson.Object, orders: frozenset[tuple[str, ...]]
    ) -> tuple[int, memoryview, int | None, str | None]:
        """Read a chunk: the number of rows, their values (float64), the position and the epoch.

        Raises:
            ValueError, TypeError, KeyError: it is not in the usual form.
        """
        # a body with a duplicate member has none of these orders
        names = tuple(members)
        if names not in orders:
            raise ValueError("other members")
        position = members["position"] if "position" in names else None
        if position is not None and not (type(position) is int and 0 <= position <= MAX_POSITION):
            raise ValueError("another position")
        epoch = members["epoch"] if "epoch" in names else None
        if epoch is not None and not (type(epoch) is str and is_epoch(epoch)):
            raise ValueError("another epoch")
        lists = members["inputs"]
        if not isinstance(lists, simdjson.Array):
            raise ValueError("no list of rows")
        count, numbers = len(lists), memoryview(lists.as_buffer(of_type="d"))
        is_shaped = set(map(len, lists)) == {self._features}  # type: ignore[arg-type]
        size_bytes = count * self._features * _F8.itemsize
        if not 0 < count <= self._max_rows or not is_shaped or numbers.nbytes != size_bytes:
            raise ValueError("another shape")
        return count, numbers, position, epoch

    def _rows(self, body: bytes, numbers: bytes | memoryview, brackets: int) -> FloatRows:
        """Rows [T, F] of flattened numbers.

        Args:
            brackets: how many opening ones the body has if no row holds a list.

        Raises:
            ValueError: a number is too large, or a row holds a list.
        """
        # `replace` finds rare bytes three times as fast as `count`; there are none elsewhere
        if len(body) - len(body.replace(b"[", b"")) != brackets:
            raise ValueError("lists within rows")
        flat = np.frombuffer(numbers, _F8)
        run, is_short = self._ignoring_overflow.run, flat.size <= MAX_DOT
        squares: Any = run(flat.dot, flat) if is_short else run(_sum_of_squares, flat)
        if not squares < _LARGEST_SQUARES:
            raise ValueError("a number is too large")
        return flat.astype(_F4).reshape(-1, self._features)


def _sum_of_squares(values: NDArray[np.float64]) -> float:
    return float(np.square(values).sum())


def _stream(members: simdjson.Object) -> str | None:
    """The stream that a frame names.

    Raises:
        ValueError
    """
    stream = members.get("stream")
    if stream is not None and type(stream) is not str:
        raise ValueError("another stream")
    return stream


def _frame_id(members: simdjson.Object) -> str | int | None:
    """The id of a frame.

    Raises:
        ValueError
    """
    frame_id = members.get("id")
    is_text = type(frame_id) is str and len(frame_id) <= MAX_FRAME_ID_CHARS
    if not (frame_id is None or is_text or (type(frame_id) is int and frame_id < 2**63)):
        raise ValueError("another id")
    return frame_id  # type: ignore[return-value]
