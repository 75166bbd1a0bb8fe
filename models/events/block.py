"""Events in the form that digests and encoding read: a few arrays for all fields together.

A chunk is often short, and then a NumPy call costs more than the numbers in it. So the fields
of a chunk lie in one float64 matrix, ordered by what is done to them, and each step of encoding
is one call for all fields. A `BlockLayout` is what follows from the schema alone and is made
once; a `Block` holds T events. Its values are those of `EventColumns`, to the bit.

Nothing is validated here: a reader or a table has done it.
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
    TIMESTAMP_FEATURES,
    UNKNOWN_CODE,
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
DoubleArray = NDArray[np.float64]

GAP_ROW = 0
"""The row of `Block.numbers` that is the gap's, in a schema with a timestamp."""


class Codes(dict[str | None, int]):
    """The code of every category of a field, and of None where it may be absent."""

    def __missing__(self, category: str | None) -> int:
        return UNKNOWN_CODE


class Place(NamedTuple):
    """Where a block keeps one field.

    Attributes:
        field: under the schema.
        row: of `numbers`; for the timestamp the gap's.
        text: for a categorical, its index in `texts`.
        absent: for an optional field, its row of `absent`.
    """

    field: EventField
    row: int
    text: int | None
    absent: int | None


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayout:
    """Where the fields of a schema lie in its blocks, and what encoding does to them.

    The K rows of `numbers` are the gap, the numerics under a signed logarithm, the other
    numerics, the booleans, the codes of the categoricals, and for each optional field of
    another kind 1 where it is absent. With the calendar they are the columns of a row.

    Attributes:
        schema: whose layout it is.
        places: per field, by name, in the order of the schema.
        time: the place of the timestamp, or None.
        given: per row of `numbers` that holds values, that is from after the gap's to before
            the first of absence, the index of its field in the schema.
        codes: per categorical, in the order of their rows.
        optionals: how many rows `Block.absent` has: for the M optional fields of `missing`, in
            its order, and then for the optional categoricals.
        logs: how many rows, from the first, go through the signed logarithm.
        fitted: whether the schema is; otherwise there is no mean and std to encode with.
        mean: float64 [K, 1], and so is `std`: each row is encoded as (row - mean) / std.
        columns: int [K], the encoded column of each row.
        calendar: the first of the timestamp's four calendar columns; 0 without a timestamp.
        missing: the rows of `numbers` that say what is absent, M of them.
        blanked: int [M], the row of `numbers` that is encoded as 0 where it is absent.
    """

    schema: EventSchema
    places: Mapping[str, Place]
    time: Place | None
    given: tuple[int, ...]
    codes: tuple[Codes, ...]
    optionals: int
    logs: int
    fitted: bool
    mean: DoubleArray
    std: DoubleArray
    columns: IntArray
    calendar: int
    missing: slice
    blanked: IntArray

    @property
    def values(self) -> slice:
        """The rows of `numbers` that hold values: neither the gap nor what is absent."""
        return slice(0 if self.time is None else GAP_ROW + 1, self.missing.start)


class Block(NamedTuple):
    """T events under a layout.

    Attributes:
        layout: where what lies.
        steps: T.
        numbers: float64 [K, T], without negative zeros; 0 in the gap's row and for absent
            values, but the code of absence for an absent category.
        texts: per categorical, T strings; "" where absent.
        times_ms: int64 [T], epoch milliseconds, 0 where absent; None without a timestamp.
        absent: bool [optionals, T]; None where nothing is absent.
    """

    layout: BlockLayout
    steps: int
    numbers: DoubleArray
    texts: tuple[Sequence[str], ...]
    times_ms: IntArray | None
    absent: BoolArray | None

    def cut(self, cut: slice) -> Block:
        """The events of a slice, as views."""
        numbers = self.numbers[:, cut]
        return Block(
            self.layout,
            numbers.shape[1],
            numbers,
            tuple(texts[cut] for texts in self.texts),
            None if self.times_ms is None else self.times_ms[cut],
            None if self.absent is None else self.absent[:, cut],
        )

    def presence(self, place: Place) -> BoolArray:
        """Where a field has a value, bool [T]."""
        if place.absent is None or self.absent is None:
            return np.ones(self.steps, np.bool_)
        return np.asarray(~self.absent[place.absent])

    def values(self, place: Place) -> NDArray[Any]:
        """A field's values [T], as `EventColumns` has them."""
        if place.text is not None:
            return np.array(self.texts[place.text], object)
        if isinstance(place.field, TimestampField) and self.times_ms is not None:
            return self.times_ms
        row: DoubleArray = self.numbers[place.row]
        return row.astype(np.bool_) if isinstance(place.field, BooleanField) else row

    def canonical_bytes(self) -> bytes:
        """The bytes that `models.events.columns.canonical_bytes` describes."""
        numbers, wide = self.numbers.astype("<f8", copy=False).tobytes(), 8 * self.steps
        everywhere = b"\1" * self.steps
        parts: list[bytes] = []
        for field, row, text, absent in self.layout.places.values():
            if absent is None or self.absent is None:
                parts.append(everywhere)
            else:
                parts.append((~self.absent[absent]).tobytes())
            if text is not None:
                parts += _canonical_texts(self.texts[text])
            elif field.kind == "numeric":
                parts.append(numbers[row * wide : (row + 1) * wide])
            elif field.kind == "boolean":
                parts.append(self.numbers[row].astype(np.uint8).tobytes())
            elif self.times_ms is not None:
                parts.append(self.times_ms.astype("<i8", copy=False).tobytes())
        return b"".join(parts)


