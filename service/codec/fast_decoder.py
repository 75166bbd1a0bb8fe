"""Fast decoder: from the bytes of a valid body to steps in one pass, or None.

The usual chunks in JSON, of rows, are decoded by simdjson (`JsonRowsDecoder`). For all else each
model has msgspec types, whose decoders check members, numbers, widths and lengths while they parse,
in C. All the rows of a body then become one float32 buffer. The decoder accepts only what the
strict validator accepts, with the same values, and never makes an error: if it returns None, the
strict validator decides.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from contextvars import Context
from itertools import chain, pairwise, permutations
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
import simdjson
from msgspec import Meta
from msgspec.structs import astuple, replace
from numpy.typing import NDArray

from models.errors import DataError
from models.events.encode import check_rows
from models.events.parse import RESET
from models.events.reader import EventReader
from service.codec.duplicates import (
    PACKED_PARTS,
    UndecidedError,
    check_no_duplicates,
)
from service.codec.field_rules import EPOCH, MAX_POSITION
from service.codec.media import Media
from service.codec.settings import RequestSettings
from service.codec.strict_validator import decode_token
from service.core.values import Feed, FloatRows, SequenceInput, Steps, is_stream_name
from service.pipeline.served_model import ServedModel

_F4 = np.dtype("<f4")

MAX_BYTES: Final = 256 * 1024
"""Longest body that simdjson parses: its parser keeps its memory."""

_F8: Final = np.dtype(np.float64)
_INPUTS: Final = b'"inputs"'
_RESET: Final = RESET.encode()
_NEAR_BEGIN: Final = 96
"""A chunk of rows has `inputs` within this many bytes; other bodies are not parsed by simdjson."""


def _orders(*names: str) -> frozenset[tuple[str, ...]]:
    """The orders in which an object may have some of these members, and always `inputs`."""
    counts = range(1, len(names) + 1)
    orders = chain.from_iterable(permutations(names, count) for count in counts)
    return frozenset(order for order in orders if "inputs" in order)


_MEMBERS: Final = _orders("inputs", "position", "epoch")
_ITEM_MEMBERS: Final = _orders("inputs", "position", "epoch", "stream")
_NEAR_BEGIN_OF_ITEMS: Final = 512
MAX_DOT: Final = 10_000
"""Largest `dot` that OpenBLAS computes in the calling thread alone; waiting for its other threads
may take milliseconds."""

_LARGEST_SQUARES: Final = 1e76
"""A sum of squares below this has no member that overflows float32."""

_PARSER_ERRORS: Final = (ValueError, TypeError, KeyError, RuntimeError)
"""What simdjson raises for malformed JSON, and for a list of values other than numbers."""

_is_epoch: Final = re.compile(EPOCH).fullmatch

_Position = Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None
_Resets = list[Annotated[int, Meta(ge=0, le=MAX_POSITION)]] | None
_Epoch = Annotated[str, Meta(pattern=rf"^{EPOCH}\Z")] | None


class DecodedSteps(msgspec.Struct):
    """Events or rows; an absent member is None."""

    inputs: Any
    events: Any
    resets: list[int] | None
    false_alarms_per_day: float | None


class DecodedSequence(DecodedSteps):
    """A sequence to predict; its token is a string in JSON."""

    state_token: str | bytes | None


class DecodedChunk(DecodedSteps):
    """A chunk's body."""

    position: int | None
    epoch: str | None


class DecodedItem(DecodedChunk):
    """A chunk in a body for many streams."""

    stream: str
    if_match: str | None


UNDECIDED: Final = (
    UndecidedError, msgspec.MsgspecError, DataError, OverflowError, ValueError
)  # fmt: skip
"""Errors that are raised for a body that only the strict validator can accept or reject."""


class _Decoders(NamedTuple):
    chunk: Any
    many: Any
    predict: Any


class RowsChunk(msgspec.Struct, gc=False):
    """A chunk of rows.

    Attributes:
        rows: float32 [T, F], finite.
        stream: in a body for many streams.
    """

    rows: FloatRows
    position: int | None
    epoch: str | None
    stream: str = ""
    if_match: None = None


