"""The options of `carry replay`; the replay itself is imported when it is called."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

DEFAULT_URL: Final = "http://127.0.0.1:8000"


class By(StrEnum):
    """Which departures form one stream."""

    AIRPORT_CARRIER = "airport-carrier"
    AIRCRAFT = "aircraft"


class Encoding(StrEnum):
    """Encoding of the bodies."""

    JSON = "json"
    MSGPACK = "msgpack"


def replay(
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of the service; may be repeated: the next one is tried when one does not "
            f"answer. [default: {DEFAULT_URL}]"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="The model's name.")] = "flights",
    by: Annotated[By, typer.Option(help="Which departures form one stream.")] = By.AIRPORT_CARRIER,
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
        Encoding, typer.Option("--format", help="Encoding of the bodies.")
    ] = Encoding.JSON,
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
    sizes, factor = _parse_chunk(chunk), _parse_speed(speed)
    try:
        from service.commands.replay.run import run_replay
        from service.commands.replay.send import Pace
    except ImportError as error:
        typer.echo(
            f"carry replay needs more packages ({error}): pip install ./client '.[replay]'",
            err=True,
        )
        raise typer.Exit(2) from error
    status = run_replay(
        url or [DEFAULT_URL],
        model,
        Pace(sizes, seed, streams_in_flight, factor),
        data=data,
        by=by.value,
        stream_column=stream_column,
        prefix=prefix,
        limit=events,
        encoding=encoding.value,
        patience_s=patience_s,
        verify=verify,
        artifact=artifact,
        report=report,
        quiet=quiet,
    )
    raise typer.Exit(status)


def _parse_chunk(text: str) -> tuple[int, int]:
    """`A..B` or `N` as the least and the most events of a chunk."""
    low, dots, high = text.partition("..")
    if not low.isdecimal() or (dots and not high.isdecimal()):
        raise typer.BadParameter(f"--chunk: expected A..B, for example 1..64, got {text!r}")
    smallest, largest = int(low), int(high if dots else low)
    if not 1 <= smallest <= largest:
        raise typer.BadParameter(f"--chunk: expected 1 <= A <= B, got {text!r}")
    return smallest, largest


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
