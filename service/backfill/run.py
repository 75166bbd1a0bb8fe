"""Runs a backfill: plans it, shuffles, computes its buckets, and reports.

Every step goes on where an interrupted run stopped: a unit or a bucket that is there is not
computed again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from models.artifact.artifact import Artifact
from models.errors import SpecError
from models.spec.model import schema_of
from service.backfill.bucket import BucketRecord, compute_bucket, read_record
from service.backfill.engines import Engine, Function
from service.backfill.plan import (
    FOLDERS,
    PLAN,
    TEMPORARY,
    BackfillError,
    Job,
    OnError,
    Plan,
    plan_buckets,
    read_plan,
    replacing,
)
from service.backfill.shuffle import ShuffleTask, plan_tasks, write_units
from service.backfill.source import find_sources

REPORT, LOCK = "report.json", ".lock"

Show = Callable[[str, float, float], None]
"""Called with the stage, what is done of it so far, and its total, in events."""


@dataclass(frozen=True, slots=True)
class BackfillOptions:
    """What a user asks for; as of `Plan`."""

    stream: str | None = None
    order_by: str | None = None
    file_order: bool = False
    partitions: int = 1024
    on_error: OnError = "continue"
    drop_duplicates: bool = False
    offset: str | None = None
    topic: str | None = None
    topic_partition: str | None = None


def plan_backfill(artifact: Artifact, history: Sequence[str], options: BackfillOptions) -> Plan:
    """Plan a backfill.

    Raises:
        BackfillError, ModelsError: artifact, history or options are rejected.
    """
    stream = check_artifact(artifact, options.stream)
    schema = schema_of(artifact.spec)
    order = options.order_by
    if order is None and not options.file_order and schema.timestamp is not None:
        order = schema.timestamp.name
    if order is None and not options.file_order:
        raise BackfillError(
            f"model {artifact.spec.name!r} has no timestamp: expected --order-by with the column "
            "that orders a stream's events, or --file-order"
        )
    sources = find_sources(history)
    return Plan(
        model=artifact.spec.name,
        fingerprint=artifact.fingerprint.hex(),
        sources=sources,
        stream=stream,
        order=order,
        partitions=options.partitions,
        buckets=plan_buckets(sum(each.rows for each in sources), options.partitions),
        on_error=options.on_error,
        drop_duplicates=options.drop_duplicates,
        offset=options.offset,
        topic=options.topic,
        topic_partition=options.topic_partition,
    )


def check_artifact(artifact: Artifact, stream: str | None) -> str:
    """Reject a model whose history cannot be computed; returns the stream's column."""
    spec = artifact.spec
    schema_of(spec)
    if spec.chunking != "invisible" or spec.blocks is not None:
        raise SpecError(
            f"model {spec.name!r}: expected outputs that do not depend on how a stream is cut, but "
            "this network sees a chunk as a whole or looks ahead; `carry evaluate` scores it, and "
            "`POST .../predict` takes whole sequences"
        )
    name = stream or (spec.training.stream if spec.training else None)
    if name is None:
        raise SpecError(
            f"model {spec.name!r}: was not trained by `carry train`: expected `--stream` with the "
            "column that names each row's stream"
        )
    return name


@contextmanager
def open_folder(out: Path, plan: Plan, *, overwrite: bool) -> Iterator[None]:
    """Open the output folder of a plan: a new one, or one of an equal plan that goes on.

    Raises:
        BackfillError: it has other content, or another run works in it.
    """
    if out.exists() and not (out / PLAN).exists() and any(set(os.listdir(out)) - {LOCK}):
        raise BackfillError(f"{out}: expected a new folder, or one of a backfill")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackfillError(f"{out}: another run works in this folder") from None
        if overwrite:
            for entry in out.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != LOCK:
                    entry.unlink()
        if (out / PLAN).exists():
            _check_plan(out, plan)
        else:
            with replacing(out / PLAN) as path:
                path.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
        for name in FOLDERS:
            folder = out / name
            folder.mkdir(exist_ok=True)
            for left in folder.glob(f".*{TEMPORARY}"):
                left.unlink()
        yield


def _check_plan(out: Path, plan: Plan) -> None:
    stored = read_plan(out)
    for name in Plan.__struct_fields__:
        before, now = getattr(stored, name), getattr(plan, name)
        if before != now:
            raise BackfillError(
                f"{out} is of another backfill: {name} was {_shorten(before)}, and is "
                f"{_shorten(now)}; expected the same options to go on, another folder, or "
                "--overwrite"
            )


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, slots=True)
class BackfillResult:
    """What a run did."""

    report: dict[str, Any]

    @property
    def events(self) -> int:
        """Events of all streams."""
        return int(self.report["events"])


def run_backfill(
    job: Job, engine: Engine, *, overwrite: bool = False, show: Show = lambda *_: None
) -> dict[str, Any]:
    """Run a backfill, or go on with it; returns the report.

    Raises:
        BackfillError, ModelsError, OSError: the same call goes on once the reason is gone.
    """
    started_s = time.monotonic()
    plan = job.plan
    with open_folder(job.out, plan, overwrite=overwrite):
        records = {
            bucket: record
            for bucket in range(plan.buckets)
            if (record := read_record(job, bucket)) is not None
        }
        missing = [bucket for bucket in range(plan.buckets) if bucket not in records]
        if missing:
            _shuffle(job, engine, show)
            _compute(job, engine, missing, records, show)
        report = _report(job, records, time.monotonic() - started_s, sum(engine.peaks.values()))
        with replacing(job.out / REPORT) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
        shutil.rmtree(job.out / "shuffle", ignore_errors=True)
    return report


def _shuffle(job: Job, engine: Engine, show: Show) -> None:
    tasks = sorted(plan_tasks(job.plan), key=lambda task: -task.rows)
    total, done = sum(task.rows for task in tasks), 0
    show("shuffle", 0, total)
    function: Function[ShuffleTask, Any] = write_units
    for task, _ in engine.map(function, tasks):
        done += task.rows
        show("shuffle", done, total)


def _compute(
    job: Job,
    engine: Engine,
    missing: list[int],
    records: dict[int, BucketRecord],
    show: Show,
) -> None:
    show("compute", len(records), job.plan.buckets)
    function: Function[int, BucketRecord] = compute_bucket
    for bucket, record in engine.map(function, missing):
        records[bucket] = record
        show("compute", len(records), job.plan.buckets)


def _report(
    job: Job, records: dict[int, BucketRecord], seconds: float, peak_bytes: int
) -> dict[str, Any]:
    every = records.values()
    return {
        "model": job.plan.model,
        "fingerprint": job.plan.fingerprint,
        "buckets": job.plan.buckets,
        "streams": sum(each.streams for each in every),
        "events": sum(each.events for each in every),
        "out_of_order": sum(each.out_of_order for each in every),
        "peak_memory_bytes": peak_bytes,
        "seconds": round(seconds, 3),
    }


def open_job(artifact: Artifact, plan: Plan, out: Path) -> Job:
    """The job of a plan."""
    return Job(plan, out, artifact.spec, dict(artifact.weights))