class JsonRowsDecoder:
    """Decodes chunks of rows in JSON with simdjson: into one array, without an object per number.

    For the usual chunks of one model: `inputs`, with `position` and `epoch` or without. simdjson
    flattens any list, so the shape is checked here: as many lists as rows, each as wide as the
    model's rows, and no list within a row. Use from one thread.

    Args:
        features: F, numbers in a row.
        max_rows: most rows in one text.
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
            rows = self._rows(body, numbers, 1 + count)
        except _PARSER_ERRORS:
            return None
        return None if rows is None else RowsChunk(rows, position, epoch)

    def decode_items(self, body: bytes, max_items: int) -> list[RowsChunk] | None:
        """The chunks of a body for many streams; None if one is no chunk of rows in the usual
        form. Their rows are views of one array."""
        is_usual = body[:1] == b"{" and body.find(_INPUTS, 0, _NEAR_BEGIN_OF_ITEMS) > 0
        if not is_usual or len(body) > MAX_BYTES:
            return None
        try:
            members = self._parser.parse(body)
            if not isinstance(members, simdjson.Object) or tuple(members) != ("chunks",):
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
        if rows is None:
            return None
        items: list[RowsChunk] = []
        end = 0
        for stream, (count, _, position, epoch) in zip(streams, read, strict=True):
            start, end = end, end + count
            items.append(RowsChunk(rows[start:end], position, epoch, stream))
        return items

    def _read(
        self, members: simdjson.Object, orders: frozenset[tuple[str, ...]]
    ) -> tuple[int, memoryview, int | None, str | None]:
        """Read a chunk: the number of rows, their values (float64), the position and the epoch.

        Raises:
            ValueError, TypeError, KeyError: it is not in the usual form.
        """
        # no duplicate member is in any of these
        names = tuple(members)
        if names not in orders:
            raise ValueError("other members")
        position = members["position"] if "position" in names else None
        if position is not None and not (type(position) is int and 0 <= position <= MAX_POSITION):
            raise ValueError("another position")
        epoch = members["epoch"] if "epoch" in names else None
        if epoch is not None and not (type(epoch) is str and _is_epoch(epoch)):
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

    def _rows(self, body: bytes, numbers: bytes | memoryview, brackets: int) -> FloatRows | None:
        """Rows [T, F] of flattened numbers; None if one is too large, or a row holds a list.

        Args:
            brackets: how many opening ones the body has if no row holds a list.
        """
        # `replace` finds rare bytes three times as fast as `count`; there are none elsewhere
        if len(body) - len(body.replace(b"[", b"")) != brackets:
            return None
        flat = np.frombuffer(numbers, _F8)
        run, is_short = self._ignoring_overflow.run, flat.size <= MAX_DOT
        squares: Any = run(flat.dot, flat) if is_short else run(_sum_of_squares, flat)
        if not squares < _LARGEST_SQUARES:
            return None
        return flat.astype(_F4).reshape(-1, self._features)


def _sum_of_squares(values: NDArray[np.float64]) -> float:
    return float(np.square(values).sum())


class FastDecoder:
    """Decodes valid bodies of one model.

    Args:
        limits: those of the model.
    """

    def __init__(self, served: ServedModel, limits: RequestSettings):
        self._columns = served.artifact.spec.columns
        self._features = len(self._columns)
        self._row_bytes = _F4.itemsize * self._features
        self._coded = any(column.codes is not None for column in self._columns)
        self._reader = None if served.events is None else EventReader(served.events)
        self._max_chunk_steps = limits.max_chunk_steps
        self._max_items = limits.max_items
        self._max_predict_steps = limits.max_predict_steps
        self._longest_sequence = served.chunk_limit or limits.max_predict_steps
        self._json_rows = JsonRowsDecoder(self._features, limits.max_chunk_steps)
        self._has_blocks = served.blocks is not None
        most = served.max_alarm_rate
        self._alarm_rate: Any = None
        if most is not None:
            self._alarm_rate = Annotated[float, Meta(gt=0, le=most)] | None
        event: Any = None if self._reader is None else self._reader.event
        self._decoders = {media: self._build_decoders(media, limits, event) for media in Media}
        self._reset_decoders = self._decoders
        if self._reader is not None and self._reader.marked_event is not None:
            event = self._reader.marked_event
            self._reset_decoders = {
                media: self._build_decoders(media, limits, event) for media in Media
            }

    def decode_chunk(
        self, media: Media, body: bytes
    ) -> tuple[DecodedChunk | RowsChunk, Steps] | None:
        """The one chunk of a body, or None."""
        try:
            if media is Media.JSON and (chunk := self._json_rows.decode_chunk(body)) is not None:
                rows = chunk.rows
                if self._coded:
                    check_rows(self._columns, rows)
                return chunk, Steps(Feed.INPUTS, len(rows), None, rows)
            decoded: DecodedChunk = self._decoders_of(media, body).chunk.decode(body)
            [steps] = self._check_chunks(self._read_parts(media, body, [decoded], [body]))
            return decoded, steps
        except UNDECIDED:
            return None

    def decode_rows(self, packed: bytes) -> Steps | None:
        """The steps of a chunk's rows, float32 in little-endian, row by row, or None."""
        count, rest = divmod(len(packed), self._row_bytes)
        if rest or not 0 < count <= self._max_chunk_steps:
            return None
        try:
            return Steps(Feed.INPUTS, count, None, self.check_rows(packed))
        except UNDECIDED:
            return None

    def decode_items(
        self, media: Media, body: bytes
    ) -> list[tuple[DecodedItem | RowsChunk, Steps]] | None:
        """The chunks of a body for many streams, if all are valid, or None."""
        try:
            if media is Media.JSON and (items := self.decode_rows_items(body)) is not None:
                return items
            decoded: list[DecodedItem] = self._decoders_of(media, body).many.decode(body).chunks
            if None in [is_stream_name(item.stream) for item in decoded]:
                return None
            parts = self._check_chunks(self._read_parts(media, body, decoded))
            return list(zip(decoded, parts, strict=True))
        except UNDECIDED:
            return None

    def decode_rows_items(self, body: bytes) -> list[tuple[DecodedItem | RowsChunk, Steps]] | None:
        """As `decode_items` in JSON, but only chunks of rows; raises DataError for a wrong code."""
        items = self._json_rows.decode_items(body, self._max_items)
        if items is None:
            return None
        if self._coded:
            check_rows(self._columns, np.concatenate([item.rows for item in items]))
        return [(item, Steps(Feed.INPUTS, len(item.rows), None, item.rows)) for item in items]

    def decode_sequences(self, media: Media, body: bytes) -> list[SequenceInput] | None:
        """The sequences of a body, or None."""
        try:
            decoded: list[DecodedSequence]
            decoded = self._decoders_of(media, body).predict.decode(body).sequences
            steps = self._read_parts(media, body, decoded)
            tokens = [_token(sequence.state_token) for sequence in decoded]
        except UNDECIDED:
            return None
        lengths = [sequence.length for sequence in steps]
        too_long = sum(lengths) > self._max_predict_steps or max(lengths) > self._longest_sequence
        return None if too_long else list(map(SequenceInput, steps, tokens))

    def _decoders_of(self, media: Media, body: bytes) -> _Decoders:
        """The decoders for a body; those of events with the member `reset` are slower."""
        return (self._reset_decoders if _RESET in body else self._decoders)[media]

    def _check_chunks(self, parts: list[Steps]) -> list[Steps]:
        if self._has_blocks and any(steps.resets for steps in parts):
            raise UndecidedError
        return parts

    def _read_parts(
        self,
        media: Media,
        body: bytes,
        decoded: Sequence[DecodedSteps],
        maps: Sequence[bytes | msgspec.Raw] = (),
    ) -> list[Steps]:
        """The steps of each chunk or sequence of a body without duplicate members. All their rows
        are views of one buffer, checked at once.

        Args:
            maps: the body, if it is one chunk; otherwise those of its list are found here.
        """
        values = list(map(astuple, decoded))
        members = sum([len(each) - each.count(None) for each in values]) + (not maps)
        strings = 0
        if media is Media.JSON:
            strings = sum([isinstance(value, str) for each in values for value in each])
        elif not maps:
            undecoded = PACKED_PARTS.decode(body)
            maps = [body, *undecoded.chunks, *undecoded.sequences]
        inputs = [part.inputs for part in decoded if part.inputs is not None]
        packed = inputs if media is Media.MSGPACK else list(map(_float32, inputs))
        rows, row_bytes = self.check_rows(b"".join(packed)), self._row_bytes
        lengths = iter(list(map(len, packed)))
        end = 0
        parts: list[Steps] = []
        for part in decoded:
            if part.inputs is None:
                steps, members_of_events, strings_of_events = self._read_events(part)
                members, strings = members + members_of_events, strings + strings_of_events
            else:
                length, rest = divmod(next(lengths), row_bytes)
                if rest or part.events is not None:
                    raise UndecidedError
                start, end = end, end + length
                steps = Steps(Feed.INPUTS, length, None, rows[start:end])
            if part.resets is not None or part.false_alarms_per_day is not None:
                steps = _with_options(steps, part)
            parts.append(steps)
        has_events = len(inputs) < len(decoded)
        check_no_duplicates(media, body, members, strings, maps, has_events=has_events)
        return parts

    def check_rows(self, packed: bytes) -> FloatRows:
        """Decode packed rows to [T, F]; raises UndecidedError, DataError or ValueError."""
        rows = np.frombuffer(packed, _F4).reshape(-1, self._features)
        # takes half the time of `all()`
        if np.count_nonzero(np.isfinite(rows)) != rows.size:
            raise UndecidedError
        if self._coded:
            check_rows(self._columns, rows)
        return rows

    def _read_events(self, body: DecodedSteps) -> tuple[Steps, int, int]:
        """The steps of a body of events, and the numbers of members and strings in them."""
        if self._reader is None or body.events is None:
            raise UndecidedError
        read = self._reader.read(body.events)
        if read is None:
            raise UndecidedError
        steps = Steps(Feed.EVENTS, read.columns.steps, read.columns, None, read.resets)
        return steps, read.members, read.strings

    def _build_decoders(self, media: Media, limits: RequestSettings, event: Any) -> _Decoders:
        features, most = self._features, limits.max_chunk_steps
        if media is Media.JSON:
            row: Any = Annotated[list[float], Meta(min_length=features, max_length=features)]
            inputs: Any = Annotated[list[row], Meta(min_length=1, max_length=most)]
        else:
            row_bytes = self._row_bytes
            inputs = Annotated[bytes, Meta(min_length=row_bytes, max_length=row_bytes * most)]
        events: Any = None
        if event is not None:
            events = Annotated[list[event], Meta(min_length=1, max_length=most)] | None
        steps: list[Any] = [("inputs", inputs | None, None), ("events", events, None)]
        steps.append(("resets", _Resets, None))
        steps.append(("false_alarms_per_day", self._alarm_rate, None))
        chunk = [
            *steps,
            ("position", _Position, None),
            ("epoch", _Epoch, None),
        ]
        item = _struct(DecodedItem, [*chunk, ("stream", str), ("if_match", str | None, None)])
        items = Annotated[list[item], Meta(max_length=limits.max_items)]  # type: ignore[valid-type]
        token: Any = str if media is Media.JSON else bytes
        sequence = _struct(DecodedSequence, [*steps, ("state_token", token | None, None)])
        sequences = Annotated[
            list[sequence],  # type: ignore[valid-type]
            Meta(min_length=1, max_length=limits.max_items),
        ]
        decoder: Any = msgspec.json.Decoder if media is Media.JSON else msgspec.msgpack.Decoder
        return _Decoders(
            decoder(_struct(DecodedChunk, chunk)),
            decoder(_struct(msgspec.Struct, [("chunks", items)])),
            decoder(_struct(msgspec.Struct, [("sequences", sequences)])),
        )


def _struct(base: type[msgspec.Struct], members: list[Any]) -> type[msgspec.Struct]:
    # gc=False: a decoded body holds no cycles to collect
    return msgspec.defstruct(
        "Decoded", members, bases=(base,), forbid_unknown_fields=True, kw_only=True, gc=False
    )


def _token(value: str | bytes | None) -> bytes | None:
    if not isinstance(value, str):
        return value
    token = decode_token(value)
    if token is None:
        raise UndecidedError
    return token


def _with_options(steps: Steps, body: DecodedSteps) -> Steps:
    """Add the members `resets` and `false_alarms_per_day` of a body."""
    resets = body.resets or []
    ascending = all(first < second for first, second in pairwise(resets))
    if not ascending or (resets and resets[-1] >= steps.length):
        raise UndecidedError
    merged = tuple(sorted({*resets, *steps.resets}))
    return replace(steps, resets=merged, false_alarms_per_day=body.false_alarms_per_day)


def _float32(rows: list[list[float]]) -> bytes:
    """Rows as float32, little-endian, row by row.

    Raises:
        OverflowError: a number does not fit.
    """
    count = len(rows) * len(rows[0])
    return struct.pack(f"<{count}f", *chain.from_iterable(rows))
