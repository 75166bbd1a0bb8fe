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
    """What a stream of flights is."""

    AIRPORT_CARRIER = "airport-carrier"
    AIRCRAFT = "aircraft"


class Encoding(StrEnum):
    """How bodies are written."""

    JSON = "json"
    MSGPACK = "msgpack"


def replay(
    url: Annotated[
        list[str] | None,
        typer.Option(help=f"Where the service listens; may be repeated. [{DEFAULT_URL}]"),
    ] = None,
    model: Annotated[str, typer.Option(help="The model to replay through.")] = "flights",
    by: Annotated[By, typer.Option(help="What a stream of flights is.")] = By.AIRPORT_CARRIER,
    data: Annotated[
        Path | None,
        typer.Option(help="A .csv, .jsonl or .parquet file instead of the flights."),
    ] = None,
    stream_column: Annotated[
        str, typer.Option(help="The column of --data that names the stream.")
    ] = "stream",
    prefix: Annotated[
        str, typer.Option(help="Put before every stream's name, to replay as new streams.")
    ] = "",
    events: Annotated[
        int | None, typer.Option(min=1, help="How many events, the earliest; all by default.")
    ] = None,
    chunk: Annotated[str, typer.Option(help="Events per chunk: A..B, drawn evenly.")] = "1..64",
    seed: Annotated[int, typer.Option(help="Of the cuts and the duplicates.")] = 1,
    streams_in_flight: Annotated[
        int, typer.Option(min=1, max=4096, help="Streams with a chunk in flight at once.")
    ] = 64,
    per_request: Annotated[
        int, typer.Option(min=1, max=1000, help="Streams that share one request.")
    ] = 1,
    speed: Annotated[
        str, typer.Option(help="`max`, or times real time by the events' timestamps.")
    ] = "max",
    duplicates: Annotated[
        float, typer.Option(min=0, max=1, help="Share of chunks that are sent twice at once.")
    ] = 0.0,
    encoding: Annotated[
        Encoding, typer.Option("--format", help="How bodies are written.")
    ] = Encoding.JSON,
    patience_s: Annotated[
        float, typer.Option(min=0, help="How long to try again while the service is away.")
    ] = 60.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with one Keras call per whole stream.")
    ] = False,
    artifact: Annotated[
        Path | None,
        typer.Option(
            help="The model's directory, for skill and --verify; the pretrained one if absent."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the summary to this file as JSON.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Replay events through a running service as live streams.

    Without --data the departures from New York in 2013 are replayed. A second run continues
    where the streams stand. Exits with 1 where the service broke its contract, with 2 where
    the replay could not be finished.
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
            f"carry replay needs more packages ({error}): pip install 'carry[replay]'", err=True
        )
        raise typer.Exit(2) from error
    raise typer.Exit(run_replay(options))
