"""`carry score`: the outputs for every event of one file, in its order.

A backfill of the file, in the order of its rows, whose first rejected row ends it. Its folder is
beside the output, and becomes one file at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl

from models.artifact.artifact import load_artifact
from models.errors import ArtifactError, DataError
from models.spec.model import schema_of
from models.training.progress import Progress
from service.backfill.engines import Engine
from service.backfill.plan import Job, replacing
from service.backfill.run import BackfillOptions, open_job, plan_backfill, run_backfill
from service.backfill.source import TEXT, read_batches

KINDS = (".parquet", ".csv")
JOINED_ROWS = 4_000_000
"""Rows whose outputs are sorted in memory together."""


def score_file(
    path: Path,
    data: Path,
    out: Path,
    open_engine: Callable[[Job], Engine],
    *,
    stream: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the outputs for a file of events; returns the report of the backfill.

    Args:
        path: the artifact's directory.
        data: the events, as `carry train` takes them.
        out: `.parquet` or `.csv`; one row per row of `data`, in its order.
        open_engine: opens what computes.
        stream: column with the name of each row's stream; that of training by default.
        resume: continue an interrupted run.
        overwrite: replace `out`.

    Raises:
        ModelsError, OperatorError: artifact or data are rejected.
    """
    if out.suffix.lower() not in KINDS:
        raise DataError(
            expected=f"{out}: a file ending in {', '.join(KINDS)}", got=repr(out.suffix)
        )
    if not data.is_file():
        hint = " (`carry backfill` computes those of folders)" if data.is_dir() else ""
        raise DataError(expected=f"an existing file{hint}", got=str(data))
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out}: exists; expected a new path, or --overwrite")
    artifact = load_artifact(path)
    options = BackfillOptions(stream=stream, file_order=True, on_error="fail", partitions=64)
    plan = plan_backfill(artifact, [str(data)], options)
    folder = out.absolute().parent / f".{out.name}.backfill"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    job = open_job(artifact, plan, folder)
    with closing(open_engine(job)) as engine:
        report = run_backfill(job, engine, progress=progress)
    if not report["events"]:
        raise DataError(expected="at least one row of events", got="none")
    with replacing(out) as joined:
        _join(job, joined, out.suffix.lower())
    shutil.rmtree(folder)
    return report


def _join(job: Job, joined: Path, kind: str) -> None:
    """Join the outputs of all buckets in the order of the rows."""
    parts = []
    for number, table in enumerate(_tables(job)):
        parts.append(job.out / f"part-{number:06d}.parquet")
        table.write_parquet(parts[-1])
    tables = pl.scan_parquet(parts, glob=False)
    timestamp = schema_of(job.spec).timestamp
    if job.plan.sources[0].kind in TEXT and timestamp is not None:
        tables = _with_epochs(tables, timestamp.name)
    if kind == ".csv":
        tables.sink_csv(joined)
    else:
        tables.sink_parquet(joined)


def _with_epochs(tables: pl.LazyFrame, name: str) -> pl.LazyFrame:
    """Tables with numbers as times, if all of them are epoch times in text."""
    if name not in tables.collect_schema():
        return tables
    is_number = pl.col(name).str.contains(r"^-?\d{1,18}$")
    if not tables.select(is_number.all()).collect(engine="streaming").item():
        return tables
    return tables.with_columns(pl.col(name).cast(pl.Int64))


def _tables(job: Job) -> Iterator[pl.DataFrame]:
    """Consecutive rows of the file, with its own columns of stream and time."""
    timestamp = schema_of(job.spec).timestamp
    kept = [job.plan.stream]
    if timestamp is not None and timestamp.name != job.plan.stream:
        kept.append(timestamp.name)
    files = [job.outputs(bucket) for bucket in range(job.plan.buckets)]
    outputs = pl.scan_parquet(files, glob=False)
    outputs = outputs.drop("stream", "time", "file", strict=False)
    for batch in read_batches(job.plan.sources[0], kept, kept[:1], JOINED_ROWS):
        rows = pl.Series("row", batch.rows)
        own = outputs.filter(pl.col("row").is_between(rows[0], rows[-1])).collect()
        table = batch.frame.select(name for name in kept if name in batch.frame.columns)
        yield table.with_columns(rows).join(own, on="row", maintain_order="left").drop("row")
