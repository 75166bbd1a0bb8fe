"""The decoder's forecasts compared with baselines, by step of the horizon.

Forecasts are those that `models.training.horizon` makes: from the state after every seventh event,
along the medians. Truth and baselines go by the clock; an hour that is missing is not scored.

    last value             the temperature at the origin
    same hour yesterday    24 hours before the hour that is forecast
    climatology            mean of that local hour on the last days, as many as validate best
    linear, last 24 hours  ridge regression on everything of the last 24 hours, one per horizon,
                           its penalty chosen by validation

Baselines become quantiles by the quantiles of their errors in training, horizon by horizon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from examples.weather.baselines import DAYS, HOURS, PENALTIES, hours_ago, same_hour_mean
from models.artifact.artifact import Artifact
from models.decoding.forecasts import decoder_of
from models.decoding.losses import Floats, pinball
from models.events.calendar import zone_table
from models.spec.model import schema_of
from models.training.data import split_of, streams_of
from models.training.evaluate import scored_rows
from models.training.horizon import STRIDE, ahead_of, forecasts_at
from models.training.scores import DayDraws, interval
from models.training.table import Table, rows_around

SHOWN = (1, 3, 6, 12, 24)
DRAWS = 1000
MODEL = "encoder/decoder"


@dataclass(frozen=True)
class Comparison:
    """Losses of every method at n origins and H hours ahead.

    Attributes:
        pinball: method -> [n, H], degrees, the mean over the quantiles; NaN if the hour is
            missing.
        mae: method -> [n, H], degrees, of the median.
        days: the local day of each origin, [n].
    """

    pinball: Mapping[str, Floats]
    mae: Mapping[str, Floats]
    days: NDArray[np.int64]


def compare(artifact: Artifact, frame: pl.DataFrame) -> Comparison:
    """Forecast from every origin of the held-out hours, with the model and the baselines."""
    spec = artifact.spec
    schema, split = schema_of(spec), split_of(spec)
    decoder, _, _ = decoder_of(spec)
    levels = np.array(decoder.head.quantiles)
    streams = streams_of(spec, frame, "forecast")
    validate_ms, test_ms = split.validate, split.test
    table = Table(
        spec,
        streams,
        streams.encoded(schema),
        scored_rows(streams, None, validate_ms),
        scored_rows(streams, validate_ms, test_ms),
        scored_rows(streams, test_ms),
    )
    value = streams.columns.values[decoder.targets[0]].astype(np.float64)
    truth = _ahead(table, value, decoder.max_horizon)
    anchors = ahead_of(spec, streams, test_ms, None, STRIDE)
    _, quantiles = forecasts_at(artifact, streams, table.rows, anchors, STRIDE)
    origins = anchors.at
    forecasts = {MODEL: quantiles[:, :, 0]}
    for name, points in _baselines(table, value, truth).items():
        errors = truth[table.train] - points[table.train]
        spread = np.nanquantile(errors, levels, axis=0)
        forecasts[name] = points[origins][..., np.newaxis] + spread.T
    middle = int(np.argmin(np.abs(levels - 0.5)))
    pinballs, mae = {}, {}
    for name, quantiles in forecasts.items():
        error = truth[origins][..., np.newaxis] - quantiles
        pinballs[name] = pinball(levels, error).mean(axis=-1)
        mae[name] = np.abs(error[..., middle])
    moments = streams.moments_ms[origins]
    days = zone_table(schema.timezone).days(moments)
    return Comparison(pinballs, mae, days)


def comparison_lines(comparison: Comparison) -> list[str]:
    """The comparison as Markdown: pinball loss by horizon, with the model's lead over all."""
    draws = DayDraws.make(comparison.days, DRAWS, 0)
    lines = []
    for title, losses in (("pinball loss", comparison.pinball), ("absolute error", comparison.mae)):
        lines += [
            "",
            f"{title} in degrees Celsius, {len(comparison.days)} origins, by hours ahead; the last "
            "column is minus the encoder/decoder over all hours (95% interval, by days)",
            "",
            "| | " + " | ".join(f"{hours} h" for hours in SHOWN) + " | all | minus model |",
            "| --- |" + " --- |" * (len(SHOWN) + 2),
        ]
        own = np.nanmean(losses[MODEL], axis=1)
        for name, loss in losses.items():
            by_hour = np.nanmean(loss, axis=0)
            mean = np.nanmean(loss, axis=1)
            cells = [f"{by_hour[hours - 1]:.3f}" for hours in SHOWN]
            cells.append(f"{np.nanmean(mean):.3f}")
            low, high = interval(draws.means(mean - own))
            difference = f"{np.nanmean(mean - own):+.3f} ({low:+.3f} to {high:+.3f})"
            cells.append("" if name == MODEL else difference)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _ahead(table: Table, value: Floats, horizon: int) -> Floats:
    """The values 1..H hours after every row, by the clock: [rows, H], NaN if missing."""
    columns = [hours_ago(table, value, -hours) for hours in range(1, horizon + 1)]
    return np.stack(columns, axis=1)


def _baselines(table: Table, value: Floats, truth: Floats) -> dict[str, Floats]:
    """Points of every baseline at every row, [rows, H]."""
    horizon = truth.shape[1]
    # the value at the origin replaces a missing value of an hour
    last = np.repeat(value[:, np.newaxis], horizon, axis=1)

    def day_before(series: Floats) -> Floats:
        shifted = np.stack(
            [hours_ago(table, series, 24 - ahead) for ahead in range(1, horizon + 1)], axis=1
        )
        return np.where(np.isnan(shifted), last, shifted)

    # The mean of an hour as it was at its last occurrence, that one included.
    means = [same_hour_mean(table, value, days, including=True) for days in DAYS]
    best = _best([day_before(mean) for mean in means], table, truth)
    features = np.nan_to_num(rows_around(table, HOURS - 1, 0))
    lines = []
    for ahead in range(horizon):
        usable = table.train[~np.isnan(truth[table.train, ahead])]
        fits = [
            Ridge(penalty).fit(features[usable], truth[usable, ahead]).predict(features)
            for penalty in PENALTIES
        ]
        lines.append(_best(fits, table, truth[:, ahead]))
    return {
        "last value": last,
        "same hour yesterday": day_before(value),
        "climatology": best,
        "linear, last 24 hours": np.stack(lines, axis=1),
    }


def _best(candidates: list[Floats], table: Table, truth: Floats) -> Floats:
    validate = table.validate
    losses = [float(np.nanmean(np.abs(truth[validate] - fit[validate]))) for fit in candidates]
    return candidates[int(np.argmin(losses))]
