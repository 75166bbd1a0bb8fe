"""Validated events as columns, shared by encoding, digests and training.

`EventColumns` has one array per field, so that all processing after parsing is vectorised. A chunk
is often short, and then a NumPy call costs more than its numbers: so a `Block` stores the fields of
a chunk in one float64 matrix, ordered by encoding step, and each step of encoding is one call for
all fields. Its `BlockLayout` is derived from the schema once. Events of requests stay in the block
that the reader made; their columns are views of it.

Nothing is validated here: events come from a decoder or a table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.events.schema import (
    UNKNOWN_CODE,
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)
from models.events.statistics import FieldStatistics

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
DoubleArray = NDArray[np.float64]

GAP_ROW = 0
"""The row of the gap in `Block.numbers`, in a schema with a timestamp."""


class Codes(dict[str | None, int]):
    """Maps the categories of a field to codes, and None if the field is optional."""

    def __missing__(self, category: str | None) -> int:
        return UNKNOWN_CODE


class FieldPosition(NamedTuple):
    """Position of a field in a block.

    Attributes:
        field: the field of the schema.
        row: its row of `numbers`; the gap's for the timestamp.
        string: index in `strings` of a categorical field.
        absent: row of `absent` of an optional field.
    """

    field: EventField
    row: int
    string: int | None
    absent: int | None


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayout:
    """Layout of a schema's blocks, and parameters of its encoding.

    The K rows of `numbers` are the gap, the numerics under a signed logarithm, the other
    numerics, the booleans, the codes of the categoricals, and an indicator for each optional field
    of another kind, 1 if it is absent. With the calendar features and the statistics of the stream
    they are the encoded columns.

    Attributes:
        schema: the event schema.
        positions: positions of the fields by name, in the order of the schema.
        time: position of the timestamp, or None.
        value_fields: for each row of `numbers` with values, from after the gap to before
            the first indicator, the index of its field in the schema.
        codes: codes of the categoricals, in the order of their rows.
        optionals: number of rows of `Block.absent`: for the M optional fields of `missing`, in
            their order, then for the optional categoricals.
        logs: number of leading rows that are transformed by the signed logarithm.
        fitted: whether all numbers are fitted; otherwise mean and std are unknown.
        mean, std: float64 [K, 1]; a row is encoded as (row - mean) / std.
        columns: int [K], the encoded column of each row.
        calendar: the columns of the calendar; empty without a timestamp.
        statistics: the fields that are encoded by the stream's own values.
        missing: the M rows of `numbers` with indicators of absence.
        blanked: int [M], the rows of `numbers` that are encoded as 0 if absent.
    """

    schema: EventSchema
    positions: Mapping[str, FieldPosition]
    time: FieldPosition | None
    value_fields: tuple[int, ...]
    codes: tuple[Codes, ...]
    optionals: int
    logs: int
    fitted: bool
    mean: DoubleArray
    std: DoubleArray
    columns: IntArray
    calendar: slice
    statistics: tuple[FieldStatistics, ...]
    missing: slice
    blanked: IntArray

    @property
    def values(self) -> slice:
        """The rows of `numbers` with values: neither the gap nor indicators of absence."""
        return slice(0 if self.time is None else GAP_ROW + 1, self.missing.start)


class Block(NamedTuple):
    """T events in a layout.

    Attributes:
        layout: the layout of the arrays.
        steps: T.
        numbers: float64 [K, T], without negative zeros; 0 in the row of the gap and for absent
            values, and the absent code for an absent category.
        strings: T strings for each categorical; "" if absent.
        times_ms: int64 [T], epoch milliseconds, 0 if absent; None without a timestamp.
        absent: bool [optionals, T]; None if nothing is absent.
    """

    layout: BlockLayout
    steps: int
    numbers: DoubleArray
    strings: tuple[Sequence[str], ...]
    times_ms: IntArray | None
    absent: BoolArray | None

    def cut(self, cut: slice) -> Block:
        """The events of a slice, as views."""
        numbers = self.numbers[:, cut]
        return Block(
            self.layout,
            numbers.shape[1],
            numbers,
            tuple(strings[cut] for strings in self.strings),
            None if self.times_ms is None else self.times_ms[cut],
            None if self.absent is None else self.absent[:, cut],
        )

    def presence(self, position: FieldPosition) -> BoolArray:
        """Whether each event has a value of a field, bool [T]."""
        if position.absent is None or self.absent is None:
            return np.ones(self.steps, np.bool_)
        return np.asarray(~self.absent[position.absent])

    def values(self, position: FieldPosition) -> NDArray[Any]:
        """The values [T] of a field, as in `EventColumns`."""
        if position.string is not None:
            return np.array(self.strings[position.string], object)
        if isinstance(position.field, TimestampField) and self.times_ms is not None:
            return self.times_ms
        row: DoubleArray = self.numbers[position.row]
        return row.astype(np.bool_) if isinstance(position.field, BooleanField) else row

    def canonical_bytes(self) -> bytes:
        """The canonical bytes; the format is described in `models.events.columns`."""
        numbers, row_bytes = self.numbers.astype("<f8", copy=False).tobytes(), 8 * self.steps
        everywhere = b"\1" * self.steps
        parts: list[bytes] = []
        for field, row, string, absent in self.layout.positions.values():
            if absent is None or self.absent is None:
                parts.append(everywhere)
            else:
                parts.append((~self.absent[absent]).tobytes())
            if string is not None:
                parts += _canonical_strings(self.strings[string])
            elif field.kind == "numeric":
                parts.append(numbers[row * row_bytes : (row + 1) * row_bytes])
            elif field.kind == "boolean":
                parts.append(self.numbers[row].astype(np.uint8).tobytes())
            elif self.times_ms is not None:
                parts.append(self.times_ms.astype("<i8", copy=False).tobytes())
        return b"".join(parts)


class LazyArrays(Mapping[str, NDArray[Any]]):
    """Arrays of fields by name, created on access."""

    __slots__ = ("_of", "_positions")

    def __init__(
        self, positions: Mapping[str, FieldPosition], of: Callable[[FieldPosition], NDArray[Any]]
    ):
        self._positions = positions
        self._of = of

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._of(self._positions[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


def _canonical_strings(strings: Sequence[str]) -> tuple[bytes, bytes]:
    """The lengths in UTF-8 bytes as uint32 LE, and the concatenated UTF-8 bytes."""
    joined = "".join(strings)
    lengths = map(len, strings) if joined.isascii() else (len(text.encode()) for text in strings)
    return struct.pack(f"<{len(strings)}I", *lengths), joined.encode()


@lru_cache(maxsize=64)
def layout_of(schema: EventSchema) -> BlockLayout:
    """The cached layout of a schema's blocks; each call hashes the schema."""
    return new_layout(schema)


