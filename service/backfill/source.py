"""Sources of a backfill: the files and tables of events, and their rows in batches.

An argument is a file, a folder, a glob, a URL as polars opens it (`s3://`, `gs://`, `az://`,
`https://`, `hf://`; credentials are those of the environment), or a table of Delta Lake or Iceberg:
its folder, or its URL after `delta:` or `iceberg:`. Files end in `.csv`, `.jsonl`, `.ndjson` or
`.parquet`; text files also in `.gz`. Parts of a path such as `day=2025-01-31` are columns. A table
is read at the version that it has when the run is planned.

Sources are sorted by name. A row is identified by its source and its number there from 1; of JSON
Lines by its line. Text is read cell by cell (`models.events.cells`), quoted values of JSON too.

A source that cannot be read as a whole ends the run with an error that names it. Rows that cannot
are returned beside the others.
"""

from __future__ import annotations

import csv
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.frame import InvalidRows
from models.training.files import (
    DELTA_LOG,
    check_content,
    check_encoding,
    check_header,
    files_below,
    partition_values,
)
from service.backfill.json_lines import parse_lines
from service.backfill.plan import BackfillError, Source

TEXT = ("csv", "jsonl")
TABLES = ("delta", "iceberg")
_KINDS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_SAMPLE_BYTES = 1 << 16
_INFLATED = 5
"""About as much larger is a text file that was compressed."""
_UNKNOWN_ROWS = 1_000_000
"""Rows of a text file whose size is unknown."""

_EXTRA, _LAST = "\0extra", "\0last"
_is_url = re.compile(r"[a-z][a-z0-9+.-]*://").match
_BYTE_ORDER_MARK = "\ufeff"


_POLARS_OPTIONS = {
    # it would read 300 MiB of CSV ahead
    "POLARS_CSV_CHUNK_SIZE": "4000000",
    "POLARS_CSV_CHUNK_PREFETCH_LIMIT": "1",
    "POLARS_LINES_CHUNK_PREFETCH_LIMIT": "1",
    "POLARS_NDJSON_CHUNK_SIZE": "4000000",
    # it would warn of a planner that is not there
    "POLARS_ICEBERG_PLANNER": "pyiceberg",
}


class Batch(NamedTuple):
    """Consecutive rows of a source.

    Attributes:
        frame: those of the wanted columns that the source has.
        rows: uint64 [T], their numbers.
        text: the columns whose values are text cells.
        malformed: rows that are none of a table, with reasons.
    """

    frame: pl.DataFrame
    rows: NDArray[np.uint64]
    text: frozenset[str]
    malformed: list[InvalidRows]


def find_sources(arguments: Sequence[str]) -> tuple[Source, ...]:
    """Find the files and tables that the arguments name, sorted by name.

    Raises:
        BackfillError: there is none, or one that is no table of events.
        DataError: a Parquet file or a table cannot be read.
    """
    sources = [source for argument in arguments for source in _expand_argument(argument)]
    names: dict[str, str] = {}
    for source in sources:
        real = source.path if _is_url(source.path) else os.path.realpath(source.path)
        if real in names:
            other = names[real]
            raise BackfillError(f"{source.path}: expected each file once, got it also as {other}")
        names[real] = source.path
    return tuple(sorted(sources, key=lambda source: source.path))


def _expand_argument(argument: str) -> Iterator[Source]:
    kind, _, rest = argument.partition(":")
    path = Path(argument)
    if kind in TABLES:
        yield _table_source(kind, rest)
    elif _is_url(argument):
        yield from _remote_sources(argument)
    elif (path / DELTA_LOG).is_dir():
        yield _table_source("delta", argument)
    elif any(path.glob("metadata/*.metadata.json")):
        yield _table_source("iceberg", argument)
    elif path.is_dir():
        yield from map(_local_source, files_below(path))
    elif glob.has_magic(argument) and not path.exists():
        if not (names := glob.glob(argument, recursive=True)):
            raise BackfillError(f"{argument}: expected files that match, got none")
        for name in names:
            yield from _expand_argument(name)
    else:
        yield _local_source(path)


def _kind_of(path: str) -> str:
    name = (path.partition("?")[0] if _is_url(path) else path).lower()
    kind = _KINDS.get(Path(name.removesuffix(".gz")).suffix)
    if kind is None or (kind == "parquet" and name.endswith(".gz")):
        raise BackfillError(
            f"{path}: expected a file ending in {', '.join(_KINDS)}, of text also in .gz"
        )
    return kind


def _local_source(path: Path) -> Source:
    name = str(path.absolute())
    try:
        status = path.stat()
        kind = _kind_of(str(path))
        if not stat.S_ISREG(status.st_mode):
            raise BackfillError(f"{name}: expected a file, got a special one such as a pipe")
        with path.open("rb") as file:
            sample = file.read(_SAMPLE_BYTES)
    except OSError as error:
        raise BackfillError(
            f"{name}: expected an existing file that may be read, got {error.strerror}"
        ) from error
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    check_content(name, ".gz" if name.lower().endswith(".gz") else suffix, sample)
    if kind == "parquet":
        rows = _count_rows(name, pl.scan_parquet(name, glob=False, hive_partitioning=False))
    elif name.endswith(".gz"):
        rows = _INFLATED * status.st_size // 50
    else:
        rows = status.st_size * sample.count(b"\n") // len(sample)
    return Source(
        path=name,
        kind=kind,
        rows=rows,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
    )


