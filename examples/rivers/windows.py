"""The table's columns, and what trees see of a day."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

STREAM, DAY, LABEL = "catchment", "day", "flow"
CLASSES = ("low", "normal", "high")
MOVING = ("precipitation", "temperature")
FIXED = ("relief_m", "latitude")
AGGREGATED_DAYS = (7, 30, 90, 180, 365)
YEAR_DAYS = 365.25


def codes(frame: pl.DataFrame) -> NDArray[np.int64]:
    """The label of every event as an index of `CLASSES`, [rows]."""
    return frame[LABEL].cast(pl.Enum(CLASSES)).to_physical().to_numpy().astype(np.int64)


def tree_features(frame: pl.DataFrame, lags: int) -> NDArray[np.float32]:
    """The last `lags` events and running aggregates, [rows, features]; both include the event.

    Aggregates are mean, minimum and maximum of the last 7, 30, 90, 180 and 365 days, exponential
    means with half of these as half-lives, and the mean since the stream's first event. Beside
    them are the season and the catchment's attributes.
    """
    columns: list[pl.Expr] = []
    for name in MOVING:
        value = pl.col(name)
        columns += [value.shift(lag).alias(f"{name}_{lag}") for lag in range(lags)]
        for days in AGGREGATED_DAYS:
            columns += [
                value.rolling_mean(days, min_samples=1).alias(f"{name}_mean_{days}"),
                value.rolling_min(days, min_samples=1).alias(f"{name}_min_{days}"),
                value.rolling_max(days, min_samples=1).alias(f"{name}_max_{days}"),
                value.ewm_mean(half_life=days / 2).alias(f"{name}_ewm_{days}"),
            ]
        columns.append((value.cum_sum() / value.cum_count()).alias(f"{name}_mean"))
    angle = pl.col(DAY).dt.ordinal_day() * (2 * np.pi / YEAR_DAYS)
    own = [column.over(STREAM) for column in columns]
    season = [angle.cos().alias("cos"), angle.sin().alias("sin")]
    return frame.select(*own, *season, *FIXED).to_numpy().astype(np.float32)
