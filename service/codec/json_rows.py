"""Decoder of chunks of rows in JSON, in the usual form, by simdjson.

It makes one array of all numbers, without an object for each, and makes no errors: what it does not
accept, because it is invalid or only unusual, is decoded by `decoding`. Both give the same values
for what both accept. Where simdjson has no wheel (Python 3.14) it accepts nothing.
"""

from __future__ import annotations

from contextvars import Context
from itertools import chain, permutations
from typing import Any, Final

import msgspec
import numpy as np

from models.spec.stream_name import is_stream_name
from service.codec.field_rules import MAX_FRAME_ID_CHARS, MAX_POSITION, is_epoch
from service.core.values import Feed, FloatRows, Steps

try:
    from simdjson import Array, Object, Parser
except ImportError:  # on Python 3.14

    class Parser:  # type: ignore[no-redef]
        """Parses no body."""

        def parse(self, body: bytes) -> Any:
            """Raises ValueError."""
            raise ValueError("simdjson is not installed")


MAX_BYTES: Final = 256 * 1024
"""Longest body for the parser of each model, which keeps the memory of the longest. Longer ones
share one parser, and their numbers are checked, since simdjson takes up to 0.5 us for a byte of
hostile ones."""

MAX_LONG_BYTES: Final = 2 * 2**20
"""Longest body that simdjson parses; longer ones are decoded in another thread."""

MAX_EXPONENTS: Final = 4096
"""Most numbers with an exponent in a long body. simdjson takes up to 8 us for one of many digits,
and at most 50 ns for a byte of numbers without exponents, however many digits they have."""

MAX_NUMBER_BYTES: Final = 64
"""Most bytes for each number of a list whose length is known: of a longer list simdjson would parse
more numbers than it may have."""

_F4: Final = np.dtype("<f4")
_F8: Final = np.dtype(np.float64)
_INPUTS: Final = b'"inputs"'
_NEAR_BEGIN: Final = 512
"""A body of rows has `inputs` within this many bytes; other bodies are not parsed by simdjson."""


def _orders(*names: str) -> frozenset[tuple[str, ...]]:
    """The orders in which an object may have some of these members, and always `inputs`."""
    counts = range(1, len(names) + 1)
    orders = chain.from_iterable(permutations(names, count) for count in counts)
    return frozenset(order for order in orders if "inputs" in order)


CHUNK_MEMBERS: Final = _orders("inputs", "position", "epoch")
FRAME_MEMBERS: Final = _orders("inputs", "position", "epoch", "stream", "id")
_ITEM_MEMBERS: Final = _orders("inputs", "position", "epoch", "stream")
_PARSER_ERRORS: Final = (ValueError, TypeError, KeyError, RuntimeError)
"""What simdjson raises for malformed JSON, and for a list of values other than numbers."""


_LONG_PARSER: Final = Parser()
"""The parser of the long bodies of all models, which keeps up to 32 MiB. A parser for each body
would be filled with new pages of memory each time, which takes as long as parsing."""


def _parse_long(body: bytes) -> Any:
    """Parse a long body.

    Raises:
        ValueError: it is not JSON, or may take too long.
    """
    if sum([len(body) - len(body.replace(each, b"")) for each in (b"e", b"E")]) > MAX_EXPONENTS:
        raise ValueError("perhaps hostile numbers")
    return _LONG_PARSER.parse(body)


class RowsChunk(msgspec.Struct, gc=False):
    """A chunk of rows.

    Attributes:
        steps: of rows, finite.
        stream: in a body for many streams, and in a frame that names one.
        id: of a frame.
    """

    steps: Steps
    position: int | None
    epoch: str | None
    stream: str | None = None
    id: str | int | None = None


