from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from examples.weather.__main__ import SPEC
from examples.weather.baselines import hours_ago, local_hours, same_hour_mean
from examples.weather.data import WEATHER_COLUMNS, weather_events
from models.spec.spec_file import read_spec
from models.training.data import fitted_spec, moment_ms, streams_of
from models.training.table import Table

NOBODY = np.arange(0)


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return weather_events()


@pytest.fixture(scope="module")
def table(events) -> Table:
    spec = read_spec(SPEC)
    streams = streams_of(spec, events)
    spec = fitted_spec(spec, streams, moment_ms(spec.events, "2013-10-01", "validate_from"))
    return Table(spec, streams, streams.encoded(spec.events), NOBODY, NOBODY, NOBODY)


def test_streams_are_airports_in_the_order_of_their_hours(events):
    assert events.columns == ["airport", *WEATHER_COLUMNS]
    assert set(events["airport"]) == {"EWR", "JFK", "LGA"}
    for part in events.partition_by("airport"):
        assert part["observed"].diff().dt.total_hours().min() == 1
    assert events.drop("pressure").null_count().sum_horizontal()[0] == 0


def test_wind_components_point_downwind(events):
    """At Newark on 1 January 2013, 07:00, the wind came from 250 degrees, 8.05 mph."""
    hour = events.filter(
        (pl.col("airport") == "EWR")
        & (pl.col("observed").dt.to_string("%Y-%m-%dT%H") == "2013-01-01T07")
    )
    speed = 8.05546 * 0.44704
    assert hour["wind_east"][0] == pytest.approx(speed * np.sin(np.radians(70)))
    assert hour["wind_north"][0] == pytest.approx(speed * np.cos(np.radians(70)))


def test_baselines_select_past_hours_by_timestamp(table):
    value = table.encoded("pressure")
    moments, stream = table.streams.moments_ms, table.stream_of
    hours = local_hours(table)
    at = {(s, m): row for row, (s, m) in enumerate(zip(stream, moments, strict=True))}
    before, mean = hours_ago(table, value, 24), same_hour_mean(table, value, 3)
    absent = 0
    for row in np.random.default_rng(2).integers(0, len(value), 800):
        earlier = at.get((stream[row], moments[row] - 24 * 3_600_000))
        expected = np.nan if earlier is None else value[earlier]
        absent += np.isnan(expected)
        np.testing.assert_equal(before[row], expected)
        same = (stream == stream[row]) & (hours == hours[row]) & (moments < moments[row])
        last = value[np.flatnonzero(same)[-3:]]
        expected = np.nanmean(last) if np.isfinite(last).any() else np.nan
        np.testing.assert_allclose(mean[row], expected)
    assert absent > 20
