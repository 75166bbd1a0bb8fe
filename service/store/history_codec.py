"""Bytes of a stream's history in the store: an entry of each recent chunk, its events as they came.

An entry, all little-endian, with T events:

    offset  size  what
         0     8  start position, u64
         8     4  T, u32
        12     1  flags: bit 0 the feed is `inputs` (else `events`), bit 1 the chunk is final, bit 2
                  a rate of alarms is given, bit 3 the client resets the state, bit 4 the state
                  before the entry is the initial one
        13     4  CRC-32 over every other byte, u32
        17     8  the rate of alarms, f64, if bit 2 is set
               4  R, u32, then R indexes of resets, u32 each, if bit 3 is set
               4  CRC-32 of the names and kinds of the fields, or F for `inputs`, u32
               -  canonical bytes of the events (`models.events.columns`), or T F float32 values

Events are stored as they came, with the strings of categories, not their codes: another version of
the model, with other statistics and vocabularies, reads them if its fields have the same names,
kinds and order. A chunk of more events than a history keeps has an entry of its last ones.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from models.events.columns import BoolArray, EventColumns, canonical_bytes
from models.events.schema import EventSchema
from service.core.values import Feed, Steps
from service.store.layout import CodecError

_LEAD: Final = struct.Struct("<QIB")
_CRC: Final = struct.Struct("<I")
_COUNT: Final = struct.Struct("<I")
_RATE: Final = struct.Struct("<d")
_HEADER_BYTES: Final = _LEAD.size + _CRC.size
_F4: Final = np.dtype("<f4")
_LENGTH: Final = np.dtype("<u4")
_DTYPES: Final = {
    "numeric": np.dtype("<f8"), "timestamp": np.dtype("<i8"), "boolean": np.dtype("?")
}  # fmt: skip
"""Of the values of a field; a categorical one has lengths and then strings."""

_FIELD_BYTES: Final = {"numeric": 9, "timestamp": 9, "boolean": 2, "categorical": 5}
"""Bytes of a value with its presence, without those of a string."""

_STRING_BYTES: Final = 8
"""Bytes of a category, as they are estimated."""

_IS_INPUTS: Final = 1
_IS_FINAL: Final = 2
_HAS_RATE: Final = 4
_HAS_RESETS: Final = 8
_STARTS: Final = 16


class HistoryEntry(NamedTuple):
    """The events of one chunk, or its last ones.

    Attributes:
        start: position of the first event.
        final: whether the chunk closed the stream.
        starts: whether the state before it is the initial one: the chunk created the stream.
    """

    start: int
    steps: Steps
    final: bool = False
    starts: bool = False

    @property
    def stop(self) -> int:
        """The position after the last event."""
        return self.start + self.steps.length

    def cut(self, first: int, stop: int) -> HistoryEntry:
        """The events of a range of positions inside the entry, without its end if it is cut."""
        steps, at = self.steps, slice(first - self.start, stop - self.start)
        cut = replace(
            steps,
            length=stop - first,
            columns=None if steps.columns is None else steps.columns[at],
            rows=None if steps.rows is None else steps.rows[at],
            resets=tuple([each - at.start for each in steps.resets if at.start <= each < at.stop]),
        )
        return HistoryEntry(
            first, cut, self.final and stop == self.stop, self.starts and first == self.start
        )


class _Encoded(NamedTuple):
    """An entry whose events are not decoded.

    Attributes:
        at: where its events begin.
    """

    value: bytes
    positions: range
    flags: int
    rate: float | None
    resets: tuple[int, ...]
    at: int


def read_range(value: bytes) -> range:
    """The positions of an entry's events, without decoding the rest.

    Raises:
        CodecError: it is too short.
    """
    if len(value) < _HEADER_BYTES:
        raise CodecError(f"expected at least {_HEADER_BYTES} bytes, got {len(value)}")
    start, count, _ = _LEAD.unpack_from(value)
    return range(start, start + count)


def entries_from(entries: Sequence[bytes], position: int) -> Sequence[bytes]:
    """The entries of a stream that end at a position or after it.

    It reads few of them: they follow one another, and there may be tens of thousands.

    Raises:
        CodecError: one is too short.
    """
    return entries[bisect_left(entries, position, key=_read_stop) :]


def _read_stop(value: bytes) -> int:
    return read_range(value).stop


class HistoryCodec:
    """Encodes and decodes the entries of one model's streams.

    Args:
        schema: the event schema; None if the model takes `inputs` only.
        features: F, the values of a row of `inputs`.
    """

    def __init__(self, schema: EventSchema | None, features: int):
        self._schema = schema
        self._features = features
        fields = [] if schema is None else [f"{field.name}:{field.kind}" for field in schema.fields]
        self._fields = _CRC.pack(zlib.crc32(",".join(fields).encode()))
        self._width = _COUNT.pack(features)

    def estimate_bytes(self, events: int, chunk_events: int = 1) -> int:
        """Estimate the bytes of the entries of some events, in chunks of a size."""
        kinds = [] if self._schema is None else [field.kind for field in self._schema.fields]
        event = sum(map(_FIELD_BYTES.__getitem__, kinds)) or _F4.itemsize * self._features
        event += _STRING_BYTES * kinds.count("categorical")
        return events * event + -(-events // chunk_events) * (_HEADER_BYTES + _COUNT.size)

    def encode(
        self, start: int, steps: Steps, *, final: bool = False, starts: bool = False
    ) -> bytes:
        """Encode the events of a chunk.

        Args:
            start: position of its first event.
            starts: whether it created its stream.
        """
        rate, resets, rows = steps.false_alarms_per_day, steps.resets, steps.rows
        flags = (_IS_FINAL if final else 0) | (_STARTS if starts else 0)
        parts: list[bytes] = []
        if rate is not None:
            flags |= _HAS_RATE
            parts.append(_RATE.pack(rate))
        if resets:
            flags |= _HAS_RESETS
            parts.append(struct.pack(f"<{1 + len(resets)}I", len(resets), *resets))
        if rows is not None:
            flags |= _IS_INPUTS
            parts += (self._width, rows.astype(_F4, copy=False).tobytes())
        elif steps.columns is not None and self._schema is not None:
            parts += (self._fields, canonical_bytes(self._schema, steps.columns))
        else:
            raise CodecError("expected columns under a schema, or rows")
        lead, body = _LEAD.pack(start, steps.length, flags), b"".join(parts)
        return b"".join((lead, _CRC.pack(zlib.crc32(body, zlib.crc32(lead))), body))

    def encode_last(
        self, start: int, steps: Steps, most: int, *, final: bool = False, starts: bool = False
    ) -> bytes:
        """Encode the last events of a chunk, at most `most`; as `encode`."""
        if steps.length > most:
            entry = HistoryEntry(start, steps, final, starts)
            start, steps, final, starts = entry.cut(entry.stop - most, entry.stop)
        return self.encode(start, steps, final=final, starts=starts)

    def decode(self, value: bytes) -> HistoryEntry:
        """Decode an entry; arrays are read-only.

        Raises:
            CodecError: the bytes are damaged, or its events have other fields than the schema.
        """
        return self._build([self._read(value)])

    def decode_joined(self, values: Iterable[bytes], most: int) -> Iterator[HistoryEntry]:
        """Decode entries, each of which follows the one before, joined to entries of at most
        `most` events, unless one of them has more; raises as `decode`.

        Entries with different rates of alarms are not joined. It takes a third of the time if each
        entry has one event.
        """
        parts: list[_Encoded] = []
        for value in values:
            part = self._read(value)
            if parts and not (
                part.positions.start == parts[-1].positions.stop
                and part.positions.stop - parts[0].positions.start <= most
                and part.rate == parts[0].rate
                and not (part.flags ^ parts[0].flags) & _IS_INPUTS
            ):
                yield self._build(parts)
                parts = []
            parts.append(part)
        if parts:
            yield self._build(parts)

    def _read(self, value: bytes) -> _Encoded:
        """Read the parts of an entry in front of its events."""
        positions, flags = read_range(value), value[_LEAD.size - 1]
        crc = zlib.crc32(value[_HEADER_BYTES:], zlib.crc32(value[: _LEAD.size]))
        if value[_LEAD.size : _HEADER_BYTES] != _CRC.pack(crc):
            raise CodecError("wrong checksum of an entry of the history")
        at, rate, resets = _HEADER_BYTES, None, ()
        try:
            if flags & _HAS_RATE:
                (rate,) = _RATE.unpack_from(value, at)
                at += _RATE.size
            if flags & _HAS_RESETS:
                (size,) = _COUNT.unpack_from(value, at)
                resets = struct.unpack_from(f"<{size}I", value, at + _COUNT.size)
                at += _COUNT.size * (1 + size)
        except struct.error as error:
            raise CodecError(f"an entry of the history is invalid: {error}") from error
        kind, at = value[at : at + _COUNT.size], at + _COUNT.size
        if flags & _IS_INPUTS:
            if kind != self._width:
                raise CodecError(f"expected rows of {self._features} features in the history")
        elif self._schema is None or kind != self._fields:
            raise CodecError("the events of the history have other fields than the model")
        return _Encoded(value, positions, flags, rate, resets, at)

    def _build(self, parts: Sequence[_Encoded]) -> HistoryEntry:
        """The events of consecutive entries."""
        first, last = parts[0], parts[-1]
        start, count = first.positions.start, last.positions.stop - first.positions.start
        columns, rows, feed = None, None, Feed.EVENTS
        try:
            if first.flags & _IS_INPUTS:
                feed = Feed.INPUTS
                data = b"".join([part.value[part.at :] for part in parts])
                rows = np.frombuffer(data, _F4).reshape(count, self._features)
            elif self._schema is not None:
                columns = _read_columns(self._schema, count, parts)
        except (struct.error, ValueError) as error:
            raise CodecError(f"an entry of the history is invalid: {error}") from error
        resets = tuple([part.positions.start - start + at for part in parts for at in part.resets])
        steps = Steps(feed, count, columns, rows, resets, first.rate)
        return HistoryEntry(start, steps, bool(last.flags & _IS_FINAL), bool(first.flags & _STARTS))

    def keep_until(self, entries: Sequence[bytes], position: int) -> list[bytes]:
        """The entries up to a position, at most the stream's: the last one may be cut.

        Raises:
            CodecError: the entry to cut cannot be decoded.
        """
        count = bisect_right(entries, position, key=_read_stop)
        kept = [*entries[:count]]
        if count < len(entries) and (first := read_range(entries[count]).start) < position:
            start, steps, final, starts = self.decode(entries[count]).cut(first, position)
            kept.append(self.encode(start, steps, final=final, starts=starts))
        return kept


def _read_columns(schema: EventSchema, count: int, parts: Sequence[_Encoded]) -> EventColumns:
    """Decode the canonical bytes of entries, with which their values end."""
    present: dict[str, BoolArray] = {}
    values: dict[str, NDArray[Any]] = {}
    sources = [(part.value, len(part.positions)) for part in parts]
    places = [part.at for part in parts]
    for field in schema.fields:
        dtype = _DTYPES.get(field.kind, _LENGTH)
        marks: list[bytes] = []
        numbers: list[bytes] = []
        strings: list[str] = []
        for index, (value, steps) in enumerate(sources):
            start = places[index] + steps
            stop = start + steps * dtype.itemsize
            marks.append(value[places[index] : start])
            numbers.append(value[start:stop])
            if dtype is _LENGTH:
                for length in struct.unpack(f"<{steps}I", numbers[-1]):
                    strings.append(value[stop : stop + length].decode())
                    stop += length
            places[index] = stop
        present[field.name] = np.frombuffer(b"".join(marks), np.bool_, count)
        values[field.name] = (
            np.array(strings, object)
            if dtype is _LENGTH
            else np.frombuffer(b"".join(numbers), dtype, count)
        )
    for place, (value, _) in zip(places, sources, strict=True):
        if place != len(value):
            raise CodecError(f"expected {place} bytes in an entry of the history, got {len(value)}")
    return EventColumns(count, present, values)