def new_layout(schema: EventSchema) -> BlockLayout:
    """Compute the layout of a schema's blocks."""
    fields = schema.fields
    order = sorted(range(len(fields)), key=lambda index: _rank(fields[index]))
    strings = [index for index in order if isinstance(fields[index], CategoricalField)]
    optional = [index for index in order if fields[index].optional]
    # Categoricals have the last rows and no indicators.
    marked = [index for index in optional if index not in strings]
    starts = _starts(schema)
    positions = {
        field.name: FieldPosition(
            field,
            order.index(index),
            strings.index(index) if index in strings else None,
            optional.index(index) if index in optional else None,
        )
        for index, field in enumerate(fields)
    }
    scales = [_scale_of(fields[index]) for index in order] + [(0.0, 1.0)] * len(marked)
    columns = [starts[index] for index in order] + [starts[index + 1] - 1 for index in marked]
    time = positions[schema.timestamp.name] if schema.timestamp else None
    return BlockLayout(
        schema=schema,
        positions=positions,
        time=time,
        value_fields=tuple(order if time is None else order[GAP_ROW + 1 :]),
        codes=tuple(_codes(fields[index]) for index in strings),
        optionals=len(optional),
        logs=sum(_rank(field) <= _LOGARITHMIC for field in fields),
        fitted=all(f.fitted for f in fields if isinstance(f, NumericField | TimestampField)),
        mean=np.array([[mean] for mean, _ in scales], np.float64),
        std=np.array([[std] for _, std in scales], np.float64),
        columns=np.array(columns, np.int64),
        calendar=_calendar_columns(schema, starts),
        statistics=_statistics_of(schema, positions),
        missing=slice(len(order), len(columns)),
        blanked=np.array([order.index(index) for index in marked], np.int64),
    )


_LOGARITHMIC = 1


def _rank(field: EventField) -> int:
    """Sort key of a field's row."""
    match field:
        case TimestampField():
            return 0
        case NumericField(transform="signed_log1p"):
            return _LOGARITHMIC
        case NumericField():
            return 2
        case BooleanField():
            return 3
        case CategoricalField():
            return 4


def _scale_of(field: EventField) -> tuple[float | None, float | None]:
    match field:
        case TimestampField():
            return field.gap_mean, field.gap_std
        case NumericField(normalisation=None):
            return field.mean, field.std
    return 0.0, 1.0


def _statistics_of(
    schema: EventSchema, positions: Mapping[str, FieldPosition]
) -> tuple[FieldStatistics, ...]:
    found: list[FieldStatistics] = []
    word = 0
    for field in schema.fields:
        if isinstance(field, NumericField) and field.has_statistics:
            position = positions[field.name]
            found.append(FieldStatistics(schema, field, position.row, position.absent, word))
            word = found[-1].stop
    return tuple(found)


def _calendar_columns(schema: EventSchema, starts: list[int]) -> slice:
    if schema.timestamp is None:
        return slice(0, 0)
    first = starts[schema.fields.index(schema.timestamp)] + 1
    return slice(first, first + len(schema.timestamp.calendar_features))


