"""Validated events as columns, shared by encoding, digests and training.

One array per field instead of one dict per event, so that all processing after parsing is
vectorised. Absent values are 0, false or "", and only `present` distinguishes them. Events
of requests stay in the block that the reader made; their columns are views of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.block import Block, BoolArray, LazyArrays, layout_of
from models.events.parse import timestamp_ms
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)


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


def value_dtype(field: EventField) -> np.dtype[Any]:
    """The dtype of a field's values in `EventColumns`."""
    match field:
        case NumericField():
            return np.dtype(np.float64)
        case TimestampField():
            return np.dtype(np.int64)
        case BooleanField():
            return np.dtype(np.bool_)
        case CategoricalField():
            return np.dtype(object)


def columns_from_events(schema: EventSchema, events: Sequence[Mapping[str, Any]]) -> EventColumns:
    """Columns of events that `event_adapter(schema)` (or `event_type`) has validated.

    Args:
        schema: the schema that the events were validated under.
        events: T dicts; an optional field may be absent or None.
    """
    steps = len(events)
    present: dict[str, BoolArray] = {}
    values: dict[str, NDArray[Any]] = {}
    for field in schema.fields:
        name, dtype = field.name, value_dtype(field)
        if field.optional:
            given: list[Any] = [event.get(name) for event in events]
            present[name] = np.array([value is not None for value in given], np.bool_)
            blank: Any = "" if dtype.hasobject else 0
            given = [blank if value is None else value for value in given]
        else:
            given = [event[name] for event in events]
            present[name] = np.ones(steps, np.bool_)
        if isinstance(field, TimestampField):
            given = [timestamp_ms(moment) for moment in given]
        column = np.array(given, dtype)
        # -0.0 and 0.0 are one number to a client, so they must be one to digest and network.
        values[name] = column + 0.0 if dtype.kind == "f" else column
    return EventColumns(steps, present, values)


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
