"""Time zone tables, compared with `zoneinfo`."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.events.calendar import DAY_MS, STEP_DAYS, zone_table
from models.events.parse import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ZONES = [
    "UTC",
    "America/New_York",
    "Europe/Vienna",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "Africa/Casablanca",
    "America/Recife",
]
SHORT_STAYS = ["America/Recife", "Asia/Gaza", "Africa/Tunis", "Europe/Vienna"]
"""Zones with the shortest stays in the tz database: 7 days in the first two."""


def offset_ms(zone: str, utc_ms: int) -> int:
    moment = EPOCH + timedelta(milliseconds=utc_ms)
    offset = moment.astimezone(ZoneInfo(zone)).utcoffset()
    assert offset is not None
    return offset // timedelta(milliseconds=1)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ZONES), st.integers(MIN_TIMESTAMP_MS, MAX_TIMESTAMP_MS - 1))
def test_offsets_equal_zoneinfo(zone: str, utc_ms: int) -> None:
    assert zone_table(zone).offsets(np.array([utc_ms]))[0] == offset_ms(zone, utc_ms)


@pytest.mark.parametrize("zone", ZONES)
def test_offsets_change_at_the_exact_millisecond(zone: str) -> None:
    starts = zone_table(zone).starts_ms[1:]
    around = np.concatenate((starts - 1, starts))

    found = zone_table(zone).offsets(around)

    assert found.tolist() == [offset_ms(zone, moment) for moment in around.tolist()]
    assert (found[: len(starts)] != found[len(starts) :]).all()


def test_short_periods_are_not_missed() -> None:
    """Gaza stops its summer time for Ramadan; what is left before winter can be a week."""
    start = int(datetime(2035, 1, 1, 12, tzinfo=UTC).timestamp()) * 1000
    noons = start + 86_400_000 * np.arange(55 * 365)

    found = zone_table("Asia/Gaza").offsets(noons)

    assert found.tolist() == [offset_ms("Asia/Gaza", moment) for moment in noons.tolist()]


def test_the_search_step_is_shorter_than_any_period() -> None:
    stays = [np.diff(zone_table(zone).starts_ms[1:]).min(initial=2**40) for zone in SHORT_STAYS]

    assert min(stays) > 2 * STEP_DAYS * DAY_MS


def local(text: str) -> int:
    return (datetime.fromisoformat(text) - datetime(1970, 1, 1)) // timedelta(milliseconds=1)


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2013-03-31T01:59:59", "2013-03-31T00:59:59"),
        ("2013-03-31T02:30:00", None),
        ("2013-03-31T03:00:00", "2013-03-31T01:00:00"),
        ("2013-10-27T01:59:59", "2013-10-26T23:59:59"),
        ("2013-10-27T02:30:00", "2013-10-27T00:30:00"),
        ("2013-10-27T03:00:00", "2013-10-27T02:00:00"),
        ("2013-07-01T12:00:00", "2013-07-01T10:00:00"),
    ],
)
def test_local_times_in_vienna(text: str, utc: str | None) -> None:
    moments, exists = zone_table("Europe/Vienna").to_utc(np.array([local(text)]))

    assert exists.tolist() == [utc is not None]
    if utc is not None:
        assert moments.tolist() == [local(utc)]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ZONES), st.integers(MIN_TIMESTAMP_MS, MAX_TIMESTAMP_MS - 1))
def test_local_times_map_to_their_utc_time_or_an_earlier_one(zone: str, utc_ms: int) -> None:
    shown = utc_ms + offset_ms(zone, utc_ms)

    moments, exists = zone_table(zone).to_utc(np.array([shown]))

    assert exists.all()
    assert moments[0] <= utc_ms
    assert moments[0] + offset_ms(zone, int(moments[0])) == shown


def test_a_local_day_starts_at_local_midnight() -> None:
    """In New York on the second of July 2013, at 04:00 UTC."""
    midnight = int(datetime(2013, 7, 2, 4, tzinfo=UTC).timestamp()) * 1000
    moments = np.array([midnight - 1, midnight, midnight + DAY_MS - 1], np.int64)
    second = (date(2013, 7, 2) - date(1970, 1, 1)).days
    assert zone_table("America/New_York").days(moments).tolist() == [second - 1, second, second]
