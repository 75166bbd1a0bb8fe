"""Climatology, yesterday and a linear forecast, as baselines of how surprising an hour was.

    climatology            mean of the same local hour on the last days at that airport, as many
                           days as validate best; deviation of the training errors at that hour
    same hour yesterday    mean linear in the value 24 hours before, one deviation
    linear, last 24 hours  mean linear in everything seen in the last 24 hours (ridge regression,
                           its penalty chosen by validation), one deviation

One year has no other Novembers, so a climatology by month cannot be had: the days before stand
in for it. All are Gaussians of the encoded values, as the anomaly head's own forecast is.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from models.decoding.losses import Floats, Scored
from models.events.calendar import zone_table
from models.spec.heads import AnomalyHead, Head
from models.spec.model import schema_of
from models.training.table import Baseline, Table, gaussian_nats, rows_around

HOUR_MS = 3_600_000
DAYS = (3, 7, 14, 30)
HOURS = 24
PENALTIES = (1.0, 100.0, 10_000.0)
CLIMATOLOGY, YESTERDAY, LINEAR = "climatology", "same hour yesterday", "linear, last 24 hours"


def weather_baselines(table: Table, head: Head) -> list[Baseline]:
    """The three baselines of an anomaly head over numeric fields; empty for any other head."""
    if not isinstance(head, AnomalyHead):
        return []
    hours = local_hours(table)
    tried = []
    for days in DAYS:
        nats = np.zeros(table.streams.events)
        for name in head.targets:
            value = table.encoded(name)
            nats += _by_hour(value, same_hour_mean(table, value, days), hours, table.train)
        tried.append((float(nats[table.validate].mean()), days, nats))
    loss, days, best = min(tried, key=lambda item: item[0])
    before = np.zeros(table.streams.events)
    for name in head.targets:
        value = table.encoded(name)
        before += _linear(value, hours_ago(table, value, 24), table.train)
    return [
        Baseline(
            CLIMATOLOGY, Scored({"nll": best[table.test]}), {"days": days, "validation": loss}
        ),
        Baseline(YESTERDAY, Scored({"nll": before[table.test]}), {}),
        _ridge(table, head),
    ]


def _ridge(table: Table, head: AnomalyHead) -> Baseline:
    features = np.nan_to_num(rows_around(table, HOURS - 1, 0))
    total = np.zeros(table.streams.events)
    settings: dict[str, float] = {}
    every = np.flatnonzero(np.append(False, table.streams.has_next[:-1]))
    for name in head.targets:
        value = table.encoded(name)
        usable = table.train[~np.isnan(value[table.train])]
        tried = []
        for penalty in PENALTIES:
            model = Ridge(penalty).fit(features[usable - 1], value[usable])
            error = np.full(len(value), np.nan)
            error[every] = value[every] - model.predict(features[every - 1])
            deviation = np.full(len(value), np.log(np.std(error[usable])))
            nats = gaussian_nats(error, deviation)
            tried.append((float(nats[table.validate].mean()), penalty, nats))
        _, settings[name], nats = min(tried, key=lambda item: item[0])
        total += nats
    return Baseline(LINEAR, Scored({"nll": total[table.test]}), settings)


def local_hours(table: Table) -> NDArray[np.int64]:
    """The local hour of the day of every row, 0 to 23."""
    moments = table.streams.moments_ms
    offsets = zone_table(schema_of(table.spec).timezone).offsets(moments)
    return np.asarray((moments + offsets) // HOUR_MS % 24, np.int64)


def same_hour_mean(table: Table, value: Floats, days: int, *, including: bool = False) -> Floats:
    """Mean of the same hour over the `days` before, NaN if none is known; float64 [rows].

    Args:
        including: count each row's own value as the latest of them.
    """
    frame = pl.DataFrame({"s": table.stream_of, "hour": local_hours(table), "x": value})
    present = pl.col("x").fill_nan(None)
    before = (present if including else present.shift(1)).rolling_mean(days, min_samples=1)
    means = frame.select(before.over("s", "hour").alias("mean"))["mean"]
    return means.fill_null(float("nan")).to_numpy().astype(np.float64)


def hours_ago(table: Table, value: Floats, hours: int) -> Floats:
    """The value a number of hours before every row, by the clock; float64 [rows].

    NaN if that hour is missing; hours below 0 look ahead.
    """
    frame = pl.DataFrame({"s": table.stream_of, "at": table.streams.moments_ms, "x": value})
    earlier = frame.select("s", at=pl.col("at") - hours * HOUR_MS)
    joined = earlier.join(frame, on=["s", "at"], how="left", maintain_order="left")
    return joined["x"].fill_null(float("nan")).to_numpy().astype(np.float64)


def _by_hour(
    value: Floats, mean: Floats, hours: NDArray[np.int64], train: NDArray[np.int64]
) -> Floats:
    error = value - np.where(np.isnan(mean), np.nanmean(value[train]), mean)
    deviation = np.array([np.nanstd(error[train[hours[train] == hour]]) for hour in range(24)])
    return gaussian_nats(error, np.log(deviation)[hours])


def _linear(value: Floats, before: Floats, train: NDArray[np.int64]) -> Floats:
    usable = train[~np.isnan(value[train]) & ~np.isnan(before[train])]
    slope, offset = np.polyfit(before[usable], value[usable], 1)
    predictions = np.where(np.isnan(before), value[usable].mean(), slope * before + offset)
    deviation = float(np.std(value[usable] - predictions[usable]))
    return gaussian_nats(value - predictions, np.full(len(value), np.log(deviation)))
