"""`carry replay`: connect, load events, send, score, verify, print."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import orjson
import uvloop
from rich.console import Console

from carry_client import ModelDescription, Problem
from models.artifact.artifact import Artifact
from service.replay.client import connect
from service.replay.metrics import Counted, MetricsWatch
from service.replay.options import ReplayError, ReplayOptions
from service.replay.run import Replay, describe
from service.replay.skill import skill_of
from service.replay.source import event_schema, load_streams
from service.replay.summary import ProgressBar, Summary
from service.replay.verify import (
    Received,
    keras_whole,
    open_artifact,
    require_reference,
    verify,
)

EXIT_FAILED = 1
EXIT_UNFINISHED = 2
EXIT_INTERRUPTED = 130


def run_replay(options: ReplayOptions) -> int:
    """Replay events through a running service and print the summary.

    The summary goes to standard output, progress and errors to standard error.

    Returns:
        The exit status; see `service.replay.summary`.
    """
    errors = Console(stderr=True)
    try:
        if options.report is not None:
            _check_report_path(options.report)
        summary = uvloop.run(_run(options, errors))
        if options.report is not None:
            data = orjson.dumps(summary.as_data(), option=orjson.OPT_INDENT_2)
            options.report.write_bytes(data + b"\n")
    except (ReplayError, OSError, Problem) as error:
        errors.print(f"carry replay: {error}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_UNFINISHED
    except KeyboardInterrupt:
        errors.print("carry replay: interrupted; start again to continue from here")
        return EXIT_INTERRUPTED
    summary.print(Console(soft_wrap=True))
    return EXIT_FAILED if summary.failed else 0


def _check_report_path(report: Path) -> None:
    """Check before the replay that its report can be written after it."""
    if report.is_dir() or not report.parent.is_dir():
        raise ReplayError(f"--report: expected a file in an existing directory, got {report}")


async def _run(options: ReplayOptions, errors: Console) -> Summary:
    if options.verify:
        require_reference()
    async with connect(options) as service:
        served = await describe(service, options.patience_s)
        if options.verify and not served.is_cut_invariant:
            raise ReplayError(
                f"--verify compares with one call per whole stream, and the outputs of model "
                f"{served.name!r} depend on how a stream is cut into chunks"
            )
        artifact = _artifact(options, served)
        streams = load_streams(event_schema(served), options)
        replay = Replay(service, served, streams, options)
        watch = MetricsWatch(service, options.model)
        await watch.sample()
        watching = asyncio.create_task(watch.run())
        try:
            with ProgressBar(errors, options.quiet) as bar:
                await replay.run(bar)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        await watch.sample()
        if options.verify:
            await replay.check_positions()
    return _summary(options, served, replay, watch.counted(), artifact)


def _artifact(options: ReplayOptions, served: ModelDescription) -> Artifact | None:
    """The served model's artifact; None if it is neither required nor available."""
    try:
        return open_artifact(options.artifact, options.model, served.version)
    except ReplayError:
        if options.verify or options.artifact is not None:
            raise
        return None


def _summary(
    options: ReplayOptions,
    served: ModelDescription,
    replay: Replay,
    counted: Counted,
    artifact: Artifact | None,
) -> Summary:
    received = [
        Received(name, stream_progress.cursor.events.columns, stream_progress.outputs)
        for name, stream_progress in replay.progress.items()
    ]
    verification, skill = None, []
    if artifact is not None:
        skill = skill_of(artifact.spec, [(stream.columns, stream.outputs) for stream in received])
    if artifact is not None and options.verify:
        verification = verify(artifact.spec, keras_whole(artifact), received)
    return Summary(
        model=served.name,
        version=served.version,
        streams=len(replay.progress),
        resumed=sum(stream_progress.start > 0 for stream_progress in replay.progress.values()),
        tally=replay.tally,
        counted=counted,
        skill=skill,
        positions_checked=options.verify,
        verification=verification,
    )
