"""Stage 1: rows of sources become unit files, sorted by bucket and stream.

A sort-based shuffle: each unit is sorted in memory and written once, and a bucket is read out of
all units by the statistics of their row groups. A unit is a file of up to `Plan.unit_rows` events:

    bucket u32, stream str, order i64, file u32, row u64
    reset bool                              if no field has its name
    source str, offset u64, sequence u64    if the plan names a column of offsets
    rejected bool                           if a stream ends before its first rejected event
    .NAME, for each field                   f64, str, bool, or i64 epoch ms; null if absent

`order` is in milliseconds, or the number of the column that orders; 0 for the order of the files.
Rows that cannot be read are written beside it, with reasons. The number of a unit follows from its
source and its place there, so that an interrupted run goes on with the units that are missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

import polars as pl

from models.spec.model import schema_of
from service.backfill.plan import COMPLETE, BackfillError, Job, Plan, replacing
from service.backfill.rows import RowReader, Unit
from service.backfill.source import TEXT, check_unchanged, read_batches

UNITS_PER_SOURCE: Final = 1_000_000
TASK_UNITS: Final = 8
"""Units of a task, if the number of rows of its source is known."""

ROW_GROUPS: Final = 128
"""Row groups of a full unit: a bucket reads few rows of other buckets."""

ORDER: Final = ("stream", "order", "file", "row")
ROWS_PER_SOURCE: Final = 2**40
"""More rows than a source has."""


class ShuffleTask(NamedTuple):
    """Rows of one source, which become one or more units.

    Attributes:
        source: its index in the plan.
        first_unit: number of the first unit.
        rows: of a text file an estimate of all its rows; otherwise so many.
    """

    source: int
    first_unit: int
    rows: int


def plan_tasks(plan: Plan) -> list[ShuffleTask]:
    """The tasks of the shuffle: a text file, or a range of rows of another source."""
    tasks = []
    for index, source in enumerate(plan.sources):
        first = index * UNITS_PER_SOURCE
        size = source.rows if source.kind in TEXT else TASK_UNITS * plan.unit_rows
        for start in range(0, max(1, source.rows), max(1, size)):
            rows = min(size, source.rows - start)
            tasks.append(ShuffleTask(index, first + start // plan.unit_rows, rows))
    return tasks


def source_of(unit: Path) -> int:
    """The index of the source whose rows are in a unit."""
    return int(unit.stem.removeprefix("unit-")) // UNITS_PER_SOURCE


def write_units(job: Job, task: ShuffleTask) -> None:
    """Write the units of a task that are not there yet.

    Raises:
        DataError: the source cannot be read, or a row, if such a row ends the run.
        BackfillError: the source was changed.
        OSError: a file cannot be written.
    """
    if _is_complete(job, task):
        return
    source, unit_rows = job.plan.sources[task.source], job.plan.unit_rows
    check_unchanged(source)
    reader = RowReader(job.plan, schema_of(job.spec), task.source)
    first = task.first_unit % UNITS_PER_SOURCE * unit_rows
    batches = read_batches(
        source,
        reader.names,
        reader.required,
        unit_rows,
        first=first,
        rows=None if source.kind in TEXT else task.rows,
    )
    units = 0
    for number, batch in enumerate(batches, start=task.first_unit):
        if not job.unit(number).exists():
            write_unit(job, number, reader.read(batch))
        units += 1
    check_unchanged(source)
    with replacing(_mark(job, task)) as path:
        path.write_text(str(units))


def _mark(job: Job, task: ShuffleTask) -> Path:
    """The file with the number of a task's units, once they are written."""
    return job.unit(task.first_unit).with_suffix(f".{COMPLETE}")


def _is_complete(job: Job, task: ShuffleTask) -> bool:
    """Whether all units of a task are there."""
    try:
        units = int(_mark(job, task).read_text())
    except FileNotFoundError:
        return False
    first = task.first_unit
    return all(job.unit(number).exists() for number in range(first, first + units))


def write_unit(job: Job, number: int, unit: Unit) -> None:
    """Write the events of a unit, and those that were rejected."""
    if unit.rejected.height:
        with replacing(job.rejected_unit(number)) as path:
            unit.rejected.write_parquet(path)
    else:  # there may be one of a source that was repaired since
        job.rejected_unit(number).unlink(missing_ok=True)
    with replacing(job.unit(number)) as path:
        unit.events.write_parquet(path, compression="lz4", row_group_size=_rows_of_group(job))


