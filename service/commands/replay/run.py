"""One replay: load events, send them, verify the outputs, print a summary.

The summary goes to standard output, progress and errors to standard error.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from carry_client import AsyncCarry, ModelDescription, Problem
from models.artifact.artifact import Artifact
from service.commands.replay.departures import By
from service.commands.replay.events import ReplayError, event_schema, load_streams
from service.commands.replay.send import Pace, Replay
from service.commands.replay.verify import (
    Received,
    Verification,
    check_tensorflow,
    keras_runner,
    open_artifact,
    verify_outputs,
)

EXIT_FAILED: Final = 1
EXIT_UNFINISHED: Final = 2
EXIT_INTERRUPTED: Final = 130
SHOWN_FAULTS: Final = 10
TIMEOUT_S: Final = 30.0
"""Of one attempt."""


def run_replay(
    urls: list[str],
    model: str,
    pace: Pace,
    *,
    data: Path | None = None,
    by: By = "airport-carrier",
    stream_column: str = "stream",
    prefix: str = "",
    limit: int | None = None,
    encoding: str = "json",
    patience_s: float = 60.0,
    verify: bool = False,
    artifact: Path | None = None,
    report: Path | None = None,
    quiet: bool = False,
) -> int:
    """Replay events through a running service and print the summary.

    Args:
        urls: the service's addresses; the next one is tried when one does not answer.
        model: the model's name.
        pace: sizes and times of the chunks.
        data, by, stream_column, prefix, limit: the events, as for `load_streams`.
        encoding: of the bodies.
        patience_s: how long one chunk is retried before the replay stops.
        verify: compare every output with one Keras call over the whole stream.
        artifact: the model's directory, for `verify`; None for the pretrained one of its name.
        report: a file to write the summary to as JSON.
        quiet: no progress bar, even on a terminal.

    Returns:
        The exit status: 0 if every guarantee held, or one of those above.
    """
    errors = Console(stderr=True)

    async def run() -> dict[str, Any]:
        async with AsyncCarry(
            urls,
            encoding="msgpack" if encoding == "msgpack" else "json",
            timeout_s=TIMEOUT_S,
            deadline_s=patience_s,
        ) as carry:
            served = await carry.model(model).describe()
            reference = _reference(served, artifact) if verify else None
            streams = load_streams(
                event_schema(served),
                data,
                by=by,
                stream=stream_column,
                limit=limit,
                prefix=prefix,
            )
            bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=errors,
                transient=True,
                disable=quiet or not errors.is_terminal,
            )
            with bar:
                task = bar.add_task("events", total=sum(map(len, streams)))
                replay = Replay(
                    carry.model(model), served, streams, pace, partial(bar.advance, task)
                )
                await replay.run()
        return _summary(served, replay, None if reference is None else _verify(reference, replay))

    try:
        if verify:
            check_tensorflow()
        summary = uvloop.run(run())
        if report is not None:
            report.write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")
    except (ReplayError, OSError, ValueError, Problem) as error:
        errors.print(f"carry replay: {error}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_UNFINISHED
    except KeyboardInterrupt:
        errors.print("carry replay: interrupted; start again to continue from here")
        return EXIT_INTERRUPTED
    for line in _lines(summary):
        print(line)
    return EXIT_FAILED if summary["failed"] else 0


def _reference(served: ModelDescription, path: Path | None) -> Artifact:
    """The artifact to verify with."""
    if not served.is_cut_invariant:
        raise ReplayError(
            f"--verify compares with one call per whole stream, and the outputs of model "
            f"{served.name!r} depend on how a stream is cut into chunks"
        )
    return open_artifact(path, served.name, served.version)


def _verify(artifact: Artifact, replay: Replay) -> Verification:
    received = [
        Received(each.events.name, each.events.columns, each.outputs) for each in replay.streams
    ]
    return verify_outputs(artifact.spec, keras_runner(artifact), received)


def _summary(
    served: ModelDescription, replay: Replay, verification: Verification | None
) -> dict[str, Any]:
    """The result as plain data."""
    counts = asdict(replay.tally)
    latencies_s = counts.pop("latencies_s")
    p50_ms, p99_ms = np.percentile(latencies_s or [0.0], (50, 99)) * 1000
    beyond = verification is not None and not verification.holds
    return {
        "model": served.name,
        "version": served.version,
        "streams": len(replay.streams),
        "resumed": sum(stream.start > 0 for stream in replay.streams),
        **counts,
        "retries": dict(replay.tally.retries),  # `asdict` cannot copy a Counter
        "events_per_s": counts["events"] / counts["wall_s"] if counts["wall_s"] else 0.0,
        "p50_ms": float(p50_ms),
        "p99_ms": float(p99_ms),
        "verification": None if verification is None else asdict(verification),
        "failed": beyond or bool(counts["faults"]),
    }


def _lines(summary: dict[str, Any]) -> list[str]:
    """The summary for a person: a name and a figure in each line."""
    retries = ", ".join(f"{code} {count}" for code, count in sorted(summary["retries"].items()))
    rows = [
        ("model", f"{summary['model']} {summary['version']}"),
        ("streams", f"{summary['streams']:,}, {summary['resumed']:,} of them resumed"),
        (
            "events",
            f"{summary['events']:,} in {summary['wall_s']:.1f} s, {summary['events_per_s']:,.0f}/s",
        ),
        ("chunks", f"{summary['chunks']:,}, {summary['replayed']:,} replies replayed"),
        ("latency", f"p50 {summary['p50_ms']:.1f} ms, p99 {summary['p99_ms']:.1f} ms"),
        ("retries", retries or "none"),
        ("sent again", f"{summary['sent_again']:,} events that the store had lost"),
        ("skipped", f"{summary['skipped']:,} events whose stored replies had expired"),
    ]
    verification = summary["verification"]
    if verification is not None:
        for check in verification["outputs"]:
            verdict = f"BEYOND, {check['beyond']:,} values" if check["beyond"] else "within"
            rows.append(
                (
                    f"verify {check['name']}",
                    f"{verdict}: |a-b| - 1e-5|b| at most {check['excess']:.2e} (bound 1e-5) "
                    f"at {check['stream']}[{check['step']}]",
                )
            )
        if summary["resumed"] and any(check["beyond"] for check in verification["outputs"]):
            rows.append(
                (
                    "resumed",
                    f"{summary['resumed']:,} streams had events before; if those were not the "
                    "first of the same data, replay with --prefix as new streams",
                )
            )
        missing = verification["missing"]
        rest = f", {missing:,} were not received by this run" if missing else ""
        rows.append(("verified", f"{verification['compared']:,} events' outputs{rest}"))
    faults = summary["faults"]
    rows += [("fault", fault) for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        rows.append(("faults", f"{len(faults) - SHOWN_FAULTS:,} more"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]
