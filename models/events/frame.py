"""Reads event columns from a table: for training, evaluation and backfills.

Validation is less strict than for requests in two ways, as tables are written: a NaN is a missing
number, and integers may represent categories (by their digits). Booleans as 0 and 1 or as strings,
and dates and times without an offset (in the schema's time zone, of two possible times the earlier)
are read unless the field's options reject them. `resolve_forms` sets these options to the forms
that the training table has, so that the service accepts what training accepted. Everything else is
rejected: values with row and column, all of them at once (`canonical_frame`), and columns of a type
that the field has not; so are columns of integers that are all probably epoch seconds
(`EPOCH_SECONDS`), which would be dates in 1970.

Polars is used here, but not in serving.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.calendar import zone_table
from models.events.columns import BoolArray, EventColumns
from models.events.parse import (
    EPOCH_SECONDS,
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    TRUTH,
    datetime_ms,
    epoch_ms,
    parse_uniform_strings,
    rfc3339_ms,
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
from models.events.values import FINITE, standardise

COERCE_HINT = "true or false (with `coerce: true` in the field also 1, 0 and strings)"
_HAS_OFFSET = r"([Zz]|[+-]\d{2}:?\d{2})$"
_EXPECTED_TIME = "an RFC 3339 timestamp from 1900 to before 2200"
_STRINGS = (pl.String, pl.Categorical, pl.Enum)
_USUAL_SHAPE = 16
"""Of so many strings of a shape, all are parsed at once."""

_NAIVE_SUFFIXES = {"0000-00-00": "T00:00:00Z", "0000-00-00 00:00:00": "Z"}
"""By the shape of a date and time without an offset, what makes it one in UTC."""

_CANONICAL: dict[type, Any] = {
    NumericField: pl.Float64,
    CategoricalField: pl.String,
    BooleanField: pl.Boolean,
    TimestampField: pl.Int64,
}


class InvalidRows(NamedTuple):
    """Rows of a table whose value in a column is rejected.

    Attributes:
        field: the column.
        rows: bool [T], at least one of them true.
        expected: description of valid values.
        got: describes the value of one of the rows.
    """

    field: str
    rows: BoolArray
    expected: str
    got: Callable[[int], str]

    def error(self) -> DataError:
        """The error of the first of the rows."""
        row = int(np.argmax(self.rows))
        return DataError(index=row, field=self.field, expected=self.expected, got=self.got(row))


def columns_from_frame(schema: EventSchema, frame: pl.DataFrame) -> EventColumns:
    """Convert the rows of a table to events, in their order.

    Args:
        schema: the event schema; fitted or not.
        frame: one column per field, with its name; other columns are ignored. A column
            may be missing if the field is optional; its values are then absent.

    Raises:
        DataError: `index` is the row, `field` the column.
    """
    canonical, invalid = canonical_frame(schema, frame)
    if invalid:
        raise invalid[0].error()
    return columns_from_canonical(schema, canonical)


def canonical_frame(
    schema: EventSchema, frame: pl.DataFrame
) -> tuple[pl.DataFrame, list[InvalidRows]]:
    """Convert the columns of fields to one type for each kind of field.

    Args:
        schema, frame: as for `columns_from_frame`.

    Returns:
        One column per field, in the order of the schema: Float64, String, Boolean, or Int64 with
        epoch milliseconds; null if absent. And all rows that are rejected, by column and reason;
        their values there are of no use.

    Raises:
        DataError: a column is missing, or is of another type.
    """
    columns: list[pl.Series] = []
    invalid: list[InvalidRows] = []
    for field in schema.fields:
        if field.name in frame.columns:
            column = frame[field.name]
        elif field.optional:
            column = pl.Series(field.name, [None] * frame.height, pl.Null)
        else:
            raise DataError(
                field=field.name, expected="a column of that name", got=f"{frame.columns}"
            )
        values = _read(schema, field, column, invalid)
        if not field.optional:
            absent = _missing(column) if values.dtype == pl.Float64 else column.is_null()
            expected = "a value (with `optional: true` in the field, it may be absent)"
            _reject(invalid, column, absent.to_numpy(), expected, got="none")
        columns.append(values.alias(field.name))
    return pl.DataFrame(columns), invalid


def find_overflows(schema: EventSchema, canonical: pl.DataFrame) -> list[InvalidRows]:
    """The numbers of a `canonical_frame` that are not finite once they are standardised."""
    invalid: list[InvalidRows] = []
    for field in schema.fields:
        if isinstance(field, NumericField) and field.fitted:
            column = canonical[field.name]
            wrong = ~np.isfinite(standardise(field, column.fill_null(0.0).to_numpy()))
            _reject(invalid, column, wrong, FINITE, got=column.cast(pl.String).__getitem__)
    return invalid


def columns_from_canonical(schema: EventSchema, frame: pl.DataFrame) -> EventColumns:
    """Make events of the valid rows of a `canonical_frame`. Nothing is validated."""
    present: dict[str, BoolArray] = {}
    values: dict[str, NDArray[Any]] = {}
    for field in schema.fields:
        column = frame[field.name]
        present[field.name] = column.is_not_null().to_numpy()
        if isinstance(field, CategoricalField):
            strings = np.empty(len(column), object)
            strings[:] = column.fill_null("").to_list()
            values[field.name] = strings
        else:
            blank = False if column.dtype == pl.Boolean else 0
            array = column.fill_null(blank).to_numpy(writable=True)
            # the sum has no negative zero
            values[field.name] = array + 0.0 if column.dtype == pl.Float64 else array
    return EventColumns(frame.height, present, values)


def resolve_forms(schema: EventSchema, frame: pl.DataFrame) -> EventSchema:
    """Resolve options of the schema that are open to the forms of values that the table has.

    So the service accepts the forms that training accepted: booleans that are written as
    numbers or strings, and times without an offset.
    """

    def resolve(field: EventField) -> EventField:
        if isinstance(field, BooleanField) and field.coerce is None and field.name in frame:
            dtype = frame[field.name].dtype
            return field.model_copy(update={"coerce": dtype not in (pl.Boolean, pl.Null)})
        is_open = isinstance(field, TimestampField) and field.without_offset is None
        if is_open and field.name in frame:
            is_local = bool(_local_times(frame[field.name]).any())
            return field.model_copy(update={"without_offset": "local" if is_local else "reject"})
        return field

    return schema.model_copy(update={"fields": tuple(resolve(field) for field in schema.fields)})


def _local_times(column: pl.Series) -> pl.Series:
    """Whether each time has no offset."""
    dtype = column.dtype
    if dtype == pl.String:
        return (~column.str.contains(_HAS_OFFSET)).fill_null(False)
    has_none = dtype == pl.Date or (isinstance(dtype, pl.Datetime) and dtype.time_zone is None)
    return column.is_not_null() & pl.Series([has_none])


def _read(
    schema: EventSchema, field: EventField, column: pl.Series, invalid: list[InvalidRows]
) -> pl.Series:
    if column.dtype == pl.Null:
        return column.cast(_CANONICAL[type(field)])
    match field:
        case NumericField():
            return _numeric(column, invalid)
        case CategoricalField():
            return _categorical(column, invalid)
        case BooleanField():
            return _boolean(field, column, invalid)
        case TimestampField():
            return _timestamp(schema, field, column, invalid)


def _missing(column: pl.Series) -> pl.Series:
    """Whether each number is absent: null or NaN."""
    return column.is_null() | column.is_nan() if column.dtype.is_float() else column.is_null()


def _numeric(column: pl.Series, invalid: list[InvalidRows]) -> pl.Series:
    if not column.dtype.is_numeric():
        raise _wrong_type(column, "numbers")
    floats = column.cast(pl.Float64).fill_nan(None)
    infinite = floats.is_infinite().fill_null(False).to_numpy()
    _reject(invalid, column, infinite, "a finite number", got="infinity")
    return floats


def _categorical(column: pl.Series, invalid: list[InvalidRows]) -> pl.Series:
    if not isinstance(column.dtype, _STRINGS) and not column.dtype.is_integer():
        raise _wrong_type(column, "strings")
    strings = column.cast(pl.String)
    lengths = strings.str.len_chars().fill_null(1).to_numpy()
    wrong = (lengths < 1) | (lengths > MAX_CATEGORY_CHARS)
    expected = f"a category of 1 to {MAX_CATEGORY_CHARS} characters"
    _reject(invalid, column, wrong, expected, got=lambda row: f"one of {lengths[row]}")
    return strings


def _boolean(field: BooleanField, column: pl.Series, invalid: list[InvalidRows]) -> pl.Series:
    if column.dtype == pl.Boolean:
        return column
    is_text = isinstance(column.dtype, _STRINGS)
    if not column.dtype.is_integer() and not is_text:
        raise _wrong_type(column, "booleans")
    present = column.is_not_null()
    if field.coerce is False and present.any():
        _raise(column, present.to_numpy(), COERCE_HINT, lambda row: repr(column[row]))
    if is_text:
        lower = column.cast(pl.String).str.strip_chars().str.to_lowercase()
        parsed = lower.replace_strict(TRUTH, default=None, return_dtype=pl.Boolean)
        wrong = (present & parsed.is_null()).to_numpy()
        _reject(invalid, column, wrong, "true or false", got=lambda row: repr(column[row]))
        return parsed
    wrong = (present & (column != 0) & (column != 1)).fill_null(False).to_numpy()
    _reject(invalid, column, wrong, "0 or 1", got=lambda row: f"{column[row]}")
    return column == 1


def _timestamp(
    schema: EventSchema, field: TimestampField, column: pl.Series, invalid: list[InvalidRows]
) -> pl.Series:
    dtype = column.dtype
    if dtype.is_float():
        column = column.fill_nan(None)
    present = column.is_not_null().to_numpy()
    if field.without_offset == "reject" and (without := _local_times(column).to_numpy()).any():
        hint = (
            "an offset, such as Z or +01:00 (with `without_offset: local` in the field, times "
            f"of {schema.timezone} have none)"
        )
        if dtype != pl.String:
            _raise(column, without, hint, lambda row: f"{column[row]}")
        without = without.copy()
        without[without] = [_naive(text) is not None for text in column.filter(without)]
        _reject(invalid, column, without, hint, got=column.__getitem__)
        column = column.set(pl.Series(without), None)
        present = present & ~without
    if field.epoch == "s" and dtype.is_numeric():
        seconds = column.cast(pl.Float64).fill_null(0.0).to_numpy()
        values = np.round(np.clip(seconds, -1e11, 1e11) * 1000).astype(np.int64)
    elif dtype.is_integer():
        # Integers that overflow int64 are out of range, and must not wrap around into it.
        values = column.cast(pl.Int64, strict=False).fill_null(MAX_TIMESTAMP_MS).to_numpy()
        _check_milliseconds(column, values, present)
    elif isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        values = _epoch_ms(column)
    elif isinstance(dtype, (pl.Datetime, pl.Date)):
        local = _epoch_ms(column.cast(pl.Datetime("us")))
        values = _from_local(schema, column, local, present, invalid)
    elif dtype == pl.String:
        values = _from_strings(schema, column, present, invalid)
    else:
        raise _wrong_type(column, "timestamps")
    wrong = present & ((values < MIN_TIMESTAMP_MS) | (values >= MAX_TIMESTAMP_MS))
    expected = "a time from 1900-01-01 to before 2200-01-01"
    _reject(invalid, column, wrong, expected, got=lambda row: f"{column[row]}")
    return pl.select(pl.when(pl.Series(present)).then(pl.Series(values))).to_series()


def _check_milliseconds(column: pl.Series, values: NDArray[np.int64], present: BoolArray) -> None:
    def got(row: int) -> str:
        moment = np.datetime64(int(values[row]), "s")
        return (
            f"{values[row]}, which is {moment}Z in epoch seconds: multiply by 1,000, or write "
            "`epoch: s` in the field"
        )

    there = values[present]
    if there.size and all(int(end) in EPOCH_SECONDS for end in (np.min(there), np.max(there))):
        _raise(column, present, "epoch milliseconds", got)


def _epoch_ms(column: pl.Series) -> NDArray[np.int64]:
    """Milliseconds since 1970-01-01T00:00 in UTC or, without a zone, in local time."""
    micros = column.dt.timestamp("us").fill_null(0).to_numpy()
    return np.asarray(micros // 1000, np.int64)


def _from_strings(
    schema: EventSchema, column: pl.Series, present: BoolArray, invalid: list[InvalidRows]
) -> NDArray[np.int64]:
    values = np.zeros(len(column), np.int64)
    alike = epoch_ms(column.drop_nulls().to_list())
    if alike is not None:
        values[present] = alike
        return values
    naive, wrong = np.zeros(len(column), np.bool_), np.zeros(len(column), np.bool_)
    rest = present.copy()
    for shape, rows in _rows_by_shape(column):
        suffix = _NAIVE_SUFFIXES.get(shape.partition(".")[0].replace("T", " "))
        strings = column.gather(rows) + (suffix or "")
        alike = parse_uniform_strings(strings.to_list())
        if alike is not None:
            values[rows], naive[rows], rest[rows] = alike, suffix is not None, False
    for row in np.flatnonzero(rest).tolist():
        text = column[row]
        try:
            values[row] = rfc3339_ms(text)
        except ValueError:
            local = _naive(text)
            naive[row], wrong[row] = local is not None, local is None
            values[row] = 0 if local is None else datetime_ms(local)
    _reject(invalid, column, wrong, _EXPECTED_TIME, got=lambda row: repr(column[row]))
    if naive.any():
        moments = _from_local(schema, column, values, present & naive, invalid)
        values = np.where(naive, moments, values)
    return values


def _rows_by_shape(column: pl.Series) -> list[tuple[str, NDArray[np.int64]]]:
    """The rows of each shape that many strings have; in a shape every digit is 0."""
    shapes = column.alias("shape").str.replace_all("[1-9]", "0").to_frame()
    grouped = shapes.with_row_index("row").drop_nulls().group_by("shape").agg("row")
    usual = grouped.filter(pl.col("row").list.len() >= _USUAL_SHAPE)
    return [(shape, np.asarray(rows, np.int64)) for shape, rows in usual.rows()]


def _naive(text: str) -> datetime | None:
    """Parse a date and time without an offset as if in UTC; None for other strings."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else None


