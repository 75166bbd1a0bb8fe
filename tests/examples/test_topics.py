"""The departures that the producer of the compose file sends."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from itertools import islice

import polars as pl

from examples.topics.producer import departures
from models.pretrained.airport import AIRPORT_COLUMNS, AirportTraffic
from models.pretrained.departures import EVENT_COLUMNS, TIMEZONE, flight_events
from models.spec.spec_file import read_spec
from tests.support.pages import ROOT
from tests.support.strict_events import event_adapter

EVENTS_PER_DAY = 934


def test_positions_and_times_continue_from_day_to_day() -> None:
    positions: Counter[str] = Counter()
    last: dict[str, datetime] = {}
    sent = [*islice(departures(), 2 * EVENTS_PER_DAY + 5)]
    for stream, event, position in sent:
        assert position == positions[stream]
        positions[stream] += 1
        departed = datetime.fromisoformat(event["departed"])
        assert last.get(stream, departed) <= departed
        last[stream] = departed
    # a restarted producer continues with the same events
    for start in (1, EVENTS_PER_DAY, EVENTS_PER_DAY + 700):
        assert [*islice(departures(start), 5)] == sent[start : start + 5]


def test_the_departures_are_those_of_the_data() -> None:
    spec = read_spec(ROOT / "examples" / "flights" / "spec.yaml")
    assert spec.events is not None
    adapter = event_adapter(spec.events)
    sent = [*islice(departures(), EVENTS_PER_DAY)]
    local = pl.col("departed").dt.convert_time_zone(TIMEZONE)
    day = flight_events().filter(local.dt.date() == datetime(2013, 1, 2).date())
    assert len(day) == EVENTS_PER_DAY
    for stream, event, position in sent:
        adapter.validate_json(json.dumps(event))
        assert set(event) <= set(EVENT_COLUMNS)
        recorded = day.filter(pl.col("stream") == stream.removeprefix("live-"))
        for name in ("dep_delay", *AIRPORT_COLUMNS):
            assert recorded[name][position] == event.get(name)


def test_a_producer_computes_the_airport_fields_from_the_departures_so_far() -> None:
    traffic = AirportTraffic()
    for _, event, _ in islice(departures(), EVENTS_PER_DAY + 300):
        moment_ms = round(datetime.fromisoformat(event["departed"]).timestamp() * 1000)
        fields = traffic.add(event["origin"], moment_ms, event["dep_delay"])
        assert fields == {name: event.get(name) for name in AIRPORT_COLUMNS}
