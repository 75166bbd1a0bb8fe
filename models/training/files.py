"""Reads a table from CSV, JSON Lines or Parquet files, with equal rows from each.

Errors name the file, the column and the row (data rows counted from 1). A column that is named
twice is rejected, because the libraries would silently rename or drop one; so are files in another
encoding than UTF-8, and with other delimiters than commas.
"""

from __future__ import annotations

import csv
import glob
import gzip
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote

import polars as pl
import simdjson

from models.errors import DataError, ModelsError
from models.events.cells import parse_cells
from models.events.frame import columns_from_frame
from models.events.schema import EventSchema

DELTA_LOG = "_delta_log"
READERS = (".csv", ".jsonl", ".ndjson", ".parquet")
_JSON = (".jsonl", ".ndjson")
_START_BYTES = 64
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading text in `.gz` raises if it is cut or damaged."""
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte order marks of other encodings than UTF-8."""
_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_PARTITION = re.compile(r"([^=/]+)=([^=/]*)").fullmatch
_CONTENTS = (
    (b"PAR1", ".parquet", "Parquet"),
    (b"PK\x03\x04", ".xlsx", "a ZIP archive, as Excel writes: save the sheet as CSV"),
    (b"\x1f\x8b", ".gz", "compressed data"),
    (b"{", ".jsonl", "JSON Lines"),
    (b"[", ".json", "one JSON array: write each of its objects on a line of its own"),
)
"""First bytes of files, the suffix for them, and what they are."""


