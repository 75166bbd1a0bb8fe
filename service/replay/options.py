"""Options of a replay, and the error that ends it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

By = Literal["airport-carrier", "aircraft"]
Format = Literal["json", "msgpack"]

DEFAULT_URL = "http://127.0.0.1:8000"


class ReplayError(Exception):
    """The replay cannot continue; the message is one sentence for the person who started it."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """All options of a replay.

    Attributes:
        urls: the service's addresses; a stream uses one, and the next while it does not answer.
            The two copies of a duplicated chunk go to different ones.
        model: the model's name.
        by: what a stream of flights is; not read with `data`.
        data: a CSV, JSON Lines or Parquet file to replay instead of the flights.
        stream_column: the column of `data` that names the stream.
        prefix: put before every stream's name, to replay the same events as new streams.
        events: how many events, the earliest ones; None for all.
        chunk_min, chunk_max: events per chunk, drawn evenly between the two.
        seed: of the cuts and of the choice of duplicates.
        streams_in_flight: how many streams have a chunk in flight at once.
        per_request: how many streams share one request; 1 uses the address of one stream.
        speed: times real time by the events' timestamps; None for as fast as possible.
        duplicates: share of chunks, 0 to 1, that are sent twice at once.
        format: encoding of the bodies.
        patience_s: how long one request is retried before the replay fails.
        verify: compare every output with one Keras call over the whole stream.
        artifact: the model's directory, for skill and `verify`; None for the pretrained one of
            its name.
        report: a file to write the summary to as JSON, or None.
        quiet: no progress bar, even on a terminal.
    """

    urls: tuple[str, ...] = (DEFAULT_URL,)
    model: str = "flights"
    by: By = "airport-carrier"
    data: Path | None = None
    stream_column: str = "stream"
    prefix: str = ""
    events: int | None = None
    chunk_min: int = 1
    chunk_max: int = 64
    seed: int = 1
    streams_in_flight: int = 64
    per_request: int = 1
    speed: float | None = None
    duplicates: float = 0.0
    format: Format = "json"
    patience_s: float = 60.0
    verify: bool = False
    artifact: Path | None = None
    report: Path | None = None
    quiet: bool = False


def parse_range(text: str) -> tuple[int, int]:
    """`A..B` or `N` as the smallest and largest chunk; ReplayError if it is neither."""
    low, dots, high = text.partition("..")
    if not low.isdecimal() or (dots and not high.isdecimal()):
        raise ReplayError(f"--chunk: expected A..B, for example 1..64, got {text!r}")
    smallest, largest = int(low), int(high if dots else low)
    if not 1 <= smallest <= largest:
        raise ReplayError(f"--chunk: expected 1 <= A <= B, got {text!r}")
    return smallest, largest


def parse_speed(text: str) -> float | None:
    """`max` as None, or a factor above 0; ReplayError if it is neither."""
    if text == "max":
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ReplayError(f"--speed: expected `max` or a factor above 0, got {text!r}")
    return factor
