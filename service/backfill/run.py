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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from models.artifact.artifact import Artifact
from models.errors import SpecError
from models.spec.model import schema_of
from models.training.progress import Progress
from service.backfill.bucket import compute_bucket
from service.backfill.engines import Engine, Function, peak_memory
from service.backfill.heads import has_heads
from service.backfill.plan import (
    COMPLETE,
    FOLDERS,
    PLAN,
    TEMPORARY,
    BackfillError,
    Job,
    OnError,
    Plan,
    Source,
    plan_buckets,
    read_plan,
    replacing,
    rows_in_memory,
)
from service.backfill.record import BucketRecord, read_record
from service.backfill.report import Sample, make_report, plot_throughput
from service.backfill.shuffle import (
    ShuffleTask,
    count_rows,
    plan_tasks,
    source_of,
    write_units,
)
from service.backfill.source import find_sources

REPORT, PLOT, LOCK = "report.json", "throughput.png", ".lock"


@dataclass(frozen=True, slots=True)
class BackfillOptions:
    """The options of a run, as of `Plan`."""

    stream: str | None = None
    order_by: str | None = None
    file_order: bool = False
    partitions: int = 1024
    on_error: OnError = "continue"
    drop_duplicates: bool = False
    offset: str | None = None
    topic: str | None = None
    topic_partition: str | None = None
    version: bool = False


def plan_backfill(artifact: Artifact, history: Sequence[str], options: BackfillOptions) -> Plan:
    """Plan a backfill.

    Raises:
        BackfillError, ModelsError: artifact, history or options are rejected.
    """
    stream = find_stream_column(artifact, options.stream)
    schema = schema_of(artifact.spec)
    order = options.order_by
    if order is not None and options.file_order:
        raise BackfillError("expected --order-by or --file-order, got both")
    if order is None and not options.file_order and schema.timestamp is not None:
        order = schema.timestamp.name
    if order is None and not options.file_order:
        raise BackfillError(
            f"model {artifact.spec.name!r} has no timestamp: expected --order-by with the column "
            "that orders a stream's events, or --file-order"
        )
    if (options.offset is None) != (options.topic is None) or (
        options.topic_partition is not None and options.offset is None
    ):
        raise BackfillError(
            "expected --offset with --source-topic, the topic as `carry consume` names it, and of "
            "Kafka also --source-partition"
        )
    sources = find_sources(history)
    unit_rows, piece_rows = rows_in_memory(artifact.spec)
    return Plan(
        model=artifact.spec.name,
        fingerprint=artifact.fingerprint.hex(),
        sources=sources,
        stream=stream,
        order=order,
        partitions=options.partitions,
        buckets=plan_buckets(sum(each.rows for each in sources), options.partitions),
        unit_rows=unit_rows,
        piece_rows=piece_rows,
        on_error=options.on_error,
        drop_duplicates=options.drop_duplicates,
        offset=options.offset,
        topic=options.topic,
        topic_partition=options.topic_partition,
        version=options.version,
    )


def find_stream_column(artifact: Artifact, stream: str | None) -> str:
    """Find the column of stream names, and reject a model whose events cannot be computed."""
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
        raise BackfillError(f"{out}: expected a new folder, or one of a backfill, got other files")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackfillError(f"{out}: another run works in this folder") from None
        if overwrite:
            _remove_content(out)
        _check_plan(out, resume_plan(out, plan), plan)
        with replacing(out / PLAN) as path:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
        for name in FOLDERS:
            (out / name).mkdir(exist_ok=True)
        _remove_temporary_files(out)
        yield
        _remove_temporary_files(out)


def _remove_content(out: Path) -> None:
    """Remove a backfill; if it is interrupted, what is left is not taken for complete."""
    (out / "heads" / COMPLETE).unlink(missing_ok=True)
    _remove_units(out)
    # the plan last: without it the folder would not be one of a backfill
    for entry in sorted(out.iterdir(), key=lambda entry: entry.name == PLAN):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _remove_units(out: Path) -> None:
    for mark in (out / "shuffle").glob(f"*.{COMPLETE}"):
        mark.unlink()
    shutil.rmtree(out / "shuffle", ignore_errors=True)


def _remove_temporary_files(out: Path) -> None:
    """Remove what processes had not finished when they were killed."""
    for name in FOLDERS:
        for file in (out / name).glob(f".*{TEMPORARY}"):
            file.unlink()


def resume_plan(out: Path, plan: Plan) -> Plan:
    """The plan by which a run in a folder goes on: the given one in a new folder.

    Tables are read at the versions of the first run. A file may have been repaired as long as none
    of its rows was shuffled. A plan by which nothing was done yet does not bind: it may have been
    rejected, for a column that no file has.

    Raises:
        BackfillError: the folder is of another backfill, or a file was changed.
    """
    if out.exists() and not out.is_dir():
        raise BackfillError(f"{out}: expected a folder as OUT, the last argument, got a file")
    if not (out / PLAN).exists():
        return plan
    stored = read_plan(out)
    try:
        return _continue_plan(out, stored, plan)
    except BackfillError:
        if has_heads(out) or any(file for name in FOLDERS for file in (out / name).glob("[!.]*")):
            raise
        return plan


