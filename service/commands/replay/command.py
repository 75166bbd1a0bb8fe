"""`carry replay`: sends recorded events as live streams, verifies the outputs, prints a summary.

The summary goes to standard output, progress and errors to standard error.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from service.commands.common import show_progress
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from carry_client import ModelDescription
    from models.artifact.artifact import Artifact
    from models.offline.verification import Verification
    from service.commands.replay.send import Replay

DEFAULT_URL: Final = "http://127.0.0.1:8000"
EXIT_FAILED: Final = 1
EXIT_UNFINISHED: Final = 2
EXIT_INTERRUPTED: Final = 130
SHOWN_FAULTS: Final = 10
TIMEOUT_S: Final = 30.0
"""Of one attempt."""


def replay(
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of the service; may be repeated: the next one is tried when one does not "
            f"answer. [default: {DEFAULT_URL}]"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="The model's name.")] = "flights",
    by: Annotated[
        Literal["airport-carrier", "aircraft"],
        typer.Option(help="Which departures form one stream."),
    ] = "airport-carrier",
    data: Annotated[
        Path | None,
        typer.Option(help="Events to replay (.csv, .jsonl or .parquet) instead of the departures."),
    ] = None,
    stream_column: Annotated[
        str, typer.Option(help="The column of --data that names the stream.")
    ] = "stream",
    prefix: Annotated[
        str,
        typer.Option(help="Prefix of every stream's name, to replay the events as new streams."),
    ] = "",
    events: Annotated[
        int | None,
        typer.Option(min=1, help="Replay only this many events, the earliest; default: all."),
    ] = None,
    chunk: Annotated[
        str, typer.Option(help="Events per chunk: N, or A..B, drawn evenly.")
    ] = "1..64",
    seed: Annotated[int, typer.Option(help="Random seed of the chunk sizes.")] = 1,
    streams_in_flight: Annotated[
        int, typer.Option(min=1, max=4096, help="Streams with a chunk in flight at once.")
    ] = 64,
    speed: Annotated[
        str, typer.Option(help="`max`, or a factor of real time by the events' timestamps.")
    ] = "max",
    encoding: Annotated[
        Literal["json", "msgpack"], typer.Option("--format", help="Encoding of the bodies.")
    ] = "json",
    patience_s: Annotated[
        float,
        typer.Option(
            min=0.1, help="How long to retry a failing chunk before the replay stops, in seconds."
        ),
    ] = 60.0,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every output with one Keras call per whole stream."),
    ] = False,
    artifact: Annotated[
        Path | None,
        typer.Option(help="The model's directory, for --verify; default: the pretrained one."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the summary to this file as JSON.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Replay events through a running service as live streams.

    Without --data it replays the departures from New York in 2013. A second run continues
    from the streams' positions. Exit status: 0 if every guarantee held, 1 if the service broke
    one, 2 if the replay could not be finished.
    """
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise typer.BadParameter(
            f"--report: expected a file in an existing directory, got {report}"
        )
    pace: dict[str, Any] = {
        "chunk": _parse_chunk(chunk),
        "speed": _parse_speed(speed),
        "seed": seed,
        "streams_in_flight": streams_in_flight,
    }

    import orjson
    import uvloop

    from carry_client import AsyncCarry, Problem
    from models.errors import ModelsError
    from models.offline.verification import Received, keras_runner, verify_outputs
    from models.pretrained.departures import flight_events
    from models.training.files import read_data
    from service.commands.replay.send import Replay, event_schema, split_streams

    async def run() -> dict[str, Any]:
        async with AsyncCarry(
            url or DEFAULT_URL, encoding=encoding, timeout_s=TIMEOUT_S, deadline_s=patience_s
        ) as carry:
            served = await carry.model(model).describe()
            reference = _open_reference(served, artifact) if verify else None
            schema = event_schema(served)
            frame = flight_events(by) if data is None else read_data(data, schema)
            column = "stream" if data is None else stream_column
            streams = split_streams(schema, frame, stream=column, limit=events, prefix=prefix)
            with show_progress("events", sum(map(len, streams)), quiet=quiet) as show:
                replay = Replay(carry.model(model), served, streams, **pace, show=show)
                await replay.run()
        verification = None
        if reference is not None:
            received = [
                Received(each.events.name, each.events.columns, each.outputs)
                for each in replay.streams
            ]
            verification = verify_outputs(reference.spec, keras_runner(reference), received)
        return _summary(served, replay, verification)

    try:
        summary = uvloop.run(run())
        if report is not None:
            report.write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")
    except (OperatorError, ModelsError, OSError, ValueError, Problem) as error:
        typer.echo(f"carry replay: {error}", err=True)
        raise typer.Exit(EXIT_UNFINISHED) from error
    except KeyboardInterrupt as error:
        typer.echo("carry replay: interrupted; start again to continue from here", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    for line in _lines(summary):
        typer.echo(line)
    if summary["failed"]:
        raise typer.Exit(EXIT_FAILED)


def _open_reference(served: ModelDescription, path: Path | None) -> Artifact:
    """The artifact of the model that the service serves, to verify with its Keras layers.

    Args:
        path: its directory; None for the pretrained model of that name.

    Raises:
        OperatorError: its outputs depend on the chunks, TensorFlow is not installed, or the model
            is of another version.
        ArtifactError: there is no such artifact.
    """
    import models
    from models.artifact.artifact import load_artifact

    if not served.is_cut_invariant:
        raise OperatorError(
            f"--verify compares with one call per whole stream, and the outputs of model "
            f"{served.name!r} depend on how a stream is cut into chunks"
        )
    if find_spec("tensorflow") is None:
        raise OperatorError(
            "--verify compares with Keras and needs TensorFlow, whatever runtime serves: "
            "pip install 'carry[tensorflow]'"
        )
    artifact = load_artifact(path or Path(models.__file__).parent / "pretrained" / served.name)
    if artifact.version != served.version:
        raise OperatorError(
            f"--artifact: expected the model that is served, version {served.version}, "
            f"got {artifact.version} at {artifact.path}"
        )
    return artifact


def _parse_chunk(text: str) -> tuple[int, int]:
    """`A..B` or `N` as the least and the most events of a chunk."""
    low, _, high = text.partition("..") if ".." in text else (text, "", text)
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise typer.BadParameter(
            f"--chunk: expected N or A..B with 1 <= A <= B, for example 1..64, got {text!r}"
        )
    return int(low), int(high)


def _parse_speed(text: str) -> float | None:
    """`max` as None, or a factor above 0."""
    if text == "max":
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise typer.BadParameter(f"--speed: expected `max` or a factor above 0, got {text!r}")
    return factor


def _summary(
    served: ModelDescription, replay: Replay, verification: Verification | None
) -> dict[str, Any]:
    """The result as plain data."""
    import numpy as np

    counts = asdict(replay.tally)
    p50_ms, p99_ms = np.percentile(counts.pop("latencies_s") or [0.0], (50, 99)) * 1000
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
        "failed": bool(counts["faults"]) or (verification is not None and not verification.holds),
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
        checks = verification["outputs"]
        for check in checks:
            verdict = f"BEYOND, {check['beyond']:,} values" if check["beyond"] else "within"
            largest = f"|a-b| - 1e-5|b| at most {check['excess']:.2e} (bound 1e-5)"
            place = f"{check['stream']}[{check['step']}]"
            rows.append((f"verify {check['name']}", f"{verdict}: {largest} at {place}"))
        if summary["resumed"] and any(check["beyond"] for check in checks):
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