def count_rows(job: Job) -> dict[int, int]:
    """The number of rows in the units of each bucket."""
    units = sorted((job.out / "shuffle").glob("unit-*.parquet"))
    if not units:
        return {}
    rows = pl.scan_parquet(units, glob=False).select("bucket")
    try:
        return dict(rows.group_by("bucket").len().collect(engine="streaming").rows())
    except pl.exceptions.PolarsError as error:
        raise BackfillError(
            f"{units[0].parent}: a unit cannot be read: {error}; delete the folder, and the same "
            "command writes it again"
        ) from error


def read_bucket(job: Job, bucket: int) -> Iterator[pl.DataFrame]:
    """Read the events of a bucket, sorted by stream, order, file and row, in pieces.

    All units are read once. A bucket that is larger than memory is sorted externally: into runs,
    which are read part by part.
    """
    units = sorted((job.out / "shuffle").glob("unit-*.parquet"))
    if not units:
        return
    max_rows = job.plan.unit_rows
    scan = pl.scan_parquet(units, glob=False)
    batches = scan.filter(pl.col("bucket") == bucket).collect_batches(
        chunk_size=max_rows, lazy=True
    )
    first, second = next(batches, None), next(batches, None)
    if first is not None and second is None:
        yield from first.sort(ORDER).iter_slices(job.plan.piece_rows)
    elif first is not None and second is not None:
        with _writing_runs(job, bucket, chain((first, second), batches)) as runs:
            del first, second
            rows = pl.scan_parquet(runs, glob=False)
            for part in _parts(rows, max_rows, job.plan.order is None):
                yield from part.collect().sort(ORDER).iter_slices(job.plan.piece_rows)


@contextmanager
def _writing_runs(job: Job, bucket: int, batches: Iterable[pl.DataFrame]) -> Iterator[list[Path]]:
    """Write batches of a bucket as sorted files, which are removed at the end."""
    folder = job.out / "shuffle" / f"bucket-{bucket:05d}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    folder.mkdir()
    runs = []
    try:
        for number, batch in enumerate(batches):
            runs.append(folder / f"run-{number:05d}.parquet")
            batch.sort(ORDER).write_parquet(
                runs[-1], compression="lz4", row_group_size=_rows_of_group(job)
            )
        yield runs
    finally:
        shutil.rmtree(folder)


def _rows_of_group(job: Job) -> int:
    return max(1000, job.plan.unit_rows // ROW_GROUPS)


def _parts(rows: pl.LazyFrame, max_rows: int, is_file_order: bool) -> Iterator[pl.LazyFrame]:
    """Cut a bucket into parts of at most so many rows, between streams or within a longer one."""
    counts = rows.group_by("stream").len().sort("stream").collect(engine="streaming")
    names: list[str] = []
    size = 0
    for name, count in [*counts.rows(), ("", max_rows + 1)]:
        if names and size + count > max_rows:
            yield rows.filter(pl.col("stream").is_between(pl.lit(names[0]), pl.lit(names[-1])))
            names, size = [], 0
        if count <= max_rows:
            names.append(name)
            size += count
        elif name:
            yield from _stream_parts(rows.filter(pl.col("stream") == name), max_rows, is_file_order)


def _stream_parts(rows: pl.LazyFrame, max_rows: int, is_file_order: bool) -> Iterator[pl.LazyFrame]:
    """Cut a stream between values of its order; rows of the same value stay together."""
    file_order = pl.col("file").cast(pl.Int64) * ROWS_PER_SOURCE + pl.col("row").cast(pl.Int64)
    key = file_order if is_file_order else pl.col("order")
    keys = rows.select(key.alias("key")).collect(engine="streaming")["key"].sort()
    after: int | None = None
    for at in range(max_rows, len(keys) + max_rows, max_rows):
        upto = keys[min(at, len(keys)) - 1]
        if after is None or upto > after:
            part = rows.filter(key <= upto)
            yield part if after is None else part.filter(key > after)
            after = upto