class ByName(Mapping[str, NDArray[Any]]):
    """One array per field, by name, made when it is asked for."""

    __slots__ = ("_of", "_places")

    def __init__(self, places: Mapping[str, Place], of: Callable[[Place], NDArray[Any]]):
        self._places = places
        self._of = of

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._of(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _canonical_texts(texts: Sequence[str]) -> tuple[bytes, bytes]:
    """The lengths in UTF-8 bytes as uint32 LE, and the UTF-8 bytes one after the other."""
    joined = "".join(texts)
    lengths = map(len, texts) if joined.isascii() else (len(text.encode()) for text in texts)
    return struct.pack(f"<{len(texts)}I", *lengths), joined.encode()


@lru_cache(maxsize=64)
def layout_of(schema: EventSchema) -> BlockLayout:
    """The layout of the blocks of an equal schema, made once; each call hashes the schema."""
    return new_layout(schema)


def new_layout(schema: EventSchema) -> BlockLayout:
    """The layout of a schema's blocks, which are known to be that schema's by its identity."""
    fields = schema.fields
    order = sorted(range(len(fields)), key=lambda index: _rank(fields[index]))
    texts = [index for index in order if isinstance(fields[index], CategoricalField)]
    optional = [index for index in order if fields[index].optional]
    # Categoricals have the last rows.
    marked = [index for index in optional if index not in texts]
    starts = _starts(schema)
    places = {
        field.name: Place(
            field,
            order.index(index),
            texts.index(index) if index in texts else None,
            optional.index(index) if index in optional else None,
        )
        for index, field in enumerate(fields)
    }
    scales = [_scale_of(fields[index]) for index in order] + [(0.0, 1.0)] * len(marked)
    columns = [starts[index] for index in order] + [starts[index + 1] - 1 for index in marked]
    time = places[schema.timestamp.name] if schema.timestamp else None
    return BlockLayout(
        schema=schema,
        places=places,
        time=time,
        given=tuple(order if time is None else order[GAP_ROW + 1 :]),
        codes=tuple(_codes(fields[index]) for index in texts),
        optionals=len(optional),
        logs=sum(_rank(field) <= _LOGARITHMIC for field in fields),
        fitted=not any(mean is None or std is None for mean, std in scales),
        mean=np.array([[mean] for mean, _ in scales], np.float64),
        std=np.array([[std] for _, std in scales], np.float64),
        columns=np.array(columns, np.int64),
        calendar=0 if time is None else starts[order[GAP_ROW]] + 1,
        missing=slice(len(order), len(columns)),
        blanked=np.array([order.index(index) for index in marked], np.int64),
    )


_LOGARITHMIC = 1


def _rank(field: EventField) -> int:
    """Where a field's row stands among those of other fields."""
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
        case NumericField():
            return field.mean, field.std
    return 0.0, 1.0


def _codes(field: EventField) -> Codes:
    if not isinstance(field, CategoricalField):
        raise TypeError(f"expected a categorical field, got {field.kind}")
    codes = Codes(field.code_of)
    if field.optional:
        codes[None] = field.absent_code
    return codes


def _starts(schema: EventSchema) -> list[int]:
    """The first encoded column of each field, and their number at the end."""
    starts = [0]
    for field in schema.fields:
        width = len(TIMESTAMP_FEATURES) if isinstance(field, TimestampField) else 1
        missing = field.optional and not isinstance(field, CategoricalField)
        starts.append(starts[-1] + width + missing)
    return starts