def _remote_sources(url: str) -> Iterator[Source]:
    if not (url.endswith("/") or glob.has_magic(url.partition("?")[0])):
        kind, rows = _kind_of(url), _UNKNOWN_ROWS
        if kind == "parquet":
            rows = _count_rows(url, pl.scan_parquet(url, glob=False, hive_partitioning=False))
        yield Source(path=url, kind=kind, rows=rows)
        return
    if not url.endswith("/") and _kind_of(url) != "parquet":
        raise BackfillError(f"{url}: expected the URL of each text file, got a pattern")
    files = pl.scan_parquet(url, include_file_paths=_EXTRA, hive_partitioning=False)
    with _naming_source(url):
        counts = files.select(_EXTRA).group_by(_EXTRA).len().collect()
    if counts.height == 0:
        raise BackfillError(f"{url}: expected Parquet files with rows, got none")
    for path, rows in counts.rows():
        yield Source(path=path, kind="parquet", rows=rows)


def _table_source(kind: str, path: str) -> Source:
    path = path if _is_url(path) else str(Path(path).absolute())
    with _naming_source(path):
        if kind == "delta":
            from deltalake import DeltaTable

            version = str(DeltaTable(path).version())
        else:
            from pyiceberg.table import StaticTable

            snapshot = StaticTable.from_metadata(_iceberg_metadata(path)).current_snapshot()
            if snapshot is None:
                raise BackfillError(f"{path}: expected a table with rows, got one without")
            version = str(snapshot.snapshot_id)
    rows = _count_rows(path, _scan_table(kind, path, version))
    return Source(path=path, kind=kind, rows=rows, table=version)


def _iceberg_metadata(path: str) -> str:
    """The newest metadata of a table in a folder."""
    if path.endswith(".json") or _is_url(path):
        return path
    files = sorted(
        Path(path).glob("metadata/*.metadata.json"),
        key=lambda file: int(match[0]) if (match := re.search(r"\d+", file.name)) else -1,
    )
    if not files:
        raise BackfillError(f"{path}: expected a table of Iceberg, got no metadata/*.metadata.json")
    return str(files[-1])


def _scan_table(kind: str, path: str, version: str) -> pl.LazyFrame:
    with _naming_source(path):
        if kind == "delta":
            return pl.scan_delta(path, version=int(version))
        return pl.scan_iceberg(_iceberg_metadata(path), snapshot_id=int(version))


def _count_rows(name: str, frame: pl.LazyFrame) -> int:
    with _naming_source(name):
        return int(frame.select(pl.len()).collect().item())


@contextmanager
def _naming_source(name: str) -> Iterator[None]:
    """Set options of polars, and turn errors of libraries into one that names the source."""
    for option, value in _POLARS_OPTIONS.items():
        os.environ.setdefault(option, value)
    try:
        yield
    except (BackfillError, DataError, GeneratorExit, ModuleNotFoundError):
        raise
    except (Exception, pl.exceptions.PanicException) as error:
        path = Path(name)
        if not _is_url(name) and path.is_file() and path.suffix in _KINDS and "parquet" not in name:
            check_encoding(path)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(expected=f"{name}: a table of events", got=repr(reason)) from error


def check_unchanged(source: Source) -> None:
    """Reject a file that was changed since the run was planned.

    Raises:
        BackfillError: it was, or it is gone.
    """
    if source.size_bytes:
        try:
            status = Path(source.path).stat()
        except OSError as error:
            raise BackfillError(f"{source.path}: {error.strerror}") from error
        if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
            raise BackfillError(
                f"{source.path}: was changed since this backfill was planned; start it again with "
                "--overwrite or in another folder"
            )


def read_batches(
    source: Source,
    names: Sequence[str],
    required: Sequence[str],
    batch_rows: int,
    *,
    first: int = 0,
    rows: int | None = None,
) -> Iterator[Batch]:
    """Read some columns of a source, in the order of its rows, in bounded memory.

    Args:
        names: the wanted columns.
        required: those that it must have.
        batch_rows: of each batch; the last one has the rest.
        first: number of rows at the beginning that are left out.
        rows: most rows to read; None for all.

    Raises:
        DataError: the source cannot be read, or lacks a required column.
    """
    in_path = partition_values(source.path)
    match source.kind:
        case "csv":
            batches = _csv_batches(source, names, required, batch_rows, first)
        case "jsonl":
            members = [name for name in names if name not in in_path]
            batches = _json_batches(source, members, required, batch_rows, first)
        case _:
            batches = _table_batches(source, names, required, batch_rows, first, rows)
    for batch in batches:
        added = [name for name in names if name in in_path and name not in batch.frame.columns]
        cells = [pl.lit(in_path[name], pl.String).alias(name) for name in added]
        yield batch._replace(frame=batch.frame.with_columns(cells), text=batch.text.union(added))