def _codes(field: EventField) -> Codes:
    if not isinstance(field, CategoricalField):
        raise TypeError(f"expected a categorical field, got {field.kind}")
    codes = Codes(field.code_of)
    if field.optional:
        codes[None] = field.absent_code
    return codes


def _starts(schema: EventSchema) -> list[int]:
    """The first encoded column of each field, followed by the number of columns."""
    starts = [0]
    for field in schema.fields:
        width = len(field.features) if isinstance(field, TimestampField) else 1
        season = isinstance(field, NumericField) and field.season_events is not None
        missing = field.optional and not isinstance(field, CategoricalField)
        starts.append(starts[-1] + width + season + missing)
    return starts


@dataclass(frozen=True, slots=True, eq=False)
class EventColumns:
    """T events as columns.

    Attributes:
        steps: T.
        present: bool [T] for each field; all true for a required field.
        values: an array [T] for each field: float64 for a numeric (-0.0 becomes 0.0), int64
            epoch milliseconds for a timestamp, bool for a boolean, objects (str) for a
            categorical. Absent values are 0, false or "".
        block: the same events as a block for encoding and digests, if there is one.
    """

    steps: int
    present: Mapping[str, BoolArray]
    values: Mapping[str, NDArray[Any]]
    block: Block | None = None

    @classmethod
    def of_block(cls, block: Block) -> EventColumns:
        """The columns of a block, created on access."""
        positions = block.layout.positions
        return cls(
            block.steps,
            LazyArrays(positions, block.presence),
            LazyArrays(positions, block.values),
            block,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[EventColumns]) -> EventColumns:
        """The events of one or more parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        present, values = (
            {name: np.concatenate([columns[name] for columns in each]) for name in each[0]}
            for each in ([part.present for part in parts], [part.values for part in parts])
        )
        return cls(sum(map(len, parts)), present, values)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, cut: slice) -> EventColumns:
        """The events of a slice, as views."""
        if self.block is not None:
            return EventColumns.of_block(self.block.cut(cut))
        steps = len(range(*cut.indices(self.steps)))
        return EventColumns(
            steps,
            {name: array[cut] for name, array in self.present.items()},
            {name: array[cut] for name, array in self.values.items()},
        )

    def to_events(self) -> list[dict[str, Any]]:
        """The events as JSON values, without absent fields; timestamps are epoch milliseconds."""
        events: list[dict[str, Any]] = [{} for _ in range(self.steps)]
        for name in self.values:
            present, values = self.present[name].tolist(), self.values[name].tolist()
            for event, is_present, value in zip(events, present, values, strict=True):
                if is_present:
                    event[name] = value
        return events

    def take(self, rows: Sequence[int] | IntArray) -> EventColumns:
        """The events of some rows, in their order, as copies."""
        return EventColumns(
            len(rows),
            {name: array[rows] for name, array in self.present.items()},
            {name: array[rows] for name, array in self.values.items()},
        )


def block_of(schema: EventSchema, columns: EventColumns) -> Block:
    """The block of events under that schema: the one they came with, or one made here."""
    if columns.block is not None and columns.block.layout.schema is schema:
        return columns.block
    layout = layout_of(schema)
    numbers = np.zeros((len(layout.columns), columns.steps))
    absent = np.zeros((layout.optionals, columns.steps), np.bool_)
    strings: list[list[str]] = [[] for _ in layout.codes]
    times_ms = None
    for name, position in layout.positions.items():
        values = columns.values[name]
        if position.absent is not None:
            absent[position.absent] = ~columns.present[name]
        if isinstance(position.field, TimestampField):
            times_ms = np.asarray(values, np.int64)
        elif position.string is not None:
            strings[position.string] = values.tolist()
            codes = layout.codes[position.string]
            numbers[position.row] = list(map(codes.__getitem__, strings[position.string]))
            if position.absent is not None:
                numbers[position.row, absent[position.absent]] = codes[None]
        else:
            numbers[position.row] = values
    numbers += 0.0
    numbers[layout.missing] = absent[: len(layout.blanked)]
    return Block(
        layout,
        columns.steps,
        numbers,
        tuple(strings),
        times_ms,
        absent if absent.any() else None,
    )


def canonical_bytes(schema: EventSchema, columns: EventColumns) -> bytes:
    """The bytes of a chunk's events that its digest is taken over, together with T.

    Two different chunks of T events never share them. For each field, in the order of the
    schema, with all numbers little-endian and nothing aligned or padded:

    1. presence: T bytes, 1 if the field has a value, 0 if it is absent or null;
    2. values, 0 (for a categorical: length 0) if absent:
       - numeric: T float64 (IEEE 754), -0.0 written as 0.0;
       - timestamp: T int64, epoch milliseconds; finer digits are cut off, to the past;
       - boolean: T bytes, 1 for true, 0 for false;
       - categorical: T uint32, the length of each category in UTF-8 bytes, then the UTF-8
         bytes of all categories one after the other.
    """
    return block_of(schema, columns).canonical_bytes()
