"""Reads a table from a CSV, JSON Lines or Parquet file, with equal rows from each.

Errors name the file, the column and the row (data rows counted from 1). A column that is named
twice is rejected, because the libraries would silently rename or drop one.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import polars as pl
import simdjson

from models.errors import DataError
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventSchema,
    NumericField,
    TimestampField,
)
from models.spec.model import ModelSpec
from models.training.data import schema_of

READERS = (".csv", ".jsonl", ".ndjson", ".parquet")
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def read_data(path: Path, spec: ModelSpec) -> pl.DataFrame:
    """Read a table for a spec: `.csv`, `.jsonl`, `.ndjson` or `.parquet`.

    Numbers and booleans (`true`, `false`, 1, 0) in a CSV file are read as the spec's fields
    say; an empty cell is an absent value.

    Raises:
        DataError: the file cannot be read, names a column twice, or a cell is not what its
            field says.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in READERS:
        raise DataError(expected=f"{path}: a file ending in {', '.join(READERS)}", got=repr(kind))
    if not path.exists():
        raise DataError(expected="an existing file", got=str(path))
    try:
        check_duplicate_names(path)
        if kind == ".parquet":
            return pl.read_parquet(path)
        if kind == ".csv":
            frame = pl.read_csv(path, infer_schema=False)
        else:
            return pl.read_ndjson(path, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        if kind == ".csv":
            _check_cells(path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(expected=f"{path}: a table in {kind[1:]} form", got=repr(reason)) from error
    return _parse_columns(path, schema_of(spec), frame)


def check_duplicate_names(path: Path) -> None:
    """Reject a CSV file that names a column twice, or JSON Lines with a member twice in a row.

    Raises:
        DataError: the file names one twice.
        OSError, PolarsError: the file cannot be read.
    """
    match path.suffix.lower():
        case ".csv":
            _check_header(path)
        case ".jsonl" | ".ndjson":
            _check_members(path)


def _check_header(path: Path) -> None:
    """Reject a CSV file with a duplicate column: polars would rename the second one."""
    header = pl.read_csv(path, has_header=False, n_rows=1, infer_schema=False).row(0)
    for name, count in Counter(name for name in header if name).items():
        if count > 1:
            at = ", ".join(str(at) for at, each in enumerate(header, start=1) if each == name)
            raise DataError(
                field=name,
                expected=f"{path}, line 1: columns of different names",
                got=f"{name!r} as columns {at}",
            )


def _check_cells(path: Path) -> None:
    """Reject the first row of a CSV file that has more cells than the header, by its number."""
    with path.open(newline="", errors="replace") as lines:
        rows = csv.reader(lines)
        columns = len(next(rows, ()))
        for number, row in enumerate(rows, start=1):
            if len(row) > columns:
                raise DataError(
                    expected=f"{path}, row {number}: {columns} cells, as in the header",
                    got=str(len(row)),
                )


def _check_members(path: Path) -> None:
    """Reject a JSON Lines row with a duplicate member: polars would keep one of them.

    Lines that are not JSON objects are left to polars.
    """
    parser = simdjson.Parser()
    with path.open("rb") as lines:
        for line, text in enumerate(lines, start=1):
            try:
                row = parser.parse(text)
            except ValueError:
                return
            names = list(row.keys()) if isinstance(row, simdjson.Object) else []
            # the parser can be reused only once no reference to its document is left
            del row
            if len(set(names)) < len(names):
                name, count = Counter(names).most_common(1)[0]
                raise DataError(
                    field=name,
                    expected=f"{path}, line {line}: each member once",
                    got=f"{name!r} {count} times",
                )


def _parse_columns(path: Path, schema: EventSchema, frame: pl.DataFrame) -> pl.DataFrame:
    for field in schema.fields:
        if field.name not in frame.columns:
            continue
        column = frame[field.name]
        match field:
            case NumericField():
                cast, kind = column.str.strip_chars().cast(pl.Float64, strict=False), "a number"
            case BooleanField():
                lower = column.str.strip_chars().str.to_lowercase()
                cast = lower.replace_strict(_TRUTH, default=None, return_dtype=pl.Boolean)
                kind = "true or false"
            case TimestampField() if column.drop_nulls().head(1).str.contains(r"^-?\d+$").all():
                cast, kind = column.cast(pl.Int64, strict=False), "epoch milliseconds"
            case TimestampField() | CategoricalField():
                continue
        invalid = column.is_not_null() & cast.is_null()
        if invalid.any():
            row = int(invalid.arg_true()[0])
            raise DataError(
                field=field.name,
                expected=f"{path}, row {row + 1}: {kind}",
                got=repr(column[row]),
            )
        frame = frame.with_columns(cast.alias(field.name))
    return frame
