"""Fast decoder of events: from bytes to columns in one pass.

The event schema becomes a msgspec type whose decoder validates in C while it parses: types,
unknown and missing fields, finite numbers, lengths of categories, integer timestamps. The
columns are then extracted from its objects, for all events and all numbers at a time.

The decoder accepts only events that the strict type (`models.events.parse.event_type`) accepts,
and decodes the same values; it makes no errors. If it returns None, the caller must use the strict
type, which makes the error or accepts the events after all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from msgspec.structs import astuple

from models.events.block import (
    Block,
    BoolArray,
    DoubleArray,
    IntArray,
    new_layout,
)
from models.events.columns import EventColumns, columns_from_events
from models.events.moments import epoch_ms
from models.events.parse import (
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    RESET,
    can_mark_resets,
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

_LARGEST = float(np.finfo(np.float64).max)

# NaN is outside of every range, so the range rejects it too.
_NUMBER = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
_CATEGORY = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CATEGORY_CHARS)]
_EPOCH_MS = Annotated[int, msgspec.Meta(ge=MIN_TIMESTAMP_MS, lt=MAX_TIMESTAMP_MS)]


class ReadEvents(NamedTuple):
    """Decoded events, with counts for the detection of duplicate members.

    Attributes:
        members: number of members with a value other than null.
        strings: number of those values that are strings.
        resets: ascending indexes of the events that are marked by `reset`.
    """

    columns: EventColumns
    members: int
    strings: int
    resets: tuple[int, ...] = ()


class EventReader:
    """Fast decoder of the events of one model; reusable and thread-safe.

    Attributes:
        event: the msgspec Struct of one event, for decoders of whole request bodies.
        marked_event: the same with the member `reset`; None if that is the name of a field.
    """

    def __init__(self, schema: EventSchema):
        self._layout = new_layout(schema)
        self.event = _event_struct(schema)
        self.marked_event = _event_struct(schema, marked=True) if can_mark_resets(schema) else None
        self._list: Any = list[self.event]  # type: ignore[name-defined]
        self._json: msgspec.json.Decoder[Any] = msgspec.json.Decoder(self._list)
        self._msgpack: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(self._list)
        positions = list(self._layout.positions.values())
        value_fields, strings = self._layout.value_fields, len(self._layout.codes)
        self._numbers = value_fields[: len(value_fields) - strings]
        self._strings = value_fields[len(value_fields) - strings :]
        self._may_be_none = [positions[at].absent is not None for at in self._numbers]
        self._optional = [
            at for at, position in enumerate(positions) if position.absent is not None
        ]
        self._time_at = positions.index(self._layout.time) if self._layout.time else None
        # Packing fails at a None among numbers, but not among strings and timestamps.
        self._optional_strings_and_time = tuple(
            (at, position.absent)
            for at, position in enumerate(positions)
            if position.absent is not None and at not in self._numbers
        )

    def from_json(self, body: bytes) -> EventColumns | None:
        """Decode a JSON list of events; None: use the strict type."""
        return self._decoded(self._json, body)

    def from_msgpack(self, body: bytes) -> EventColumns | None:
        """Decode a MessagePack list of events; None: use the strict type."""
        return self._decoded(self._msgpack, body)

    def from_values(self, events: list[Any]) -> EventColumns | None:
        """Convert events that are parsed already; None: use the strict type.

        Args:
            events: values as returned by a parser of JSON or MessagePack.
        """
        try:
            columns = self.columns(msgspec.convert(events, self._list))
            # No parser returns a lone surrogate, but a str may contain one.
            for strings in columns.block.strings if columns and columns.block else ():
                "".join(strings).encode()
        except (msgspec.MsgspecError, ValueError):
            return None
        return columns

    def columns(self, events: Sequence[msgspec.Struct]) -> EventColumns | None:
        """Convert T >= 0 decoded objects of the type `event` to columns.

        Returns:
            None: use the strict type.
        """
        read = self.read(events)
        return None if read is None else read.columns

    def read(self, events: Sequence[msgspec.Struct]) -> ReadEvents | None:
        """Convert like `columns`, and count members and strings."""
        if not events:
            return ReadEvents(columns_from_events(self._layout.schema, []), 0, 0)
        steps, layout = len(events), self._layout
        by_field = tuple(zip(*map(astuple, events), strict=True))
        marks: tuple[bool | UnsetType, ...] = ()
        if type(events[0]) is self.marked_event:
            *fields, marks = by_field
            by_field = tuple(fields)
        times_ms = None
        if self._time_at is not None:
            times_ms = self._times_ms(by_field[self._time_at])
            if times_ms is None:
                return None
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
        np.add(np.frombuffer(packed).reshape(-1, steps), 0.0, out=numbers[layout.values])
        absent = self._absent(by_field, numbers) if blanks else None
        for at, _ in self._optional_strings_and_time if blanks else ():
            if at in self._strings:
                strings[self._strings.index(at)] = [text or "" for text in by_field[at]]
        columns = EventColumns.of_block(
            Block(layout, steps, numbers, tuple(strings), times_ms, absent)
        )
        members, string_count = self._count_values(by_field, steps)
        if not marks:
            return ReadEvents(columns, members, string_count)
        resets = tuple(at for at, mark in enumerate(marks) if mark is True)
        return ReadEvents(columns, members + steps - marks.count(UNSET), string_count, resets)

    def _count_values(self, by_field: Sequence[Sequence[Any]], steps: int) -> tuple[int, int]:
        """Count the values, and those that are strings."""
        members, strings = steps * len(by_field), steps * len(self._strings)
        for at in self._optional:
            absent = by_field[at].count(None)
            members -= absent
            if at in self._strings:
                strings -= absent
        if self._time_at is not None:
            strings += list(map(type, by_field[self._time_at])).count(str)
        return members, strings

    def columns_many(self, chunks: Sequence[Sequence[msgspec.Struct]]) -> list[EventColumns] | None:
        """Convert several chunks in one batch, which is faster; the results share arrays.

        Returns:
            None: use the strict type, because of at least one of them.
        """
        together = self.columns(list(chain.from_iterable(chunks)))
        if together is None:
            return None
        cuts = accumulate(map(len, chunks), initial=0)
        return [together[start:stop] for start, stop in pairwise(cuts)]

    def _absent(self, by_field: Sequence[Sequence[Any]], numbers: DoubleArray) -> BoolArray:
        """What is absent, bool [optionals, T], and `numbers` told so; NaN in them becomes 0."""
        layout, marked = self._layout, len(self._layout.blanked)
        unknown = np.isnan(numbers)
        np.copyto(numbers, 0.0, where=unknown)
        absent = np.zeros((layout.optionals, numbers.shape[1]), np.bool_)
        absent[:marked] = unknown.take(layout.blanked, axis=0)
        for at, row in self._optional_strings_and_time:
            absent[row] = [value is None for value in by_field[at]]
        numbers[layout.missing] = absent[:marked]
        return absent

    def _times_ms(self, moments: Sequence[Any]) -> IntArray | None:
        """Parse timestamps to epoch milliseconds, 0 if absent; None: use the strict type."""
        time = self._layout.time
        if time is None or time.absent is None or None not in moments:
            return epoch_ms(moments)
        found = epoch_ms([moment for moment in moments if moment is not None])
        if found is None:
            return None
        times_ms = np.zeros(len(moments), np.int64)
        times_ms[[moment is not None for moment in moments]] = found
        return times_ms

    def _decoded(self, decoder: Any, body: bytes) -> EventColumns | None:
        try:
            events = decoder.decode(body)
        except (msgspec.MsgspecError, ValueError):
            return None
        return self.columns(events)


def _with_nans(values: Sequence[Any]) -> Sequence[Any]:
    """Replace None by NaN."""
    return [math.nan if value is None else value for value in values]


def _event_struct(schema: EventSchema, *, marked: bool = False) -> type[msgspec.Struct]:
    # Attributes have generated names: a field may have the name of a method.
    names = {f"f{at}": field.name for at, field in enumerate(schema.fields)}
    fields: list[Any] = [
        (name, _annotation(field) | None, None) if field.optional else (name, _annotation(field))
        for name, field in zip(names, schema.fields, strict=True)
    ]
    if marked:
        names["mark"] = RESET
        fields.append(("mark", bool | UnsetType, UNSET))
    # Events contain only strings and numbers, so there are no cycles to collect.
    return msgspec.defstruct(
        "Event", fields, rename=names, forbid_unknown_fields=True, kw_only=True, gc=False
    )


def _annotation(field: EventField) -> Any:
    match field:
        case NumericField():
            return _NUMBER
        case CategoricalField():
            return _CATEGORY
        case BooleanField():
            return bool
        case TimestampField(epoch="s"):
            # The strict type converts numbers.
            return str
        case TimestampField():
            return _EPOCH_MS | str
