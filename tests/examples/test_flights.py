import functools
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from examples.flights.__main__ import SPEC
from examples.flights.candidates import NETWORKS, VALIDATE_FROM, candidate
from models.pretrained import departures as data
from models.pretrained.airport import AIRPORT_COLUMNS, AirportTraffic
from models.pretrained.departures import EVENT_COLUMNS, flight_events, with_weather
from models.spec.layers import LstmLayer
from models.spec.spec_file import read_spec


@pytest.fixture(scope="module", autouse=True)
def tables():
    """The files are read once: that takes longer than all that is made of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_read", functools.cache(data._read))
        yield


@pytest.fixture(scope="module")
def events(tables) -> pl.DataFrame:
    return flight_events()


def test_streams_are_airports_and_carriers_in_the_order_of_departure(events):
    assert events.columns == ["stream", *EVENT_COLUMNS]
    assert (events["stream"] == events["origin"] + "-" + events["carrier"]).all()
    since = events.select(pl.col("departed").diff().over("stream").dt.total_milliseconds())
    assert since["departed"].min() == 0


def test_streams_by_aircraft_contain_the_same_departures(events):
    other = flight_events("aircraft")
    keys = ["departed", "origin", "carrier", "destination", "dep_delay"]
    assert other.select(keys).sort(keys).equals(events.select(keys).sort(keys))


def test_departures_match_the_local_clock(events):
    """`dep_time` is the local time, also across midnight and both clock changes."""
    flights, _ = data._read()
    wall = pl.col("departed").dt.convert_time_zone("America/New_York")
    clock_counts = (
        events.select(shown=wall.dt.hour().cast(pl.Int64) * 100 + wall.dt.minute())
        .group_by("shown")
        .len()
        .sort("shown")
    )
    expected = (
        flights.filter(pl.col("dep_time").is_not_null())
        .select(shown=pl.col("dep_time") % 2400)
        .group_by("shown")
        .len()
        .sort("shown")
    )
    assert clock_counts.equals(expected)


def test_events_do_not_leak_the_future(events, monkeypatch):
    """Events up to a time do not change if later departures and weather are removed."""
    now = pl.datetime(2013, 7, 23, 16, 0, time_unit="ms", time_zone="UTC")
    flights, weather = data._read()
    planned = data._utc("time_hour") + pl.duration(minutes=pl.col("minute"))
    departed = planned + pl.duration(minutes=pl.col("dep_delay"))
    known_flights = flights.filter(departed <= now).with_columns(
        arr_time=None, arr_delay=None, air_time=None
    )
    known_weather = weather.filter(data._utc("time_hour") + pl.duration(hours=1) <= now)
    monkeypatch.setattr(data, "_read", lambda: (known_flights, known_weather))
    rebuilt = flight_events()
    assert rebuilt.height > 180_000
    assert rebuilt.equals(events.filter(pl.col("departed") <= now))


def test_weather_is_that_of_the_last_completed_hour():
    departed = (
        pl.datetime_range(
            pl.datetime(2013, 5, 1, 9),
            pl.datetime(2013, 5, 1, 16),
            timedelta(minutes=59),
            eager=True,
        )
        .dt.replace_time_zone("UTC")
        .cast(pl.Datetime("ms", "UTC"))
    )
    departures = pl.DataFrame({"origin": "JFK", "departed": departed})
    weather = pl.DataFrame(
        {
            "origin": ["JFK", "JFK", "LGA"],
            "time_hour": ["2013-05-01T09:00:00Z", "2013-05-01T10:00:00Z", "2013-05-01T11:00:00Z"],
            "wind_speed": [1.0, 2.0, 3.0],
            "precip": [0.0, 0.5, 1.0],
            "visib": [10.0, None, 1.0],
        }
    )
    departures_with_weather = with_weather(departures, weather)
    hours = [moment.strftime("%H:%M") for moment in departures_with_weather["departed"]]
    assert dict(zip(hours, departures_with_weather["wind_speed"], strict=True)) == {
        "09:00": None,
        "09:59": None,
        "10:58": 1.0,
        "11:57": 2.0,
        "12:56": 2.0,
        "13:55": 2.0,
        "14:54": None,
        "15:53": None,
    }


HOUR_MS = 3_600_000
QUARTER_MS = 900_000


def test_airport_fields_are_those_of_the_departures_before(events):
    """Windows by definition: all streams of the airport, earlier moments only, up to an hour."""
    for airport in ("EWR", "JFK", "LGA"):
        of_airport = events.filter(pl.col("origin") == airport)
        moments = of_airport["departed"].dt.epoch("ms").to_numpy()
        delays = of_airport["dep_delay"].to_numpy()
        for row in range(0, len(of_airport), 997):
            age = moments[row] - moments
            for minutes, length_ms in ((15, QUARTER_MS), (60, HOUR_MS)):
                before = delays[(age > 0) & (age <= length_ms)]
                mean = of_airport[f"airport_delay_{minutes}m"][row]
                assert of_airport[f"airport_departures_{minutes}m"][row] == len(before)
                assert mean == (pytest.approx(before.mean(), abs=0.051) if len(before) else None)


def test_airport_fields_do_not_depend_on_the_order_of_departures_of_one_moment():
    together = [("JFK", HOUR_MS, delay) for delay in (1, 30, 7)]
    for order in (together, together[::-1]):
        traffic = AirportTraffic()
        traffic.add("JFK", 0, 5)
        for departure in order:
            assert [*traffic.add(*departure).values()] == [0, None, 1, 5.0]
        assert [*traffic.add("JFK", HOUR_MS + 1, 0).values()] == [3, 12.7, 3, 12.7]


def test_a_departure_changes_only_fields_of_later_moments_at_its_airport():
    random = np.random.default_rng(3)
    moments = np.sort(random.integers(0, 240, 400)) * 60_000
    departures = [
        (("EWR", "JFK")[at % 2], int(moment), int(random.integers(-10, 90)))
        for at, moment in enumerate(moments)
    ]
    changed = 200
    origin, moment_ms, delay = departures[changed]
    with_change = [*departures]
    with_change[changed] = (origin, moment_ms, delay + 300)
    before, after = (
        [traffic.add(*departure) for departure in each]
        for traffic, each in (
            (AirportTraffic(), departures),
            (AirportTraffic(), with_change),
        )
    )
    differing = {at for at in range(400) if before[at] != after[at]}
    assert differing == {
        at
        for at, (airport, at_ms, _) in enumerate(departures)
        if airport == origin and moment_ms < at_ms <= moment_ms + HOUR_MS
    }


def test_a_departure_earlier_than_the_one_before_is_rejected():
    traffic = AirportTraffic()
    traffic.add("JFK", HOUR_MS, 0)
    assert traffic.add("LGA", 0, 0) == dict.fromkeys(AIRPORT_COLUMNS, 0) | {
        "airport_delay_15m": None,
        "airport_delay_60m": None,
    }
    with pytest.raises(ValueError, match="expected a moment from 3600000 ms on, got 0"):
        traffic.add("JFK", 0, 0)


def test_candidates_change_layers_and_regularisation_and_keep_the_held_out_months():
    written = read_spec(SPEC)
    for arguments in NETWORKS.values():
        spec = candidate(**arguments)
        assert spec.events == written.events
        assert spec.training.validate_from == VALIDATE_FROM < written.training.validate_from
        assert spec.training.test_from == written.training.test_from
        units = [layer.units for layer in spec.layers if isinstance(layer, LstmLayer)]
        assert units == [arguments["units"]] * 2
    layers = candidate(units=8, rate=0.2, input_rate=0.1).layers
    assert (layers[0].rate, layers[-1].rate) == (0.1, 0.2)
    training = candidate(units=8, epochs=16).training
    assert training is not None
    assert training.epochs == 16