def _check_columns(source: Source, required: Sequence[str], columns: Sequence[str]) -> None:
    missing = set(required) - set(columns) - set(partition_values(source.path))
    for name in required:
        if name in missing:
            raise DataError(
                field=name, expected=f"{source.path}: a column of that name", got=f"{[*columns]}"
            )


def _collect_frames(source: Source, scan: pl.LazyFrame, rows: int) -> Iterator[pl.DataFrame]:
    """The rows of a scan, as many in each frame but the last."""
    with _naming_source(source.path):
        for frame in scan.collect_batches(chunk_size=rows, maintain_order=True):
            if frame.height:
                yield frame


def _table_batches(
    source: Source,
    names: Sequence[str],
    required: Sequence[str],
    batch_rows: int,
    first: int,
    rows: int | None,
) -> Iterator[Batch]:
    with _naming_source(source.path):
        if source.kind == "parquet":
            scan = pl.scan_parquet(source.path, glob=False, hive_partitioning=False)
        else:
            scan = _scan_table(source.kind, source.path, source.table)
        columns = scan.collect_schema().names()
    _check_columns(source, required, columns)
    wanted = scan.select(name for name in names if name in columns).slice(first, rows)
    for frame in _collect_frames(source, wanted, batch_rows):
        yield Batch(frame, _row_numbers(first, frame.height), frozenset(), [])
        first += frame.height


def _row_numbers(first: int, rows: int) -> NDArray[np.uint64]:
    return np.arange(first + 1, first + rows + 1, dtype=np.uint64)


def _csv_batches(
    source: Source, names: Sequence[str], required: Sequence[str], batch_rows: int, first: int
) -> Iterator[Batch]:
    with _naming_source(source.path):
        options: dict[str, Any] = {
            "has_header": False,
            "glob": False,
            "truncate_ragged_lines": True,
        }
        start = pl.scan_csv(source.path, **options, n_rows=1, infer_schema=False).collect()
    header = [name or "" for name in start.row(0)]
    check_header(source.path, header)
    _check_columns(source, required, header)
    # a column without a name has one that no other has
    columns = [name or f"\0{index}" for index, name in enumerate(header)]
    scan = pl.scan_csv(
        source.path,
        **options,
        skip_rows=1,
        schema=dict.fromkeys([*columns, _EXTRA], pl.String),
        missing_columns="insert",
    ).slice(first)
    wanted = [name for name in names if name in columns]
    extra = pl.col(_EXTRA).is_not_null()
    last = pl.col(columns[-1]).is_null().alias(_LAST)
    scan = scan.select(*wanted, extra, last)
    cut = _cells_of_cut_line(source.path, len(columns))
    expected = f"{len(columns)} cells, as in the header"
    frames = _collect_frames(source, scan, batch_rows)
    for frame, is_last in _flag_last(frames) if cut else ((each, False) for each in frames):
        malformed = []
        if (wrong := frame[_EXTRA].to_numpy()).any():
            malformed.append(InvalidRows("", wrong, expected, lambda _: "more"))
        if is_last and frame[_LAST][-1]:
            ends = np.arange(frame.height) == frame.height - 1
            malformed.append(InvalidRows("", ends, expected, lambda _: f"{cut}: the file is cut"))
        rows = _row_numbers(first, frame.height)
        yield Batch(frame.select(wanted), rows, frozenset(wanted), malformed)
        first += frame.height


def _flag_last(frames: Iterator[pl.DataFrame]) -> Iterator[tuple[pl.DataFrame, bool]]:
    """Each frame, and whether it is the last one."""
    frame = next(frames, None)
    while frame is not None:
        following = next(frames, None)
        yield frame, following is None
        frame = following


def _cells_of_cut_line(path: str, columns: int) -> int | None:
    """The number of cells in the last line of a local file, if it has no end and too few."""
    if _is_url(path) or path.endswith(".gz"):
        return None
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _SAMPLE_BYTES))
        line = file.read().rpartition(b"\n")[2]
    row = next(csv.reader([line.decode(errors="replace")]), [])
    return len(row) if 0 < len(row) < columns else None


def _json_batches(
    source: Source, names: Sequence[str], required: Sequence[str], batch_rows: int, first: int
) -> Iterator[Batch]:
    is_first = True
    scan = pl.scan_lines(source.path, glob=False).slice(first)
    for lines in _collect_frames(source, scan, batch_rows):
        numbers = _row_numbers(first, lines.height)
        first += lines.height
        # files that were joined have the mark of the byte order within
        texts = lines["line"].str.strip_prefix(_BYTE_ORDER_MARK)
        written = texts.str.strip_chars() != ""
        texts = texts.filter(written)
        frame, malformed = parse_lines(texts, names)
        if is_first:
            some = [name for name in frame.columns if frame[name].is_not_null().any()]
            if not any(each.rows.all() for each in malformed):
                _check_columns(source, required, some)
            is_first = False
        yield Batch(frame, numbers[written.to_numpy()], frozenset(names), malformed)
