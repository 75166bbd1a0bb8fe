"""`carry backfill` and `carry score`: turn recorded events into outputs, and states of streams."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.backfill.machine import LEAST_MEMORY_MIB
from service.commands.common import run_on_store
from service.commands.load import load_streams
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from service.backfill.engines import Engine
    from service.backfill.plan import Job
    from service.store.base import Store

INTERRUPTED = 128
"""Exit status of a command that a signal ended, less the signal's number."""

History = Annotated[
    list[str],
    typer.Argument(
        metavar="HISTORY... OUT",
        help="Files, folders, URLs or tables of events, then the output folder.",
    ),
]
Stream = Annotated[
    str | None, typer.Option(help="Column of stream names; default: that of training.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Number of processes; default: as cores and memory allow."),
]
MemoryMib = Annotated[
    int, typer.Option(min=LEAST_MEMORY_MIB, help="Memory of all processes together, about.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing.")]
EngineName = Literal["processes", "ray"]
Policy = Literal["continue", "halt"]


def backfill(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The model's directory.")],
    history: History,
    *,
    stream: Stream = None,
    order_by: Annotated[
        str | None, typer.Option(help="Column that orders events; default: the timestamp.")
    ] = None,
    file_order: Annotated[
        bool, typer.Option("--file-order", help="Events are in the order of the files.")
    ] = False,
    on_error: Annotated[
        Policy,
        typer.Option(help="Leave out an event that is rejected, or end its stream before it."),
    ] = "continue",
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out events that equal the one before.")
    ] = False,
    offset: Annotated[
        str | None,
        typer.Option(help="Column of the offsets that events had in a topic, for consumers."),
    ] = None,
    source_topic: Annotated[str | None, typer.Option(help="The topic of --offset.")] = None,
    source_partition: Annotated[
        str | None, typer.Option(help="Column of the partitions of Kafka, with --offset.")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(metavar="REDIS_URL", help="Load the states into this store at the end."),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="The streams live in the store of --into, computed by another version of the "
            "model: end at their positions, and store states for this one beside theirs.",
        ),
    ] = False,
    partitions: Annotated[
        int | None,
        typer.Option(min=1, help="Of the store for the states; default: CARRY_PARTITIONS."),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="What computes: processes of this machine, or Ray.")
    ] = "processes",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; default: RAY_ADDRESS, or a local one.")
    ] = None,
    workers: Workers = None,
    memory_mib: MemoryMib = 2048,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Measure the first rows, and estimate time, memory and disk."
        ),
    ] = False,
    quiet: Quiet = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in OUT.")] = False,
) -> None:
    """Compute the outputs and states of recorded events; the same command goes on after a stop."""
    from rich.console import Console

    from models.artifact.artifact import load_artifact
    from models.training.progress import Progress
    from service.backfill.estimate import estimate
    from service.backfill.heads import read_heads
    from service.backfill.report import report_lines
    from service.backfill.run import (
        BackfillOptions,
        open_job,
        plan_backfill,
        resume_plan,
        run_backfill,
    )
    from service.settings import Settings

    if len(history) < 2:
        raise typer.BadParameter(f"expected HISTORY... and OUT, got {len(history)} argument")
    if version and into is None:
        raise typer.BadParameter("expected --into with --version")
    if version and offset is not None:
        raise typer.BadParameter("expected no --offset with --version: the streams live already")
    *sources, folder = history
    options = BackfillOptions(
        stream=stream,
        order_by=order_by,
        file_order=file_order,
        partitions=partitions or Settings.load().store.partitions,
        on_error=on_error,
        drop_duplicates=drop_duplicates,
        offset=offset,
        topic=source_topic,
        topic_partition=source_partition,
        version=version,
    )
    loaded = load_artifact(artifact)
    out, plan = Path(folder).absolute(), plan_backfill(loaded, sources, options)
    job = open_job(loaded, plan if overwrite else resume_plan(out, plan), out)

    if dry_run:
        for line in estimate(job, count_workers(workers, memory_mib)):
            typer.echo(line)
        return

    def prepare() -> None:
        if version:
            run_on_store(into, None, lambda store: read_heads(store, job.plan, job.out))
        elif into is not None:
            run_on_store(into, None, _check_store)  # a wrong address costs no run

    progress = Progress(Console(quiet=quiet, stderr=True))
    with interruptible(), closing(open_engine(engine, job, address, workers, memory_mib)) as opened:
        report = run_backfill(job, opened, overwrite=overwrite, progress=progress, prepare=prepare)
    if not quiet:
        for line in report_lines(report):
            typer.echo(line)
    if report["rejected"] and not report["events"]:
        raise OperatorError(
            f"{out}: every event was rejected; correct HISTORY or the options, and start over "
            "with --overwrite"
        )
    if into is not None:
        with interruptible():
            load_streams(job.out, redis_url=into)


async def _check_store(store: Store) -> None:
    """Do nothing: opening the store checks its address."""


def score(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The model's directory.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Events as CSV, JSON Lines or Parquet.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file, .parquet or .csv.")],
    *,
    stream: Stream = None,
    workers: Workers = None,
    memory_mib: MemoryMib = 2048,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    quiet: Quiet = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write a model's outputs for a file of events, as the service would answer them."""
    from rich.console import Console

    from models.training.progress import Progress
    from service.backfill.engines import ThisProcess
    from service.backfill.score import score_file

    def open_for(job: Job) -> Engine:
        if job.plan.buckets == 1:
            return ThisProcess(job)
        return open_engine("processes", job, None, workers, memory_mib)

    progress = Progress(Console(quiet=quiet))
    with interruptible():
        report = score_file(
            *(artifact, data, out, open_for),
            stream=stream,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    progress.say(f"{out}: {report['events']:,} events of {report['streams']:,} streams")
    if report["out_of_order"]:
        progress.say(
            f"warning: {report['out_of_order']:,} events are earlier than one before them in "
            "their stream; `carry train` sorts them: sort DATA by time to score as trained",
            "yellow",
        )


def open_engine(
    name: EngineName, job: Job, address: str | None, workers: int | None, memory_mib: int
) -> Engine:
    """Open what runs the tasks of a job."""
    from service.backfill.engines import Processes, RayCluster

    if address is not None and name != "ray":
        raise typer.BadParameter("expected --engine ray with --address")
    if name == "ray":
        return RayCluster(job, address, workers)
    return Processes(job, count_workers(workers, memory_mib))


def count_workers(workers: int | None, memory_mib: int) -> int:
    """The number of processes: as many as are asked for, or as cores and memory allow."""
    from service.backfill.machine import MIB, count_cores, count_processes

    return workers or count_processes(memory_mib * MIB, count_cores())


@contextmanager
def interruptible() -> Iterator[None]:
    """End cleanly by SIGINT and SIGTERM, with a line that says how to go on."""

    def interrupt(number: int, _: object) -> None:
        raise _Interrupted(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    except _Interrupted as interrupted:
        typer.echo("interrupted: the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED + interrupted.number) from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Interrupted(BaseException):
    """A signal that ends the command; no error that a function could handle."""

    def __init__(self, number: int):
        self.number = number
