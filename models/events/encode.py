"""From event columns to the float32 rows that a network reads.

The same code encodes for training and for serving. What depends on earlier events is only
the gap between timestamps; it is computed in int64 milliseconds against the clock, a part
of the stream's state, so that encoding does not depend on how events were cut into chunks:
encoding a whole sequence and encoding its chunks one after the other, handing the clock on,
give the same bits.

    numeric      (transform(value) - mean) / std in float64, then float32
    categorical  its code: 0 unknown, 1..K the vocabulary, K+1 absent
    boolean      1 or 0
    timestamp    gap      (log(1 + gap in seconds) - gap_mean) / gap_std
                 hour     sin and cos of 2 pi m / 1440, m the local minute of the day
                 weekday  sin and cos of 2 pi d / 7, d the local day of the week, Monday 0
    .missing     1 where absent, with every other column of the field 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.errors import DataError, StateError
from models.events.columns import EventColumns
from models.events.parse import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS
from models.events.schema import (
    TIMESTAMP_FEATURES,
    UNKNOWN_CODE,
    BooleanField,
    CategoricalField,
    Column,
    EventSchema,
    NumericField,
    TimestampField,
)
from models.events.zones import DAY_MS, zone_table
from models.layout import CLOCK_LAST_MS, CLOCK_OUT_OF_ORDER, CLOCK_SEEN
from models.state import StateSpec

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

_MINUTE_MS = 60_000
_MINUTES = 1440
_EPOCH_WEEKDAY = 3


MAX_SEEN = 2**62
"""More events than any stream can have; counting on from it stays within int64."""


@dataclass(frozen=True, slots=True)
class Clock:
    """What a stream remembers of its timestamps.

    Attributes:
        last_ms: the latest timestamp so far, epoch milliseconds; 0 while `seen` is 0.
        seen: how many events carried a timestamp.
        out_of_order: how many of them came with one before `last_ms`.
    """

    last_ms: int = 0
    seen: int = 0
    out_of_order: int = 0

    @classmethod
    def from_ints(cls, spec: StateSpec, ints: IntArray) -> Clock:
        """Read the clock's parts out of a state's int64 row [M].

        A model without a timestamp field has no such parts: the clock is then at zero.

        Raises:
            StateError: counters that no stream can reach, or a timestamp out of range.
        """
        if CLOCK_SEEN not in spec.slices:
            return cls()
        last_ms, seen, out_of_order = (
            int(ints[spec.slices[name].start])
            for name in (CLOCK_LAST_MS, CLOCK_SEEN, CLOCK_OUT_OF_ORDER)
        )
        if not 0 <= seen <= MAX_SEEN or not 0 <= out_of_order <= max(seen - 1, 0):
            raise StateError(
                f"parts {CLOCK_SEEN!r} and {CLOCK_OUT_OF_ORDER!r}: expected counts, the second "
                f"below the first, got {seen} and {out_of_order}"
            )
        if seen == 0:
            return cls()
        if not MIN_TIMESTAMP_MS <= last_ms < MAX_TIMESTAMP_MS:
            raise StateError(
                f"part {CLOCK_LAST_MS!r}: expected epoch milliseconds between 1900 and 2200, "
                f"got {last_ms}"
            )
        return cls(last_ms, seen, out_of_order)

    def into_ints(self, spec: StateSpec, ints: IntArray) -> IntArray:
        """A copy of a state's int64 row [M] with the clock's parts set to this clock."""
        result = ints.copy()
        if CLOCK_SEEN in spec.slices:
            result[spec.slices[CLOCK_LAST_MS]] = self.last_ms
            result[spec.slices[CLOCK_SEEN]] = self.seen
            result[spec.slices[CLOCK_OUT_OF_ORDER]] = self.out_of_order
        return result


def encode(schema: EventSchema, columns: EventColumns, clock: Clock) -> tuple[FloatArray, Clock]:
    """Encode T events that follow those the clock has seen.

    Args:
        schema: a fitted schema.
        columns: T >= 0 events under that schema.
        clock: the stream's clock before the first of them; `Clock()` for a new stream.

    Returns:
        Rows, float32 [T, F], finite; and the clock after the last event.

    Raises:
        DataError: a numeric value that is not finite as a float32 once standardised.
    """
    rows = np.zeros((columns.steps, len(schema.columns)), np.float32)
    at = 0
    with np.errstate(over="ignore"):
        for field in schema.fields:
            present = columns.present[field.name]
            values = columns.values[field.name]
            width = 1
            match field:
                case CategoricalField():
                    rows[:, at] = categorical_codes(field, present, values)
                case NumericField():
                    rows[:, at] = _scale(transformed(field, values), field.mean, field.std)
                case BooleanField():
                    rows[:, at] = values
                case TimestampField():
                    width = len(TIMESTAMP_FEATURES)
                    times_ms = values[present] if field.optional else values
                    features, clock = _timestamp(schema, field, times_ms, clock)
                    rows[present if field.optional else slice(None), at : at + width] = features
            at += width
            if field.optional and not isinstance(field, CategoricalField):
                absent = ~present
                if absent.any():
                    rows[absent, at - width : at] = 0
                rows[:, at] = absent
                at += 1
    if not np.isfinite(rows).all():
        raise _not_finite(schema, columns, rows)
    return rows, clock


def standardise(field: NumericField, values: ArrayLike) -> FloatArray:
    """Values of a numeric field, in its own units, as the column holds them.

    Anything that is compared with an encoded column (a head's threshold, say) goes through
    here too, so that equal values are equal after encoding.

    Args:
        field: a fitted field.
        values: any shape.

    Returns:
        float32 of the same shape; infinite where the result does not fit.
    """
    given = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        return _scale(transformed(field, given), field.mean, field.std)


def transformed(field: NumericField, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values after the field's transform, before standardising."""
    if field.transform == "signed_log1p":
        return np.asarray(np.copysign(np.log1p(np.abs(values)), values), np.float64)
    return values


def categorical_codes(
    field: CategoricalField, present: NDArray[np.bool_], values: NDArray[Any]
) -> IntArray:
    """Codes int64 [T] of a categorical column: 0 unknown, 1..K known, K+1 absent."""
    code_of = field.code_of
    codes = np.fromiter(
        (code_of.get(value, UNKNOWN_CODE) for value in values), np.int64, len(values)
    )
    return np.where(present, codes, field.absent_code) if field.optional else codes


def gaps_ms(times_ms: IntArray, clock: Clock) -> tuple[IntArray, Clock]:
    """Milliseconds since the latest timestamp before each event, and the clock afterwards.

    The first event of a stream, and one before the latest, have gap 0; the latter are
    counted and leave the latest timestamp where it is.

    Args:
        times_ms: int64 [T], the timestamps of the events that carry one.
        clock: the stream's clock before them.
    """
    if len(times_ms) == 0:
        return np.zeros(0, np.int64), clock
    first = clock.last_ms if clock.seen else int(times_ms[0])
    latest = np.maximum.accumulate(np.concatenate(([np.int64(first)], times_ms)))
    since = times_ms - latest[:-1]
    return np.maximum(since, 0), Clock(
        int(latest[-1]),
        clock.seen + len(times_ms),
        clock.out_of_order + int(np.count_nonzero(since < 0)),
    )


def log_gap(gap_ms: IntArray) -> NDArray[np.float64]:
    """log(1 + gap in seconds), before standardising."""
    return np.log1p(gap_ms / 1000.0)


def check_rows(columns: tuple[Column, ...], rows: FloatArray) -> None:
    """Refuse rows of `inputs` that the encoder could not have produced.

    Args:
        columns: the F columns, `ModelSpec.columns`.
        rows: float32 [T, F].

    Raises:
        DataError: another number of columns, a value that is not finite, or a categorical's
            code that is not whole or not in 0..codes-1.
    """
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        got = f"{rows.shape[1]} values" if rows.ndim == 2 else f"an array of shape {rows.shape}"
        raise DataError(expected=f"rows of {len(columns)} values", got=got)
    finite = np.isfinite(rows)
    if not finite.all():
        step, at = np.argwhere(~finite)[0]
        raise DataError(
            index=int(step),
            field=columns[at].name,
            expected="a finite float32",
            got=str(rows[step, at]),
        )
    for at, column in enumerate(columns):
        if column.codes is None:
            continue
        codes = rows[:, at]
        wrong = (codes < 0) | (codes >= column.codes) | (codes != np.floor(codes))
        if wrong.any():
            step = int(np.argmax(wrong))
            raise DataError(
                index=step,
                field=column.name,
                expected=f"a whole code from 0 to {column.codes - 1}",
                got=f"{codes[step]:g}",
            )


def _timestamp(
    schema: EventSchema, field: TimestampField, times_ms: IntArray, clock: Clock
) -> tuple[FloatArray, Clock]:
    gaps, clock = gaps_ms(times_ms, clock)
    local_ms = times_ms + zone_table(schema.timezone).offsets(times_ms)
    features = np.empty((len(times_ms), len(TIMESTAMP_FEATURES)), np.float32)
    features[:, 0] = _scale(log_gap(gaps), field.gap_mean, field.gap_std)
    features[:, 1:3] = _MINUTE_ANGLES[local_ms // _MINUTE_MS % _MINUTES]
    features[:, 3:5] = _WEEKDAY_ANGLES[(local_ms // DAY_MS + _EPOCH_WEEKDAY) % 7]
    return features, clock


def _not_finite(schema: EventSchema, columns: EventColumns, rows: FloatArray) -> DataError:
    step, at = (int(index) for index in np.argwhere(~np.isfinite(rows))[0])
    name = schema.columns[at].field or schema.columns[at].name
    return DataError(
        index=step,
        field=name,
        expected="a number that is finite as a float32 once standardised",
        got=repr(columns.values[name].tolist()[step]),
    )


def _scale(values: NDArray[np.float64], mean: float | None, std: float | None) -> FloatArray:
    if mean is None or std is None:
        raise ValueError("expected a fitted schema: mean and standard deviation are not known")
    return np.asarray((values - mean) / std, np.float32)


def _angles(period: int) -> FloatArray:
    turns = [2 * math.pi * step / period for step in range(period)]
    return np.array([(math.sin(turn), math.cos(turn)) for turn in turns], np.float32)


# A table instead of vectorised sin and cos: faster, and the same bits for any chunk length.
_MINUTE_ANGLES = _angles(_MINUTES)
_WEEKDAY_ANGLES = _angles(7)