class JsonRowsDecoder:
    """Decodes chunks of rows in JSON with simdjson: into one array, without an object per number.

    For the usual chunks of one model: `inputs`, with `position` and `epoch` or without. simdjson
    flattens any list, so the shape is checked here: as many lists as rows, each as wide as the
    model's rows, and no list within a row. Use from one thread.

    Args:
        features: F, numbers in a row.
        max_rows: maximum rows in one chunk.
    """

    def __init__(self, features: int, max_rows: int):
        self._features = features
        self._max_rows = max_rows
        self._parser = Parser()
        # entering `np.errstate` for each body would cost twice as much as the call in it
        self._ignoring_overflow = Context()
        self._ignoring_overflow.run(np.seterr, over="ignore")

    def decode(
        self, body: bytes, orders: frozenset[tuple[str, ...]] = CHUNK_MEMBERS
    ) -> RowsChunk | None:
        """The chunk of a body; None if it is not a valid chunk of rows in the usual form.

        Args:
            orders: of its members; those of a live socket's frame are `FRAME_MEMBERS`.
        """
        # simdjson would skip a byte order mark
        is_usual = body[:1] == b"{" and body.find(_INPUTS, 0, _NEAR_BEGIN) > 0
        if not is_usual or len(body) > MAX_LONG_BYTES:
            return None
        try:
            is_long = len(body) > MAX_BYTES
            members: Any = _parse_long(body) if is_long else self._parser.parse(body)
            lists, position, epoch = self._read(members, orders)
            count = len(lists)
            rows = self._rows(body, self._numbers(lists), 1 + count)
            chunk = RowsChunk(Steps(Feed.INPUTS, count, None, rows), position, epoch)
            if orders is FRAME_MEMBERS:
                chunk.stream, chunk.id = members.get("stream"), members.get("id")
                if not (isinstance(chunk.stream, str | None) and _is_frame_id(chunk.id)):
                    return None
        except _PARSER_ERRORS:
            return None
        return chunk

    def decode_items(self, body: bytes, max_items: int) -> list[RowsChunk] | None:
        """The chunks of a body for many streams, whose rows are views of one array; None if one is
        no chunk of rows in the usual form."""
        is_usual = body[:1] == b"{" and body.find(_INPUTS, 0, _NEAR_BEGIN) > 0
        if not is_usual or len(body) > MAX_LONG_BYTES:
            return None
        try:
            is_long = len(body) > MAX_BYTES
            members: Any = _parse_long(body) if is_long else self._parser.parse(body)
            if tuple(members) != ("chunks",):
                return None
            chunks = members["chunks"]
            if not isinstance(chunks, Array) or not 0 < len(chunks) <= max_items:
                return None
            streams: list[str] = []
            read: list[tuple[int, memoryview, int | None, str | None]] = []
            for item in chunks:
                if not isinstance(item, Object):
                    return None
                lists, position, epoch = self._read(item, _ITEM_MEMBERS)
                read.append((len(lists), self._numbers(lists), position, epoch))
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
            steps = Steps(Feed.INPUTS, count, None, rows[start:end])
            items.append(RowsChunk(steps, position, epoch, stream))
        return items

    def decode_values(self, text: bytes, count: int, *, has_batch: bool) -> Steps | None:
        """The steps of a list of `count` rows, or of the numbers in them; None for another list.

        Args:
            has_batch: whether the list of rows may be in a further list, alone.
        """
        if len(text) > MAX_NUMBER_BYTES * count * self._features:
            return None
        try:
            lists: Any = self._parser.parse(text)
            brackets = 1
            if text.find(b"[", 1) < 0:
                numbers = memoryview(lists.as_buffer(of_type="d"))
            else:
                is_batch = has_batch and len(lists) == 1 and len(lists[0]) == count
                numbers = self._numbers(lists[0] if is_batch else lists)
                brackets += is_batch + count
            if numbers.nbytes != count * self._features * _F8.itemsize:
                return None
            return Steps(Feed.INPUTS, count, None, self._rows(text, numbers, brackets))
        except _PARSER_ERRORS:
            return None

    def _read(
        self, members: Object, orders: frozenset[tuple[str, ...]]
    ) -> tuple[Array, int | None, str | None]:
        """Read a chunk: its rows, the position and the epoch.

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
        if not isinstance(lists, Array):
            raise ValueError("no list of rows")
        return lists, position, epoch

    def _numbers(self, lists: Array) -> memoryview:
        """The values (float64) of the rows of a chunk, or of some of them.

        Raises:
            ValueError, TypeError: the rows have another width, or are too many.
        """
        count, numbers = len(lists), memoryview(lists.as_buffer(of_type="d"))
        is_shaped = set(map(len, lists)) == {self._features}  # type: ignore[arg-type]
        size_bytes = count * self._features * _F8.itemsize
        if not 0 < count <= self._max_rows or not is_shaped or numbers.nbytes != size_bytes:
            raise ValueError("another shape")
        return numbers

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
        rows = self._ignoring_overflow.run(np.frombuffer(numbers, _F8).astype, _F4)
        # takes a third of the time of `all()`
        if b"\0" in np.isfinite(rows).tobytes():
            raise ValueError("a number is too large")
        return rows.reshape(-1, self._features)


def _is_frame_id(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_FRAME_ID_CHARS
    return value is None or (type(value) is int and value < 2**63)
