"""Parses text cells, of CSV files and JSON Lines, to the types that the fields of a schema have.

Each cell is read by itself, whatever the others of its column are.
"""

from __future__ import annotations

import polars as pl

from models.events.frame import COERCE_HINT, InvalidRows
from models.events.parse import TRUTH
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)

_NUMBER = r"^-?\d+(\.\d+)?$"


def parse_cells(schema: EventSchema, frame: pl.DataFrame) -> tuple[pl.DataFrame, list[InvalidRows]]:
    """Parse the columns of text that fields have; other columns are left as they are.

    Returns:
        The frame with numbers, booleans and epoch times; booleans that are written as 1 and 0 as
        integers, or as strings if others are not. And all rows with a cell that is no such value,
        by column; it is null.
    """
    typed: list[pl.Series] = []
    invalid: list[InvalidRows] = []
    for field in schema.fields:
        if field.name in frame.columns and frame[field.name].dtype == pl.String:
            column = frame[field.name]
            values, expected = _parse(field, column)
            wrong = column.is_not_null() & values.is_null()
            if wrong.any():
                invalid.append(
                    InvalidRows(
                        field.name,
                        wrong.to_numpy(),
                        expected,
                        lambda row, column=column: repr(column[row]),  # type: ignore[misc]
                    )
                )
            typed.append(values.alias(field.name))
    return frame.with_columns(typed), invalid


def _parse(field: EventField, column: pl.Series) -> tuple[pl.Series, str]:
    match field:
        case NumericField():
            return column.str.strip_chars().cast(pl.Float64, strict=False), "a number"
        case BooleanField(coerce=False):
            return _parse_true_false(column), COERCE_HINT
        case BooleanField():
            return _parse_booleans(column), "true or false"
        case TimestampField():
            return _parse_times(field, column)
        case CategoricalField():
            return column, ""


def _parse_true_false(column: pl.Series) -> pl.Series:
    lower = column.str.strip_chars().str.to_lowercase()
    words = {word: value for word, value in TRUTH.items() if word.isalpha()}
    return lower.replace_strict(words, default=None, return_dtype=pl.Boolean)


def _parse_booleans(column: pl.Series) -> pl.Series:
    """Cells as booleans, as integers if all are 1 or 0, or as strings if some are; null if none."""
    lower = column.str.strip_chars().str.to_lowercase()
    known = lower.is_in(list(TRUTH))
    if lower.filter(known).is_in(["1", "0"]).any():
        kept = pl.select(pl.when(known).then(lower)).to_series()
        return (
            kept.cast(pl.Int8, strict=False) if not lower.is_in(["true", "false"]).any() else kept
        )
    return lower.replace_strict(TRUTH, default=None, return_dtype=pl.Boolean)


def _parse_times(field: TimestampField, column: pl.Series) -> tuple[pl.Series, str]:
    """Numbers as epoch times; strings stay. If there are both, numbers become RFC 3339."""
    is_number = column.str.contains(_NUMBER)
    if not is_number.any():
        return column, ""
    unit, number = ("seconds", pl.Float64) if field.epoch == "s" else ("milliseconds", pl.Int64)
    numbers = column.cast(number, strict=False)
    if (is_number | column.is_null()).all():
        return numbers, f"epoch {unit}"
    moments = (
        (numbers * 1000).round().cast(pl.Int64, strict=False) if unit == "seconds" else numbers
    )
    written = moments.cast(pl.Datetime("ms")).dt.strftime("%Y-%m-%dT%H:%M:%S%.3fZ")
    mixed = pl.select(pl.when(is_number).then(written).otherwise(column)).to_series()
    return mixed, f"epoch {unit}"