def _continue_plan(out: Path, stored: Plan, plan: Plan) -> Plan:
    before, now = ({each.path for each in side.sources} for side in (stored, plan))
    if before != now:
        change, paths = ("lacks", before - now) if before - now else ("also has", now - before)
        raise BackfillError(
            f"{out} is of another backfill: the history {change} {min(paths)}"
            + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
            + "; expected the same files to go on, another folder, or --overwrite"
        )
    pairs = enumerate(zip(stored.sources, plan.sources, strict=True))
    sources = tuple(_resume_source(out, at, old, new) for at, (old, new) in pairs)
    plan = msgspec.structs.replace(plan, sources=sources, buckets=stored.buckets)
    stored = msgspec.structs.replace(stored, sources=sources)
    _check_plan(out, stored, plan)
    return plan


def _check_plan(out: Path, expected: Plan, plan: Plan) -> None:
    for name in Plan.__struct_fields__:
        before, now = getattr(expected, name), getattr(plan, name)
        if before != now:
            raise BackfillError(
                f"{out} is of another backfill: {name} was {_shorten(before)}, and is "
                f"{_shorten(now)}; expected the same options to go on, another folder, or "
                "--overwrite"
            )


def _resume_source(out: Path, index: int, before: Source, now: Source) -> Source:
    if before == now or before.table:
        return before
    # a file without rows has no unit, but was read
    read = (out / "shuffle").glob("unit-*")
    if any((out / "done").glob("*.json")) or any(source_of(each) == index for each in read):
        raise BackfillError(
            f"{now.path}: was changed since its rows were read; restore it, or start again with "
            "--overwrite or in another folder"
        )
    return now


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def run_backfill(
    job: Job,
    engine: Engine,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run a backfill, or go on with it; returns the report.

    Args:
        prepare: called once the folder is open: for a version it writes the heads of the streams.

    Raises:
        OperatorError, ModelsError, OSError: the same call goes on once the reason is gone.
    """
    with open_folder(job.out, job.plan, overwrite=overwrite):
        prepare()
        if job.plan.version and not has_heads(job.out):
            raise BackfillError("expected the heads of the live streams: `--version --into URL`")
        run = _Run(job, engine, progress or Progress(Console(quiet=True)))
        run.compute()
        if run.samples or not (job.out / REPORT).exists():
            report = make_report(
                job, run.records.values(), run.samples, engine.peaks | peak_memory()
            )
            with replacing(job.out / REPORT) as path:
                path.write_text(json.dumps(report, indent=2) + "\n")
        if run.samples and find_spec("matplotlib") is not None:
            with replacing(job.out / PLOT) as path:
                path.write_bytes(plot_throughput(run.samples))
        _remove_units(job.out)
    return read_report(job.out)


def read_report(out: Path) -> dict[str, Any]:
    """The report of a finished backfill."""
    report: dict[str, Any] = json.loads((out / REPORT).read_bytes())
    return report


class _Run:
    """The stages of a run.

    Attributes:
        records: of the finished buckets, by number.
        samples: how far this run was.
    """

    def __init__(self, job: Job, engine: Engine, progress: Progress):
        self._job, self._engine, self._progress = job, engine, progress
        self._started_s = time.monotonic()
        self.samples: list[Sample] = []
        self.records: dict[int, BucketRecord] = {}
        for bucket in range(job.plan.buckets):
            record = read_record(job, bucket)
            if record is not None:
                self.records[bucket] = record

    def compute(self) -> None:
        """Compute the buckets that are missing."""
        buckets = [each for each in range(self._job.plan.buckets) if each not in self.records]
        if not buckets:
            return
        self._shuffle()
        self._compute(buckets)

    def _shuffle(self) -> None:
        tasks = sorted(plan_tasks(self._job.plan), key=lambda task: -task.rows)
        function: Function[ShuffleTask, None] = write_units
        with self._stage("shuffle", sum(task.rows for task in tasks)) as note:
            for task, _ in self._engine.map(function, tasks, "source"):
                note(task.rows)

    def _compute(self, buckets: list[int]) -> None:
        function: Function[int, BucketRecord] = compute_bucket
        sizes = count_rows(self._job)
        # the largest first: a long one that started last would be waited for
        ordered = sorted(buckets, key=lambda bucket: -sizes.get(bucket, 0))
        with self._stage("compute", sum(sizes.get(each, 0) for each in buckets)) as note:
            for bucket, record in self._engine.map(function, ordered, "bucket"):
                self.records[bucket] = record
                note(record.events)

    @contextmanager
    def _stage(self, stage: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of a stage; yields what is called with the events that were done."""
        started_s = time.monotonic()
        done = 0
        self.samples.append(Sample(stage, started_s - self._started_s, 0))
        with self._progress.task(stage, max(1, total)) as advance:

            def note(events: int) -> None:
                nonlocal done
                done += events
                now_s = time.monotonic()
                self.samples.append(Sample(stage, now_s - self._started_s, done))
                rate = done / max(now_s - started_s, 1e-9)
                left_s = max(0, total - done) / max(rate, 1e-9)
                advance(done, f"{done:,} events, {rate:,.0f} a second, {left_s:,.0f} s left")

            yield note


def open_job(artifact: Artifact, plan: Plan, out: Path) -> Job:
    """The job of a plan."""
    return Job(plan, out, artifact.spec, dict(artifact.weights))