def _from_local(
    schema: EventSchema,
    column: pl.Series,
    local_ms: NDArray[np.int64],
    present: BoolArray,
    invalid: list[InvalidRows],
) -> NDArray[np.int64]:
    moments, exists = zone_table(schema.timezone).to_utc(local_ms)

    def skipped(row: int) -> str:
        return f"{np.datetime64(int(local_ms[row]), 'ms')}, which clocks skipped"

    expected = (
        f"a local time that exists in {schema.timezone} (name the zone of the table, such as UTC, "
        "as `timezone`, or write offsets)"
    )
    _reject(invalid, column, present & ~exists, expected, got=skipped)
    return moments


def _reject(
    invalid: list[InvalidRows],
    column: pl.Series,
    wrong: BoolArray,
    expected: str,
    got: str | Callable[[int], str],
) -> None:
    """Add the rows that are wrong, if there are any."""
    if wrong.any():
        text = got
        invalid.append(
            InvalidRows(
                column.name, wrong, expected, (lambda _: text) if isinstance(text, str) else text
            )
        )


def _raise(column: pl.Series, wrong: BoolArray, expected: str, got: Callable[[int], str]) -> None:
    """Raise the error of a column whose form its field has not, at the first row that is wrong."""
    raise InvalidRows(column.name, wrong, expected, got).error()


def _wrong_type(column: pl.Series, wanted: str) -> DataError:
    return DataError(
        field=column.name, expected=f"a column of {wanted}", got=f"one of {column.dtype}"
    )