def read_data(data: Path | Sequence[Path], schema: EventSchema | None) -> pl.DataFrame:
    """Read a table of events from `.csv`, `.jsonl`, `.ndjson` or `.parquet`, text also in `.gz`.

    Numbers and booleans (`true`, `false`, 1, 0) in a CSV file are read as the schema's fields
    say, or as strings if there is none; an empty cell is an absent value. Parts of a path such as
    `day=2025-01-31` are columns.

    Args:
        data: files, folders with files, and globs; the rows of several files follow one another in
            the order of their names.

    Raises:
        DataError: a file cannot be read, names a column twice, or a cell is not what its
            field says.
    """
    arguments = [data] if isinstance(data, (str, Path)) else data
    paths = sorted(path for argument in arguments for path in _find_files(Path(argument)))
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise DataError(expected="each file once", got=", ".join(map(str, paths)))
    frames = [_read_file(path, schema) for path in paths]
    if len(frames) == 1:
        return frames[0]
    if schema is not None:
        for path, frame in zip(paths, frames, strict=True):
            try:
                columns_from_frame(schema, frame)
            except DataError as error:
                # a row of all files together would not be found
                raise error.in_table(str(path)) from error
    try:
        return pl.concat(frames, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(
            expected=f"{paths[0].parent}: files with columns of the same types", got=str(error)
        ) from error


def _find_files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return files_below(path)
    if glob.has_magic(str(path)) and not path.exists():
        if not (names := glob.glob(str(path), recursive=True)):
            raise DataError(expected=f"{path}: files that match", got="none")
        return chain.from_iterable(_find_files(Path(name)) for name in names)
    return [path]


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and those below, also behind links, without hidden ones.

    Raises:
        DataError: there is none, or a folder cannot be read.
    """

    def reject(error: OSError) -> None:
        raise DataError(
            expected=f"{error.filename}: a folder that may be read", got=str(error.strerror)
        ) from error

    files: list[Path] = []
    paths: dict[str, str] = {}
    for path, folders, names in os.walk(folder, onerror=reject, followlinks=True):
        # a link to a folder above would never end
        if (other := paths.setdefault(os.path.realpath(path), path)) != path:
            raise DataError(expected=f"{path}: each folder once", got=f"it also as {other}")
        if DELTA_LOG in folders:
            raise DataError(
                expected=f"{path}: files, or the table as an argument of `carry backfill`",
                got="a table of Delta Lake",
            )
        folders[:] = [each for each in folders if not _is_hidden(each)]
        files += [Path(path, each) for each in names if not _is_hidden(each)]
    if not files:
        raise DataError(expected=f"{folder}: a folder with files of events", got="none")
    return files


def _is_hidden(name: str) -> bool:
    """Whether other programs wrote a file or a folder for themselves, such as `_SUCCESS`."""
    return name[0] in "._" and "=" not in name


def partition_values(path: str) -> dict[str, str | None]:
    """Values of the columns that are written into a path or a URL, as Hive does."""
    folders = (path.partition("?")[0] if "://" in path else path).split("/")[:-1]
    pairs = {match[1]: unquote(match[2]) for match in map(_PARTITION, folders) if match}
    return {name: None if value == _NO_PARTITION else value for name, value in pairs.items()}


def _read_file(path: Path, schema: EventSchema | None) -> pl.DataFrame:
    kind = _check_kind(path)
    try:
        check_duplicate_names(path)
        if kind == ".parquet":
            frame = pl.read_parquet(path, glob=False, hive_partitioning=False)
        elif kind == ".csv":
            frame = pl.read_csv(path, infer_schema=False, glob=False)
        else:
            frame = pl.read_ndjson(path, infer_schema_length=None)
    except (OSError, *_DAMAGED, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from error
    added = {n: v for n, v in partition_values(str(path)).items() if n not in frame.columns}
    frame = frame.with_columns(pl.lit(value, pl.String).alias(n) for n, value in added.items())
    if schema is None:
        return frame
    text = frame if kind == ".csv" else frame.select(list(added))
    typed, invalid = parse_cells(schema, text)
    if invalid:
        raise invalid[0].error().in_table(str(path))
    return frame.with_columns(typed.get_columns())


def _suffix_of(path: Path) -> str:
    """The kind of a file by its name, `.gz` aside."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open_text(path: Path) -> BinaryIO:
    is_compressed = path.suffix.lower() == ".gz"
    return cast(BinaryIO, gzip.open(path)) if is_compressed else path.open("rb")


def _check_kind(path: Path) -> str:
    """The kind of a file by its suffix; DataError if there is no such file, or it is another."""
    kind = _suffix_of(path)
    if kind not in READERS or (kind == ".parquet" and path.suffix.lower() == ".gz"):
        raise DataError(
            expected=f"{path}: a file ending in {', '.join(READERS)}, of text also in .gz",
            got=repr(path.suffix),
        )
    if not path.is_file():
        raise DataError(expected="an existing file", got=str(path))
    try:
        with _open_text(path) as file:
            check_content(str(path), kind, file.read(_START_BYTES))
    except (OSError, *_DAMAGED) as error:
        raise _unreadable(path, error) from error
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
    # text in another encoding, and lines that are no JSON, have errors of their own
    is_text = suffix in (".csv", ".json", ".jsonl")
    is_encoded = kind != ".parquet" and not text[:1].isascii()
    if suffix == kind or is_encoded or (is_text and kind in _JSON):
        return
    named = f"; name it {suffix}" if suffix in READERS else ""
    if suffix == ".gz":
        named = f"; name it {kind}.gz"
    raise DataError(expected=f"{name}: a table in {kind[1:]} form", got=f"{content}{named}")


def _unreadable(path: Path, error: Exception) -> DataError:
    """The error of a file that polars cannot read, with its place if that can be found."""
    kind = _suffix_of(path)
    try:
        if isinstance(error, _DAMAGED):
            raise error
        if kind != ".parquet":
            check_encoding(path)
        if kind == ".csv":
            _check_cells(path)
        elif kind in _JSON:
            _check_objects(path)
    except _DAMAGED as damage:
        return DataError(expected=f"{path}: compressed text, by gzip", got=str(damage))
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(expected=f"{path}: a table in {kind[1:]} form", got=repr(reason))


def check_encoding(path: Path) -> None:
    """Reject a text file that is not UTF-8, with the line; nothing if it is.

    Raises:
        DataError: it is not.
    """
    with _open_text(path) as lines:
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
    match _suffix_of(path):
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
    with _open_text(path) as file:
        rows = csv.reader(TextIOWrapper(file, errors="replace", newline=""))
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
    with _open_text(path) as lines:
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


def _check_objects(path: Path) -> None:
    """Reject the first line of a JSON Lines file that is no object."""
    with _open_text(path) as lines:
        for number, text in enumerate(lines, start=1):
            if text.strip() and not text.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
                raise DataError(
                    expected=f"{path}, line {number}: a JSON object",
                    got=repr(text[:60].decode(errors="replace").strip()),
                )


def package_folder(package: str, extras: str = "'carry[train]'") -> Path:
    """The directory of an installed package whose data are read.

    Nothing of it is imported: some of these packages need modules that newer Pythons lack.

    Raises:
        ModelsError: it is not installed; the message names `extras` to install.
    """
    module = find_spec(package)
    if module is None or not module.submodule_search_locations:
        raise ModelsError(f"expected the package `{package}` for its data: pip install {extras}")
    return Path(next(iter(module.submodule_search_locations)))
