"""Measures the rates that `tests.backfill.plan` needs, in one process with one thread.

    python -m tests.backfill rates

Times are processor time: what else the machine does changes them little.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import msgspec
import polars as pl

from models.artifact.artifact import load_artifact
from service.backfill.bucket import compute_bucket
from service.backfill.plan import FOLDERS, Job
from service.backfill.run import BackfillOptions, open_job, plan_backfill
from service.backfill.shuffle import plan_tasks, read_bucket, write_units
from tests.backfill.histories import STREAM, History, write_model
from tests.backfill.plan import Rates

MEASURED = History(events=2_000_000, streams=8_000, files=2)
ALONE_EVENTS = 300_000
BUCKETS = 4
COPIES = 16


def measure_rates(folder: Path) -> Rates:
    """Measure the standard network of the benchmark, two LSTM(64), on events of five fields."""
    write_model(folder / "machines")
    paths = MEASURED.write(folder / "history")
    job = open_run(folder, folder / "history", "many")
    started_s = time.process_time()
    for task in plan_tasks(job.plan):
        write_units(job, task)
    shuffle_s = time.process_time() - started_s
    units = list((job.out / "shuffle").glob("*.parquet"))
    compute_bucket(job, job.plan.buckets - 1)
    events, seconds = 0, 0.0
    for bucket in range(BUCKETS):
        started_s = time.process_time()
        events += compute_bucket(job, bucket).events
        seconds += time.process_time() - started_s
    outputs = sum(job.outputs(bucket).stat().st_size for bucket in range(BUCKETS))
    streams = pl.read_parquet(job.out / "outputs")["stream"].n_unique()
    states = sum(path.stat().st_size for path in (job.out / "states").iterdir())

    alone = pl.read_parquet(paths[0]).head(ALONE_EVENTS).with_columns(pl.lit("m").alias(STREAM))
    alone.write_parquet(folder / "alone.parquet")
    one = open_run(folder, folder / "alone.parquet", "alone")
    for task in plan_tasks(one.plan):
        write_units(one, task)
    alone_s = sum(_seconds(one, bucket) for bucket in range(one.plan.buckets))
    return Rates(
        shuffle_events_s=MEASURED.events / shuffle_s,
        compute_events_s=events / seconds,
        alone_events_s=ALONE_EVENTS / alone_s,
        open_ms=_open_ms(folder),
        source_bytes=sum(path.stat().st_size for path in paths) / MEASURED.events,
        shuffle_bytes=sum(path.stat().st_size for path in units) / MEASURED.events,
        output_bytes=outputs / events,
        state_bytes=states / streams,
    )


def open_run(folder: Path, history: Path, name: str) -> Job:
    """The job of a history, with an empty output folder."""
    artifact, out = load_artifact(folder / "machines"), folder / name
    for each in FOLDERS:
        (out / each).mkdir(parents=True)
    return open_job(artifact, plan_backfill(artifact, [str(history)], BackfillOptions()), out)


def _seconds(job: Job, bucket: int) -> float:
    started_s = time.process_time()
    compute_bucket(job, bucket)
    return time.process_time() - started_s


def _open_ms(folder: Path) -> float:
    """What a further unit costs a bucket of many: its footer, and row groups shared with others."""
    job = open_run(folder, folder / "history", "open")
    job = job._replace(plan=msgspec.structs.replace(job.plan, buckets=job.plan.partitions))
    write_units(job, plan_tasks(job.plan)[0])
    unit, *others = sorted((job.out / "shuffle").glob("*.parquet"))
    for other in others:
        other.unlink()
    list(read_bucket(job, 0))
    times = []
    for first in (1, COPIES + 1):
        for number in range(first, first + COPIES):
            (unit.parent / f"unit-{number:06d}.parquet").hardlink_to(unit)
        started_s = time.process_time()
        for bucket in range(BUCKETS):
            list(read_bucket(job, bucket))
        times.append(time.process_time() - started_s)
    return (times[1] - times[0]) / COPIES / BUCKETS * 1000


def main() -> None:
    """Print the rates as options of the plan."""
    with tempfile.TemporaryDirectory(prefix="carry-rates-") as folder:
        rates = measure_rates(Path(folder))
    for name, value in rates.options():
        print(f"{name} {value:.4g}")


if __name__ == "__main__":
    main()
