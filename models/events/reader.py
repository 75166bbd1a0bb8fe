"""Reader of events: from objects that a decoder has checked to columns.

The event schema becomes a msgspec type whose decoder checks in C: types, unknown and missing
fields, finite numbers, lengths of categories, integer timestamps. The columns are then extracted
from its objects, for all events and all numbers at a time. Timestamps and booleans in unusual
forms are converted one by one, by `models.events.parse`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from msgspec.structs import astuple

from models.errors import DataError
from models.events.columns import (
    Block,
    BoolArray,
    DoubleArray,
    EventColumns,
    IntArray,
    new_layout,
)
from models.events.parse import (
    EPOCH_SECONDS,
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    RESET,
    can_mark_resets,
    epoch_ms,
    expected_form,
    value_converter,
)
from models.events.schema import (
    MAX_CATEGORY_CHARS,
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)

LARGEST = float(np.finfo(np.float64).max)

# NaN is outside of every range, so the range rejects it too.
_NUMBER = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
_CATEGORY = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CATEGORY_CHARS)]
_EPOCH_MS = Annotated[int, msgspec.Meta(ge=MIN_TIMESTAMP_MS, lt=MAX_TIMESTAMP_MS)]
_EPOCH_S = Annotated[float, msgspec.Meta(ge=MIN_TIMESTAMP_MS / 1000, lt=MAX_TIMESTAMP_MS / 1000)]

EXPECTED: Final = "expected"
"""Key, in the `extra` of a type's `Meta`, of the description of its valid values."""

MAX_GOT_CHARS: Final = 80


class ReadEvents(NamedTuple):
    """Events as columns.

    Attributes:
        resets: ascending indexes of the events that are marked by `reset`.
    """

    columns: EventColumns
    resets: tuple[int, ...] = ()


