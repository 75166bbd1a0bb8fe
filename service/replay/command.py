"""The options of `carry replay`; the replay itself is imported when it is called."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from service.replay.options import (
    DEFAULT_URL,
    ReplayError,
    ReplayOptions,
    parse_range,
    parse_speed,
)


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
        typer.Option(help=f"Address of the service; may be repeated. [default: {DEFAULT_URL}]"),
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
    seed: Annotated[
        int, typer.Option(help="Random seed of the chunk sizes and the duplicates.")
    ] = 1,
    streams_in_flight: Annotated[
        int, typer.Option(min=1, max=4096, help="Streams with a chunk in flight at once.")
    ] = 64,
    per_request: Annotated[
        int, typer.Option(min=1, max=256, help="Streams that share one request.")
    ] = 1,
    speed: Annotated[
        str, typer.Option(help="`max`, or a factor of real time by the events' timestamps.")
    ] = "max",
    duplicates: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the chunks that are sent twice at once, 0 to 1."),
    ] = 0.0,
    encoding: Annotated[
        Encoding, typer.Option("--format", help="Encoding of the bodies.")
    ] = Encoding.JSON,
    patience_s: Annotated[
        float,
        typer.Option(
            min=1, help="How long to retry a failing chunk before the replay stops, in seconds."
        ),
    ] = 60.0,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every output with one Keras call per whole stream."),
    ] = False,
    artifact: Annotated[
        Path | None,
        typer.Option(
            help="The model's directory, for skill and --verify; default: the pretrained one."
        ),
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
    try:
        chunk_min, chunk_max = parse_range(chunk)
        factor = parse_speed(speed)
    except ReplayError as error:
        raise typer.BadParameter(str(error)) from error
    options = ReplayOptions(
        urls=tuple(url or [DEFAULT_URL]),
        model=model,
        by=by.value,
        data=data,
        stream_column=stream_column,
        prefix=prefix,
        events=events,
        chunk_min=chunk_min,
        chunk_max=chunk_max,
        seed=seed,
        streams_in_flight=streams_in_flight,
        per_request=per_request,
        speed=factor,
        duplicates=duplicates,
        format=encoding.value,
        patience_s=patience_s,
        verify=verify,
        artifact=artifact,
        report=report,
        quiet=quiet,
    )
    try:
        from service.replay.main import run_replay
    except ImportError as error:
        typer.echo(
            f"carry replay needs more packages ({error}): pip install ./client '.[replay]'",
            err=True,
        )
        raise typer.Exit(2) from error
    raise typer.Exit(run_replay(options))
