"""Reads event columns from a table, and fits an event schema to it: for training and evaluation.

Validation is less strict than for requests in two ways, as tables are written: a NaN is a missing
number, and integers may represent categories (by their digits). Booleans as 0 and 1 or as strings,
and dates and times without an offset (in the schema's time zone, of two possible times the earlier)
are read unless the field's options reject them. `resolve_forms` sets these options to the forms
that the training table has, so that the service accepts what training accepted. Everything else is
rejected with row and column; so are integers that are probably epoch seconds (`EPOCH_SECONDS`),
which would be dates in 1970.

Only values that the schema does not specify are fitted. Pass training rows only: fitting on
held-out rows is leakage.

Polars is used here, but not in serving.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.calendar import zone_table
from models.events.columns import BoolArray, EventColumns
from models.events.encode import Clock, event_times, gaps_ms, log_gap, transformed
from models.events.parse import (
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    TRUTH,
    datetime_ms,
    epoch_ms,
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
from models.spec.resets import ResetPolicy, find_resets, segments_of

EPOCH_SECONDS = range(300_000_000, 4_200_000_000)
"""Integer columns with all values in this range are rejected as epoch seconds. As seconds these are
times of 1979 to 2103; as milliseconds, of January and February 1970."""

_HAS_OFFSET = r"([Zz]|[+-]\d{2}:?\d{2})$"
_EXPECTED_TIME = "an RFC 3339 timestamp from 1900 to before 2200"
_STRINGS = (pl.String, pl.Categorical, pl.Enum)


def columns_from_frame(schema: EventSchema, frame: pl.DataFrame) -> EventColumns:
    """Convert the rows of a table to events, in their order.

    Args:
        schema: the event schema; fitted or not.
        frame: one column per field, with its name; other columns are ignored. A column
            may be missing if the field is optional; its values are then absent.

    Raises:
        DataError: `index` is the row, `field` the column.
    """
    present: dict[str, BoolArray] = {}
    values: dict[str, NDArray[Any]] = {}
    for field in schema.fields:
        if field.name in frame.columns:
            column = frame[field.name]
        elif field.optional:
            column = pl.Series(field.name, [None] * frame.height, pl.Null)
        else:
            raise DataError(
                field=field.name, expected="a column of that name", got=f"{frame.columns}"
            )
        there, found = _read(schema, field, column)
        if not field.optional:
            _reject(column, ~there, "a value", got="none")
        present[field.name] = there
        values[field.name] = found
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
    schema: EventSchema, field: EventField, column: pl.Series
) -> tuple[BoolArray, NDArray[Any]]:
    if column.dtype == pl.Null:
        blank = {NumericField: np.float64, TimestampField: np.int64, BooleanField: np.bool_}
        if isinstance(field, CategoricalField):
            return np.zeros(len(column), np.bool_), np.full(len(column), "", object)
        return np.zeros(len(column), np.bool_), np.zeros(len(column), blank[type(field)])
    match field:
        case NumericField():
            return _numeric(column)
        case CategoricalField():
            return _categorical(column)
        case BooleanField():
            return _boolean(field, column)
        case TimestampField():
            return _timestamp(schema, field, column)


def _numeric(column: pl.Series) -> tuple[BoolArray, NDArray[Any]]:
    if not column.dtype.is_numeric():
        raise _wrong_type(column, "numbers")
    floats = column.cast(pl.Float64).fill_nan(None)
    present = floats.is_not_null().to_numpy()
    values = floats.fill_null(0.0).to_numpy() + 0.0
    _reject(column, ~np.isfinite(values), "a finite number", got="infinity")
    return present, values


def _categorical(column: pl.Series) -> tuple[BoolArray, NDArray[Any]]:
    if not isinstance(column.dtype, _STRINGS) and not column.dtype.is_integer():
        raise _wrong_type(column, "strings")
    strings = column.cast(pl.String)
    present = strings.is_not_null().to_numpy()
    lengths = strings.str.len_chars().fill_null(1).to_numpy()
    wrong = (lengths < 1) | (lengths > MAX_CATEGORY_CHARS)
    expected = f"a category of 1 to {MAX_CATEGORY_CHARS} characters"
    _reject(column, wrong, expected, got=lambda row: f"one of {lengths[row]}")
    values = np.empty(len(column), object)
    values[:] = strings.fill_null("").to_list()
    return present, values


def _boolean(field: BooleanField, column: pl.Series) -> tuple[BoolArray, NDArray[Any]]:
    is_text = isinstance(column.dtype, _STRINGS)
    if column.dtype != pl.Boolean and not column.dtype.is_integer() and not is_text:
        raise _wrong_type(column, "booleans")
    present = column.is_not_null().to_numpy()
    if column.dtype != pl.Boolean and field.coerce is False:
        expected = "true or false (with `coerce: true` in the field also 1, 0 and strings)"
        _reject(column, present, expected, got=lambda row: repr(column[row]))
    if is_text:
        lower = column.cast(pl.String).str.strip_chars().str.to_lowercase()
        parsed = lower.replace_strict(TRUTH, default=None, return_dtype=pl.Boolean)
        wrong = (column.is_not_null() & parsed.is_null()).to_numpy()
        _reject(column, wrong, "true or false", got=lambda row: repr(column[row]))
        column = parsed
    values = column.fill_null(False if column.dtype == pl.Boolean else 0).to_numpy()
    if column.dtype != pl.Boolean:
        _reject(column, (values != 0) & (values != 1), "0 or 1", lambda row: f"{values[row]}")
    return present, values.astype(np.bool_)


def _timestamp(
    schema: EventSchema, field: TimestampField, column: pl.Series
) -> tuple[BoolArray, NDArray[Any]]:
    present = column.is_not_null().to_numpy()
    dtype = column.dtype
    if field.without_offset == "reject" and (without := _local_times(column).to_numpy()).any():
        first = column[int(np.argmax(without))]
        expected = _EXPECTED_TIME
        if dtype != pl.String or _naive(first) is not None:
            expected = (
                "an offset, such as Z or +01:00 (with `without_offset: local` in the field, times "
                f"of {schema.timezone} have none)"
            )
        _reject(column, without, expected, got=f"{first}")
    if field.epoch == "s" and dtype.is_numeric():
        seconds = column.cast(pl.Float64).fill_nan(None).fill_null(0.0).to_numpy()
        values = np.round(np.clip(seconds, -1e11, 1e11) * 1000).astype(np.int64)
    elif dtype.is_integer():
        # Integers that overflow int64 are out of range, and must not wrap around into it.
        values = column.cast(pl.Int64, strict=False).fill_null(MAX_TIMESTAMP_MS).to_numpy()
        _check_milliseconds(column, values, present)
    elif isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        values = _epoch_ms(column)
    elif isinstance(dtype, (pl.Datetime, pl.Date)):
        local = _epoch_ms(column.cast(pl.Datetime("us")))
        values = _from_local(schema, column, local, present)
    elif dtype == pl.String:
        values = _from_strings(schema, column, present)
    else:
        raise _wrong_type(column, "timestamps")
    wrong = present & ((values < MIN_TIMESTAMP_MS) | (values >= MAX_TIMESTAMP_MS))
    expected = "a time from 1900-01-01 to before 2200-01-01"
    _reject(column, wrong, expected, got=lambda row: f"{column[row]}")
    return present, np.where(present, values, 0)


def _check_milliseconds(column: pl.Series, values: NDArray[np.int64], present: BoolArray) -> None:
    def got(row: int) -> str:
        moment = np.datetime64(int(values[row]), "s")
        return (
            f"{values[row]}, which is {moment}Z in epoch seconds: multiply by 1,000, or write "
            "`epoch: s` in the field"
        )

    there = values[present]
    if there.size and all(int(end) in EPOCH_SECONDS for end in (np.min(there), np.max(there))):
        _reject(column, present, "epoch milliseconds", got=got)


def _epoch_ms(column: pl.Series) -> NDArray[np.int64]:
    """Milliseconds since 1970-01-01T00:00 in UTC or, without a zone, in local time."""
    micros = column.dt.timestamp("us").fill_null(0).to_numpy()
    return np.asarray(micros // 1000, np.int64)


def _from_strings(schema: EventSchema, column: pl.Series, present: BoolArray) -> NDArray[np.int64]:
    values = np.zeros(len(column), np.int64)
    alike = epoch_ms(column.drop_nulls().to_list())
    if alike is not None:
        values[present] = alike
        return values
    naive = np.zeros(len(column), np.bool_)
    for row, text in enumerate(column.to_list()):
        if text is None:
            continue
        try:
            values[row] = rfc3339_ms(text)
        except ValueError as error:
            local = _naive(text)
            if local is None:
                raise DataError(
                    index=row,
                    field=column.name,
                    expected=_EXPECTED_TIME,
                    got=repr(text),
                ) from error
            values[row] = datetime_ms(local)
            naive[row] = True
    if naive.any():
        moments = _from_local(schema, column, values, present & naive)
        values = np.where(naive, moments, values)
    return values


def _naive(text: str) -> datetime | None:
    """Parse a date and time without an offset as if in UTC; None for other strings."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else None