class EventReader:
    """Reads the events of one schema; reusable and thread-safe.

    Args:
        marks_resets: whether an event may have the member `reset`, if no field has its name.

    Attributes:
        event: the msgspec Struct of one event, for decoders of whole request bodies.
        has_marks: whether events may have the member `reset`.
    """

    def __init__(self, schema: EventSchema, *, marks_resets: bool = False):
        self._schema = schema
        self.has_marks = marks_resets and can_mark_resets(schema)
        self.event = _event_struct(schema, marked=self.has_marks)
        self._layout = new_layout(schema)
        positions = list(self._layout.positions.values())
        value_fields, strings = self._layout.value_fields, len(self._layout.codes)
        self._numbers = value_fields[: len(value_fields) - strings]
        self._strings = value_fields[len(value_fields) - strings :]
        self._may_be_none = [positions[at].absent is not None for at in self._numbers]
        self._coerced = [
            at
            for at, field in enumerate(schema.fields)
            if isinstance(field, BooleanField) and field.coerce
        ]
        self._time_at = positions.index(self._layout.time) if self._layout.time else None
        time = schema.timestamp
        self._milliseconds = f"f{self._time_at}" if time and time.epoch == "ms" else None
        # Packing fails at a None among numbers, but not among strings and timestamps.
        self._optional_strings_and_time = tuple(
            (at, position.absent)
            for at, position in enumerate(positions)
            if position.absent is not None and at not in self._numbers
        )

    def read(self, events: Sequence[msgspec.Struct]) -> ReadEvents:
        """Convert T >= 0 objects of the type `event` to columns.

        Raises:
            DataError: a timestamp or a boolean has none of its forms.
        """
        steps, layout = len(events), self._layout
        by_field: Sequence[Sequence[Any]] = tuple(zip(*map(astuple, events), strict=True))
        if not events:
            by_field = [()] * (len(self._schema.fields) + self.has_marks)
        resets: tuple[int, ...] = ()
        if self.has_marks:
            *by_field, marks = by_field
            if marks.count(UNSET) != steps:
                resets = tuple(at for at, mark in enumerate(marks) if mark is True)
        if self._coerced:
            by_field = list(by_field)
            for at in self._coerced:
                by_field[at] = self._convert_values(at, by_field[at])
        times_ms = None
        if self._time_at is not None:
            times_ms = self._times_ms(by_field[self._time_at])
        strings: list[Sequence[str]] = [by_field[at] for at in self._strings]
        codes: list[int] = []
        for code_of, column in zip(layout.codes, strings, strict=True):
            codes += map(code_of.__getitem__, column)
        values = chain.from_iterable([by_field[at] for at in self._numbers])
        count = steps * len(layout.value_fields)
        blanks = any(None in by_field[at] for at, _ in self._optional_strings_and_time)
        try:
            packed = struct.pack(f"{count}d", *values, *codes)
        except struct.error:
            blanks = True
            values = chain.from_iterable(
                _with_nans(by_field[at]) if optional else by_field[at]
                for at, optional in zip(self._numbers, self._may_be_none, strict=True)
            )
            packed = struct.pack(f"{count}d", *values, *codes)
        numbers = np.zeros((len(layout.columns), steps))
        # -0.0 and 0.0 are equal for clients, so they must be equal for digest and network.
        np.add(
            np.frombuffer(packed).reshape(len(layout.value_fields), steps),
            0.0,
            out=numbers[layout.values],
        )
        absent = self._absent(by_field, numbers) if blanks else None
        for at, _ in self._optional_strings_and_time if blanks else ():
            if at in self._strings:
                strings[self._strings.index(at)] = [text or "" for text in by_field[at]]
        columns = EventColumns.of_block(
            Block(layout, steps, numbers, tuple(strings), times_ms, absent)
        )
        return ReadEvents(columns, resets)

    def find_epoch_seconds(self, events: Sequence[msgspec.Struct]) -> int | None:
        """The first event's timestamp if it is a number that was probably meant as epoch seconds.

        It is read as milliseconds of 1970. A table of such times alone is rejected, but a chunk
        cannot be: it may belong to a stream that passes through 1970.
        """
        if self._milliseconds is None or not events:
            return None
        moment = getattr(events[0], self._milliseconds)
        return moment if type(moment) is int and moment in EPOCH_SECONDS else None

    def _absent(self, by_field: Sequence[Sequence[Any]], numbers: DoubleArray) -> BoolArray:
        """Find absent values, bool [optionals, T]; NaN in `numbers` marks them, and becomes 0."""
        layout, marked = self._layout, len(self._layout.blanked)
        unknown = np.isnan(numbers)
        np.copyto(numbers, 0.0, where=unknown)
        absent = np.zeros((layout.optionals, numbers.shape[1]), np.bool_)
        absent[:marked] = unknown.take(layout.blanked, axis=0)
        for at, row in self._optional_strings_and_time:
            absent[row] = [value is None for value in by_field[at]]
        numbers[layout.missing] = absent[:marked]
        return absent

    def _times_ms(self, moments: Sequence[Any]) -> IntArray:
        """Parse timestamps to epoch milliseconds, 0 if absent."""
        time, at = self._layout.time, self._time_at or 0
        if time is None or time.absent is None or None not in moments:
            return self._present_times_ms(at, moments)
        is_present = [moment is not None for moment in moments]
        times_ms = np.zeros(len(moments), np.int64)
        times_ms[is_present] = self._present_times_ms(at, moments)
        return times_ms

    def _present_times_ms(self, at: int, moments: Sequence[Any]) -> IntArray:
        present = moments if None not in moments else [each for each in moments if each is not None]
        found = epoch_ms(present)
        if found is None:
            converted = [each for each in self._convert_values(at, moments) if each is not None]
            found = np.array(converted, np.int64)
        return found

    def _convert_values(self, at: int, values: Sequence[Any]) -> Sequence[Any]:
        """Convert the values of a field by `value_converter`, each from any of its forms.

        Raises:
            DataError
        """
        if set(map(type, values)) <= {bool, type(None)}:
            return values
        field = self._schema.fields[at]
        convert = value_converter(self._schema, field)
        converted: list[Any] = []
        for index, value in enumerate(values):
            try:
                converted.append(None if value is None else convert(value))
            except ValueError as error:
                expected = expected_form(field, self._schema.timezone) or "another value"
                got = json.dumps(value)[:MAX_GOT_CHARS]
                raise DataError(
                    index=index, field=field.name, expected=expected, got=got
                ) from error
        return converted


def _with_nans(values: Sequence[Any]) -> Sequence[Any]:
    """Replace None by NaN."""
    return [math.nan if value is None else value for value in values]


def _event_struct(schema: EventSchema, *, marked: bool = False) -> type[msgspec.Struct]:
    # Attributes have generated names: a field may have the name of a method.
    names = {f"f{at}": field.name for at, field in enumerate(schema.fields)}
    fields: list[Any] = [
        (name, _annotation(schema, field) | None, None)
        if field.optional
        else (name, _annotation(schema, field))
        for name, field in zip(names, schema.fields, strict=True)
    ]
    if marked:
        names["mark"] = RESET
        fields.append(("mark", bool | UnsetType, UNSET))
    # Events contain only strings and numbers, so there are no cycles to collect.
    return msgspec.defstruct(
        "Event", fields, rename=names, forbid_unknown_fields=True, kw_only=True, gc=False
    )


def _annotation(schema: EventSchema, field: EventField) -> Any:
    kind: Any
    match field:
        case NumericField():
            return _NUMBER
        case CategoricalField():
            return _CATEGORY
        case BooleanField(coerce=True):
            kind = bool | int | str
        case BooleanField():
            return bool
        case TimestampField(epoch="s"):
            kind = _EPOCH_S | str
        case TimestampField():
            kind = _EPOCH_MS | str
    return Annotated[kind, msgspec.Meta(extra={EXPECTED: expected_form(field, schema.timezone)})]
