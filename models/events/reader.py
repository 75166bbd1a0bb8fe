"""Events from bytes to columns in one pass: the fast way in, beside the strict one.

The event schema becomes a msgspec type whose decoder checks while it parses, in C: types,
unknown and missing fields, finite numbers, lengths of categories, integer timestamps. The
columns are then taken out of its objects, all events and all numbers at a time.

The reader accepts only what the strict type (`models.events.parse.event_type`) accepts, and
reads the same values out of it; it never says what is wrong. Where it gives None, the strict
type is to be asked, which makes the error or finds the events valid after all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
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
from models.events.parse import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS
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

# NaN is in no range, so that the range refuses it too.
_NUMBER = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
_CATEGORY = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CATEGORY_CHARS)]
_EPOCH_MS = Annotated[int, msgspec.Meta(ge=MIN_TIMESTAMP_MS, lt=MAX_TIMESTAMP_MS)]


class ReadEvents(NamedTuple):
    """Decoded events, with counts for the detection of duplicate members.

    Attributes:
        members: number of members with a value other than null.
        texts: number of those values that are text.
    """

    columns: EventColumns
    members: int
    texts: int


class EventReader:
    """Reads the events of one model. Made once, for any number of chunks and threads.

    Attributes:
        event: the msgspec Struct of one event, for decoders of whole request bodies.
    """

    def __init__(self, schema: EventSchema):
        self._layout = new_layout(schema)
        self.event = _event_struct(schema)
        self._list: Any = list[self.event]  # type: ignore[name-defined]
        self._json: msgspec.json.Decoder[Any] = msgspec.json.Decoder(self._list)
        self._msgpack: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(self._list)
        places = list(self._layout.places.values())
        given, texts = self._layout.given, len(self._layout.codes)
        self._numbers = given[: len(given) - texts]
        self._texts = given[len(given) - texts :]
        self._may_be_none = [places[at].absent is not None for at in self._numbers]
        self._optional = [at for at, place in enumerate(places) if place.absent is not None]
        self._time_at = places.index(self._layout.time) if self._layout.time else None
        # Packing notices a None among numbers; among texts and timestamps nothing would.
        self._unnoticed = tuple(
            (at, place.absent)
            for at, place in enumerate(places)
            if place.absent is not None and at not in self._numbers
        )

    def from_json(self, body: bytes) -> EventColumns | None:
        """Columns of a JSON list of events, or None: ask the strict type."""
        return self._decoded(self._json, body)

    def from_msgpack(self, body: bytes) -> EventColumns | None:
        """Columns of a MessagePack list of events, or None: ask the strict type."""
        return self._decoded(self._msgpack, body)

    def from_values(self, events: list[Any]) -> EventColumns | None:
        """Columns of events that are parsed already, or None: ask the strict type.

        Args:
            events: plain values, as a parser of JSON or MessagePack gives them.
        """
        try:
            columns = self.columns(msgspec.convert(events, self._list))
            # Half a surrogate pair comes out of no parser, but text may hold one.
            for texts in columns.block.texts if columns and columns.block else ():
                "".join(texts).encode()
        except (msgspec.MsgspecError, ValueError):
            return None
        return columns

    def columns(self, events: Sequence[msgspec.Struct]) -> EventColumns | None:
        """Columns of T >= 0 objects of the type `event`, as a decoder has made them.

        Returns:
            None where the strict type is to be asked.
        """
        read = self.read(events)
        return None if read is None else read.columns

    def read(self, events: Sequence[msgspec.Struct]) -> ReadEvents | None:
        """As `columns`, with the numbers of members and texts."""
        if not events:
            return ReadEvents(columns_from_events(self._layout.schema, []), 0, 0)
        steps, layout = len(events), self._layout
        given = tuple(zip(*map(astuple, events), strict=True))
        times_ms = None
        if self._time_at is not None:
            times_ms = self._times_ms(given[self._time_at])
            if times_ms is None:
                return None
        texts: list[Sequence[str]] = [given[at] for at in self._texts]
        codes: list[int] = []
        for code_of, column in zip(layout.codes, texts, strict=True):
            codes += map(code_of.__getitem__, column)
        values = chain.from_iterable([given[at] for at in self._numbers])
        count = steps * len(layout.given)
        blanks = any(None in given[at] for at, _ in self._unnoticed)
        try:
            packed = struct.pack(f"{count}d", *values, *codes)
        except struct.error:
            blanks = True
            values = chain.from_iterable(
                _known(given[at]) if optional else given[at]
                for at, optional in zip(self._numbers, self._may_be_none, strict=True)
            )
            packed = struct.pack(f"{count}d", *values, *codes)
        numbers = np.zeros((len(layout.columns), steps))
        # -0.0 and 0.0 are one number to a client, so they must be one to digest and network.
        np.add(np.frombuffer(packed).reshape(-1, steps), 0.0, out=numbers[layout.values])
        absent = self._absent(given, numbers) if blanks else None
        for at, _ in self._unnoticed if blanks else ():
            if at in self._texts:
                texts[self._texts.index(at)] = [text or "" for text in given[at]]
        columns = EventColumns.of_block(
            Block(layout, steps, numbers, tuple(texts), times_ms, absent)
        )
        members, strings = self._count_values(given, steps)
        return ReadEvents(columns, members, strings)

    def _count_values(self, given: Sequence[Sequence[Any]], steps: int) -> tuple[int, int]:
        """Count the values, and those of them that are text."""
        members, texts = steps * len(given), steps * len(self._texts)
        for at in self._optional:
            absent = given[at].count(None)
            members -= absent
            if at in self._texts:
                texts -= absent
        if self._time_at is not None:
            texts += list(map(type, given[self._time_at])).count(str)
        return members, texts

    def columns_many(self, chunks: Sequence[Sequence[msgspec.Struct]]) -> list[EventColumns] | None:
        """As `columns` for several chunks, in less time for each; views of the same arrays.

        Returns:
            None where the strict type is to be asked about any of them.
        """
        together = self.columns(list(chain.from_iterable(chunks)))
        if together is None:
            return None
        cuts = accumulate(map(len, chunks), initial=0)
        return [together[start:stop] for start, stop in pairwise(cuts)]

    def _absent(self, given: Sequence[Sequence[Any]], numbers: DoubleArray) -> BoolArray:
        """What is absent, bool [optionals, T], and `numbers` told so; NaN in them becomes 0."""
        layout, marked = self._layout, len(self._layout.blanked)
        unknown = np.isnan(numbers)
        np.copyto(numbers, 0.0, where=unknown)
        absent = np.zeros((layout.optionals, numbers.shape[1]), np.bool_)
        absent[:marked] = unknown.take(layout.blanked, axis=0)
        for at, row in self._unnoticed:
            absent[row] = [value is None for value in given[at]]
        numbers[layout.missing] = absent[:marked]
        return absent

    def _times_ms(self, moments: Sequence[Any]) -> IntArray | None:
        """Epoch milliseconds, 0 where absent; None where the strict type is to be asked."""
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


def _known(values: Sequence[Any]) -> Sequence[Any]:
    """NaN in the place of None."""
    return [math.nan if value is None else value for value in values]


def _event_struct(schema: EventSchema) -> type[msgspec.Struct]:
    # Attributes of their own names: a field may have the name of a method.
    names = {f"f{at}": field.name for at, field in enumerate(schema.fields)}
    fields: list[Any] = [
        (name, _annotation(field) | None, None) if field.optional else (name, _annotation(field))
        for name, field in zip(names, schema.fields, strict=True)
    ]
    # Nothing but texts and numbers is held, so that there are no cycles to collect.
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
        case TimestampField():
            return _EPOCH_MS | str
