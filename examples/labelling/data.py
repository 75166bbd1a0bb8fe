"""Days of weather at New York's airports, each hour labelled with rain and gusts.

The hours are those of `examples.weather`, without the rain gauge and without the gusts.
The other sensors still indicate both: the temperature falls to the dew point, and pressure, wind
and visibility change. A stream is one day of one airport, a sequence that is complete when it is
labelled: the hours after it help to predict the labels as much as those before.

Invariant: all hours of a day are in the same split; the splits of `spec.yaml`
begin at local midnights. The same data give the same frame.
"""

from __future__ import annotations

import polars as pl

from examples.weather.data import TIMEZONE, weather_events


def labelled_days() -> pl.DataFrame:
    """All hours of 2013 as events of streams, days one after another.

    Returns:
        26,115 rows, sorted by airport and hour: `day` (like `JFK-2013-04-12`), what
        `weather_events` has but for the precipitation, `wind` (its speed, m/s) and the labels
        `rain` (whether any was measured) and `gusts`.
    """
    local = pl.col("observed").dt.convert_time_zone(TIMEZONE).dt.to_string("%Y-%m-%d")
    return (
        weather_events()
        .select(
            pl.concat_str("airport", local, separator="-").alias("day"),
            pl.exclude("precipitation"),
            wind=(pl.col("wind_east").pow(2) + pl.col("wind_north").pow(2)).sqrt(),
            rain=pl.col("precipitation") > 0,
        )
        .sort("day", "observed")
    )
