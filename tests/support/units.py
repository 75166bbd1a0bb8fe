"""Units of a backfill from files of events of pumps, and their rows."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import polars as pl

from models.spec.model import parse_spec
from service.backfill.plan import FOLDERS, Job, Plan
from service.backfill.report import list_rejected
from service.backfill.shuffle import plan_tasks, read_bucket, write_units
from service.backfill.source import find_sources

SPEC = parse_spec(
    {
        "name": "pumps",
        "events": {
            "timezone": "Europe/Vienna",
            "fields": [
                {"kind": "timestamp", "name": "at", "without_offset": "local"},
                {"kind": "numeric", "name": "load"},
                {"kind": "boolean", "name": "on", "optional": True, "coerce": True},
                {"kind": "categorical", "name": "kind", "optional": True},
            ],
        },
        "layers": [{"kind": "lstm", "units": 2}],
        "heads": [{"kind": "sequence", "name": "y"}],
    }
)
NOON_MS = 1_750_413_600_000
"""2025-06-20T10:00:00Z, noon in Vienna."""


def make_job(out: Path, *history: Path | str, **options: Any) -> Job:
    """A job over sources, with its folders."""
    options = {"stream": "pump", "order": "at", "partitions": 64, "buckets": 5} | options
    plan = Plan(
        model="pumps",
        fingerprint="00" * 16,
        sources=find_sources([str(each) for each in history]),
        **options,
    )
    for name in FOLDERS:
        (out / name).mkdir(parents=True, exist_ok=True)
    return Job(plan, out, SPEC, {})


def shuffle(job: Job) -> dict[str, int]:
    """Write all units; returns the rejected rows by reason."""
    for task in plan_tasks(job.plan):
        write_units(job, task)
    return {
        f"{each['column']}: {each['reason']}" if each["column"] else each["reason"]: each["events"]
        for each in list_rejected(job)
    }


def events(job: Job) -> pl.DataFrame:
    """The events of all buckets, with their buckets."""
    pieces = [
        piece.with_columns(read_from=pl.lit(bucket))
        for bucket in range(job.plan.buckets)
        for piece in read_bucket(job, bucket)
    ]
    return pl.concat(pieces).rename(lambda name: name.removeprefix("."))


def rejections(job: Job) -> list[tuple[Any, ...]]:
    """File, row, column and value of the rejected rows."""
    files = sorted((job.out / "rejected").glob("*.parquet"))
    rows = pl.concat([pl.read_parquet(file) for file in files])
    return rows.select("file", "row", "column", "value").rows()


def table(rows: int, streams: int = 7) -> pl.DataFrame:
    """Events of several streams, later ones first."""
    index = pl.int_range(rows, eager=True)
    return pl.DataFrame(
        {
            "pump": ("p" + (index % streams).cast(pl.String)),
            "at": NOON_MS + (index * 7919 % rows) * 1000,
            "load": index / 8,
            "on": index % 3 == 0,
            "kind": pl.Series(["a", None, "b"] * rows)[:rows],
            "note": pl.Series(["x"] * rows),
        }
    )


def write(folder: Path, frame: pl.DataFrame, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.{kind}"
    if kind == "csv":
        frame.write_csv(path)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    elif kind == "jsonl":
        frame.write_ndjson(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(frame.write_ndjson().encode()))
    else:
        frame.write_parquet(path, row_group_size=37)
    return path
