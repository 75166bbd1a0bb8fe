"""Reads a table from a CSV, JSON Lines or Parquet file, with equal rows from each.

Errors name the file, the column and the row (data rows counted from 1). A column that is named
twice is rejected, because the libraries would silently rename or drop one; so are files in another
encoding than UTF-8, and with other delimiters than commas.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import simdjson

from models.errors import DataError, ModelsError
from models.events.cells import parse_cells
from models.events.schema import EventSchema

READERS = (".csv", ".jsonl", ".ndjson", ".parquet")
_START_BYTES = 64
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte order marks of other encodings than UTF-8."""
_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_CONTENTS = (
    (b"PAR1", ".parquet", "Parquet"),
    (b"PK\x03\x04", ".xlsx", "a ZIP archive, as Excel writes: save the sheet as CSV"),
    (b"\x1f\x8b", ".gz", "compressed data"),
    (b"{", ".jsonl", "JSON Lines"),
    (b"[", ".json", "one JSON array: write each of its objects on a line of its own"),
)
"""First bytes of files, the suffix for them, and what they are."""


def read_data(path: Path, schema: EventSchema | None) -> pl.DataFrame:
    """Read a table of events: `.csv`, `.jsonl`, `.ndjson` or `.parquet`.

    Numbers and booleans (`true`, `false`, 1, 0) in a CSV file are read as the schema's fields
    say, or as strings if there is none; an empty cell is an absent value.

    Raises:
        DataError: the file cannot be read, names a column twice, or a cell is not what its
            field says.
    """
    path = Path(path)
    kind = _check_kind(path)
    try:
        check_duplicate_names(path)
        if kind == ".parquet":
            return pl.read_parquet(path)
        if kind == ".csv":
            frame = pl.read_csv(path, infer_schema=False)
        else:
            return pl.read_ndjson(path, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from error
    return frame if schema is None else _parse_columns(path, schema, frame)


def _check_kind(path: Path) -> str:
    """The kind of a file by its suffix; DataError if there is no such file, or it is empty."""
    kind = path.suffix.lower()
    if kind not in READERS:
        raise DataError(expected=f"{path}: a file ending in {', '.join(READERS)}", got=repr(kind))
    if not path.is_file():
        raise DataError(expected="an existing file", got=str(path))
    with path.open("rb") as file:
        check_content(str(path), kind, file.read(_START_BYTES))
    return kind


def check_content(name: str, kind: str, start: bytes) -> None:
    """Reject a file that is empty, or whose first bytes are of another kind than its suffix says.

    Args:
        name: of the file, for errors.
        kind: its suffix, one of `READERS`.

    Raises:
        DataError: it is such a file.
    """
    if not start:
        raise DataError(expected=f"{name}: a table with one row per event", got="an empty file")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    suffix, content = next(
        ((suffix, content) for first, suffix, content in _CONTENTS if text.startswith(first)),
        (".csv", "text"),
    )
    # text in another encoding has an error of its own
    is_encoded = kind != ".parquet" and not text[:1].isascii()
    if suffix == kind or (suffix, kind) == (".jsonl", ".ndjson") or is_encoded:
        return
    named = f"; name it {suffix}" if suffix in READERS else ""
    raise DataError(expected=f"{name}: a table in {kind[1:]} form", got=f"{content}{named}")


def _unreadable(path: Path, error: Exception) -> DataError:
    """The error of a file that polars cannot read, with its place if that can be found."""
    kind = path.suffix.lower()
    if kind != ".parquet":
        check_encoding(path)
    if kind == ".csv":
        _check_cells(path)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(expected=f"{path}: a table in {kind[1:]} form", got=repr(reason))


def check_encoding(path: Path) -> None:
    """Reject a text file that is not UTF-8, with the line; nothing if it is.

    Raises:
        DataError: it is not.
    """
    with path.open("rb") as lines:
        start = lines.read(4)
        for mark, encoding in _MARKS.items():
            if start.startswith(mark):
                raise DataError(
                    expected=f"{path}: UTF-8",
                    got=f"{encoding}; convert it: iconv -f {encoding} -t UTF-8",
                )
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                shown = line[max(0, error.start - 10) : error.start + 5].decode("latin-1")
                raise DataError(
                    expected=f"{path}, line {number}: UTF-8",
                    got=f"the byte 0x{line[error.start]:02x}, as in {shown!r} of ISO 8859-1; "
                    "convert it: iconv -f ISO-8859-1 -t UTF-8",
                ) from error


def check_duplicate_names(path: Path) -> None:
    """Reject a CSV file that names a column twice, or JSON Lines with a member twice in a row.

    Raises:
        DataError: the file names one twice.
        OSError, PolarsError: the file cannot be read.
    """
    match path.suffix.lower():
        case ".csv":
            header = pl.read_csv(path, has_header=False, n_rows=1, infer_schema=False).row(0)
            check_header(str(path), [name or "" for name in header])
        case ".jsonl" | ".ndjson":
            _check_members(path)


def check_header(name: str, header: Sequence[str]) -> None:
    """Reject a header with other delimiters than commas, or with a duplicate column: polars would
    rename the second one.

    Args:
        name: of the file, for errors.
        header: the cells of its first line.

    Raises:
        DataError: it is such a header.
    """
    first = ",".join(header)
    for delimiter, called in _DELIMITERS.items():
        if first.count(delimiter) >= len(header):
            raise DataError(
                expected=f"{name}, line 1: columns separated by commas",
                got=f"{called}: {first[:60]!r}; convert it: polars.read_csv(..., separator="
                f"{delimiter!r}, decimal_comma=True if numbers have one).write_csv(...)",
            )
    for column, count in Counter(column for column in header if column).items():
        if count > 1:
            at = ", ".join(str(at) for at, each in enumerate(header, start=1) if each == column)
            raise DataError(
                field=column,
                expected=f"{name}, line 1: columns of different names",
                got=f"{column!r} as columns {at}",
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
    typed, invalid = parse_cells(schema, frame)
    if invalid:
        raise invalid[0].error().in_table(str(path))
    return typed


def package_folder(package: str, extras: str = "'.[train]'") -> Path:
    """The directory of an installed package whose data are read.

    Nothing of it is imported: some of these packages need modules that newer Pythons lack.

    Raises:
        ModelsError: it is not installed; the message names `extras` to install.
    """
    module = find_spec(package)
    if module is None or not module.submodule_search_locations:
        raise ModelsError(
            f"expected the package `{package}` for its data: pip install ./client {extras}"
        )
    return Path(next(iter(module.submodule_search_locations)))
