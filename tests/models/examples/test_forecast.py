from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from models.examples.forecast.__main__ import SPEC
from models.examples.forecast.horizon import _ahead, _baselines
from models.examples.weather.baselines import HOUR_MS
from models.examples.weather.data import weather_events
from models.spec.spec_file import read_spec
from models.training.data import fitted_spec, moment_ms, streams_of
from models.training.evaluate import scored_rows
from models.training.table import Table

ORIGIN = datetime(2013, 11, 20, 6, tzinfo=UTC)
HORIZON = 2
"""Hours ahead: the linear baseline is fitted for each of them, which takes a second."""


def table_of(events: pl.DataFrame) -> tuple[Table, np.ndarray]:
    """The example's table and its temperatures."""
    spec = read_spec(SPEC)
    validate, test = (moment_ms(spec.events, f"2013-{day}", "x") for day in ("10-01", "11-01"))
    streams = streams_of(spec, events)
    spec = fitted_spec(spec, streams, validate)
    rows = (
        scored_rows(streams, None, validate),
        scored_rows(streams, validate, test),
        scored_rows(streams, test),
    )
    table = Table(spec, streams, streams.encoded(spec.events), *rows)
    return table, streams.columns.values["temperature"].astype(np.float64)


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return weather_events()


def test_future_hours_are_selected_by_timestamp(events):
    table, value = table_of(events)
    truth = _ahead(table, value, 3)
    moments, stream = table.streams.moments_ms, table.stream_of
    at = {(s, m): row for row, (s, m) in enumerate(zip(stream, moments, strict=True))}
    absent = 0
    for row in np.random.default_rng(1).integers(0, len(value), 500):
        for hours in (1, 2, 3):
            later = at.get((stream[row], moments[row] + hours * HOUR_MS))
            absent += later is None
            expected = np.nan if later is None else value[later]
            np.testing.assert_equal(truth[row, hours - 1], expected)
    assert absent > 0


def test_baselines_do_not_use_values_after_the_forecast_origin(events):
    """A forecast does not change with the held-out hours after its origin."""
    later = pl.col("observed") > ORIGIN
    changed = events.with_columns(
        pl.when(later).then(pl.col(name) + 40).otherwise(name).alias(name)
        for name in ("temperature", "dew_point")
    )
    at_origin = []
    for frame in (events, changed):
        table, value = table_of(frame)
        forecasts = _baselines(table, value, _ahead(table, value, HORIZON))
        rows = np.flatnonzero(table.streams.moments_ms == ORIGIN.timestamp() * 1000)
        assert len(rows) == 3
        at_origin.append({name: points[rows] for name, points in forecasts.items()})
    assert len(at_origin[0]) == 4
    for name, points in at_origin[0].items():
        assert np.isfinite(points).all()
        np.testing.assert_array_equal(points, at_origin[1][name])


def test_seasonal_baseline_uses_the_hour_a_day_before_the_predicted_one(events):
    table, value = table_of(events)
    forecasts = _baselines(table, value, _ahead(table, value, HORIZON))["same hour yesterday"]
    moments, stream = table.streams.moments_ms, table.stream_of
    at = {(s, m): row for row, (s, m) in enumerate(zip(stream, moments, strict=True))}
    for row in np.random.default_rng(3).integers(0, len(value), 300):
        for ahead in range(1, HORIZON + 1):
            before = at.get((stream[row], moments[row] + (ahead - 24) * HOUR_MS), row)
            assert forecasts[row, ahead - 1] == value[before]
