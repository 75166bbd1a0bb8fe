"""Validated events, column by column: what encoding, digests and training share.

One array per field instead of one dict per event, so that everything after parsing is
vectorised. Absent values hold 0, false or "" and are told apart by `present` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.parse import timestamp_ms
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class EventColumns:
    """T events.

    Attributes:
        steps: T.
        present: per field, bool [T]; all true for a required field.
        values: per field, an array [T]: float64 for a numeric (-0.0 is kept as 0.0), int64
            epoch milliseconds for a timestamp, bool for a boolean, objects (str) for a
            categorical. Where not present: 0, false or "".
    """

    steps: int
    present: Mapping[str, BoolArray]
    values: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, cut: slice) -> EventColumns:
        """The events of a slice, as views."""
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


def canonical_bytes(schema: EventSchema, columns: EventColumns) -> bytes:
    """The bytes of a chunk's events that its digest is taken over, together with T.

    Two different chunks of T events never share them. For each field, in the order of the
    schema, with all numbers little-endian and nothing aligned or padded:

    1. presence: T bytes, 1 where the field has a value, 0 where it is absent or null;
    2. values, 0 (for a categorical: length 0) where absent:
       - numeric: T float64 (IEEE 754), -0.0 written as 0.0;
       - timestamp: T int64, epoch milliseconds; finer digits are cut off, to the past;
       - boolean: T bytes, 1 for true, 0 for false;
       - categorical: T uint32, the length of each category in UTF-8 bytes, then the UTF-8
         bytes of all categories one after the other.
    """
    parts: list[bytes] = []
    for field in schema.fields:
        present = columns.present[field.name]
        values = columns.values[field.name]
        parts.append(present.astype(np.uint8).tobytes())
        match field:
            case NumericField():
                parts.append((values + 0.0).astype("<f8").tobytes())
            case TimestampField():
                parts.append(values.astype("<i8").tobytes())
            case BooleanField():
                parts.append(values.astype(np.uint8).tobytes())
            case CategoricalField():
                encoded = [value.encode() for value in values.tolist()]
                parts.append(np.array([len(value) for value in encoded], "<u4").tobytes())
                parts.extend(encoded)
    return b"".join(parts)
