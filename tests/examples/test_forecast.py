from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from examples.forecast.__main__ import SPEC
from examples.forecast.horizon import _ahead, _baselines
from examples.weather.baselines import HOUR_MS
from examples.weather.data import weather_events
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
    """Those since August: encoding and fitting take time in proportion to them."""
    return weather_events().filter(pl.col("observed") >= datetime(2013, 8, 1, tzinfo=UTC))


@pytest.fixture(scope="module")
def table_and_value(events) -> tuple[Table, np.ndarray]:
    return table_of(events)


@pytest.fixture(scope="module")
def forecasts(table_and_value) -> dict[str, np.ndarray]:
    """The baselines' forecasts of all events."""
    table, value = table_and_value
    return _baselines(table, value, _ahead(table, value, HORIZON))


def test_future_hours_are_selected_by_timestamp(table_and_value):
    table, value = table_and_value
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


def test_baselines_do_not_use_values_after_the_forecast_origin(events, table_and_value, forecasts):
    """A forecast does not change with the held-out hours after its origin."""
    later = pl.col("observed") > ORIGIN
    changed = events.with_columns(
        pl.when(later).then(pl.col(name) + 40).otherwise(name).alias(name)
        for name in ("temperature", "dew_point")
    )
    changed_table, value = table_of(changed)
    changed_forecasts = _baselines(changed_table, value, _ahead(changed_table, value, HORIZON))
    at_origin = []
    for table, by_name in ((table_and_value[0], forecasts), (changed_table, changed_forecasts)):
        rows = np.flatnonzero(table.streams.moments_ms == ORIGIN.timestamp() * 1000)
        assert len(rows) == 3
        at_origin.append({name: points[rows] for name, points in by_name.items()})
    assert len(at_origin[0]) == 4
    for name, points in at_origin[0].items():
        assert np.isfinite(points).all()
        np.testing.assert_array_equal(points, at_origin[1][name])


def test_seasonal_baseline_uses_the_hour_a_day_before_the_predicted_one(table_and_value, forecasts):
    table, value = table_and_value
    yesterday = forecasts["same hour yesterday"]
    moments, stream = table.streams.moments_ms, table.stream_of
    at = {(s, m): row for row, (s, m) in enumerate(zip(stream, moments, strict=True))}
    for row in np.random.default_rng(3).integers(0, len(value), 300):
        for ahead in range(1, HORIZON + 1):
            before = at.get((stream[row], moments[row] + (ahead - 24) * HOUR_MS), row)
            assert yesterday[row, ahead - 1] == value[before]