def _from_local(
    schema: EventSchema, column: pl.Series, local_ms: NDArray[np.int64], present: BoolArray
) -> NDArray[np.int64]:
    moments, exists = zone_table(schema.timezone).to_utc(local_ms)

    def skipped(row: int) -> str:
        return f"{np.datetime64(int(local_ms[row]), 'ms')}, which clocks skipped"

    expected = f"a local time that exists in {schema.timezone}"
    _reject(column, present & ~exists, expected, got=skipped)
    return moments


def _reject(
    column: pl.Series, wrong: BoolArray, expected: str, got: str | Callable[[int], str]
) -> None:
    """Raise the error of the first row that is wrong, if there is one."""
    if wrong.any():
        row = int(np.argmax(wrong))
        text = got if isinstance(got, str) else got(row)
        raise DataError(index=row, field=column.name, expected=expected, got=text)


def _wrong_type(column: pl.Series, wanted: str) -> DataError:
    return DataError(
        field=column.name, expected=f"a column of {wanted}", got=f"one of {column.dtype}"
    )


NO_POLICY = ResetPolicy()


def fit_schema(
    schema: EventSchema,
    frame: pl.DataFrame,
    *,
    stream: str,
    order: str | None = None,
    resets: ResetPolicy = NO_POLICY,
) -> EventSchema:
    """Fit every number and vocabulary that the schema does not specify.

    A numeric field gets mean and (population) standard deviation of its transformed, present
    values; a constant one gets deviation 1. With `normalisation` it also gets the usual deviation
    of a stream, the median of those that are not constant. A categorical gets its most frequent
    categories, at most `max_vocabulary`, by decreasing frequency and then by name. A timestamp gets
    mean and deviation of log(1 + gap), with gaps as serving computes them, stream by stream.

    Args:
        schema: the schema; its specified numbers are kept.
        frame: the training rows.
        stream: column with the name of each row's stream.
        order: column that orders a stream's events; ties, and all rows if
            it is None, keep their order.
        resets: when the model resets states by itself: the first event of a session has no gap.

    Raises:
        DataError: a missing column, a value that the schema rejects, or numbers too
            large to have a finite deviation.
    """
    for name in (stream, order):
        if name is not None and name not in frame.columns:
            raise DataError(field=name, expected="a column of that name", got=f"{frame.columns}")
    keys = [stream] if order is None else [stream, order]
    ordered = frame.sort(keys, maintain_order=True)
    columns = columns_from_frame(schema, ordered)
    lengths = ordered[stream].rle().struct.field("len").to_numpy()
    sessions = _sessions(schema, columns, lengths.tolist(), resets)
    fields = [_fit(field, columns, sessions) for field in schema.fields]
    return schema.model_copy(update={"fields": tuple(fields)})


def _fit(
    field: EventField, columns: EventColumns, sessions: Sequence[tuple[int, int]]
) -> EventField:
    present = columns.present[field.name]
    values = columns.values[field.name]
    if field.fitted:
        return field
    match field:
        case NumericField():
            numbers = transformed(field, values)
            mean, std = _moments(field.name, numbers[present])
            update: dict[str, Any] = {
                "mean": mean if field.mean is None else field.mean,
                "std": std if field.std is None else field.std,
            }
            own = field.normalisation
            if own is not None and own.std is None:
                usual = _usual_deviation(numbers, present, sessions, own.prior_events)
                update["normalisation"] = own.model_copy(update={"std": usual or update["std"]})
            return field.model_copy(update=update)
        case CategoricalField():
            counts = Counter(values[present].tolist())
            ranked = sorted(counts, key=lambda name: (-counts[name], name))
            return field.model_copy(update={"vocabulary": tuple(ranked[: field.max_vocabulary])})
        case TimestampField():
            mean, std = _moments(field.name, _log_gaps(present, values, sessions))
            return field.model_copy(
                update={
                    "gap_mean": mean if field.gap_mean is None else field.gap_mean,
                    "gap_std": std if field.gap_std is None else field.gap_std,
                }
            )
        case BooleanField():
            return field


def _moments(name: str, values: NDArray[np.float64]) -> tuple[float, float]:
    if len(values) == 0:
        return 0.0, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(np.mean(values)), float(np.std(values))
    if not np.isfinite(mean) or not np.isfinite(std):
        raise DataError(
            field=name,
            expected="numbers with a finite mean and deviation",
            got=f"numbers up to {float(np.max(np.abs(values))):g}; try transform: signed_log1p",
        )
    constant = bool(np.min(values) == np.max(values)) or std == 0
    return mean, 1.0 if constant else std


def _usual_deviation(
    numbers: NDArray[np.float64],
    present: NDArray[np.bool_],
    sessions: Sequence[tuple[int, int]],
    at_least: int,
) -> float | None:
    """The median of the sessions' deviations, of those with `at_least` values if there are any.

    None if every session is constant.
    """
    kept = [numbers[start:stop][present[start:stop]] for start, stop in sessions]
    long = [values for values in kept if len(values) >= at_least]
    varying = [values for values in long or kept if len(values) and np.ptp(values) > 0]
    positive = [float(np.std(values)) for values in varying]
    return float(np.median(positive)) if positive else None


def _sessions(
    schema: EventSchema, columns: EventColumns, lengths: Sequence[int], resets: ResetPolicy
) -> list[tuple[int, int]]:
    """The rows [start, stop) of each session, stream by stream."""
    sessions = []
    start = 0
    for length in lengths:
        times = event_times(schema, columns[start : start + length])
        cuts = segments_of(length, find_resets(resets, length, 0, times=times))
        sessions += [(start + first, start + end) for first, end in cuts]
        start += length
    return sessions


def _log_gaps(
    present: NDArray[np.bool_],
    times_ms: NDArray[np.int64],
    sessions: Sequence[tuple[int, int]],
) -> NDArray[np.float64]:
    gaps = [np.zeros(0, np.int64)]
    for start, stop in sessions:
        gaps.append(gaps_ms(times_ms[start:stop][present[start:stop]], Clock())[0])
    return log_gap(np.concatenate(gaps))
