"""Local time: UTC offsets of a time zone, and calendar features of timestamps, vectorised.

`zoneinfo` computes the offset of one time. Here the zone's transitions between 1899 and 2201 are
computed once, to the second, and offsets are looked up by binary search. Sine and cosine come from
tables, which is faster than computing them, and gives the same bits for any chunk length. The
equations are in `models.events.encode`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from models.events.schema import DEFAULT_CALENDAR, EventSchema

IntArray = NDArray[np.int64]

DAY_MS = 86_400_000
_DAY_S = 86_400

STEP_DAYS = 3
"""Step of the search for transitions. The shortest period with one offset in the tz
database is just under seven days (Recife, 2000), so no transition is missed."""

_STEP_S = STEP_DAYS * _DAY_S
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_DAY = (datetime(1899, 1, 1, tzinfo=UTC) - _EPOCH).days
_END_DAY = (datetime(2201, 1, 1, tzinfo=UTC) - _EPOCH).days


@dataclass(frozen=True, slots=True, eq=False)
class ZoneTable:
    """Offsets of a zone: `offsets_ms[i]` is valid in [`starts_ms[i]`, `starts_ms[i+1]`)."""

    starts_ms: IntArray
    offsets_ms: IntArray

    def offsets(self, utc_ms: IntArray) -> IntArray:
        """Local time minus UTC at each time, in milliseconds."""
        return self.offsets_ms.take(self.starts_ms[1:].searchsorted(utc_ms, side="right"))

    def days(self, utc_ms: IntArray) -> IntArray:
        """The local day of each time, counted from 1970-01-01."""
        return (utc_ms + self.offsets(utc_ms)) // DAY_MS

    def to_utc(self, local_ms: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        """Convert local times to UTC.

        Args:
            local_ms: int64, milliseconds of the local date and time since 1970-01-01T00:00.

        Returns:
            Epoch milliseconds, of two possible times the earlier; and whether the local time
            exists (clocks that are set forward skip some times).
        """
        before = local_ms - self.offsets(local_ms - DAY_MS)
        after = local_ms - self.offsets(local_ms + DAY_MS)
        before_exists = before + self.offsets(before) == local_ms
        after_exists = after + self.offsets(after) == local_ms
        either = np.where(before_exists, before, after)
        both = before_exists & after_exists
        return np.where(both, np.minimum(before, after), either), before_exists | after_exists


@lru_cache(maxsize=64)
def zone_table(name: str) -> ZoneTable:
    """The table of an IANA zone, cached per process (computed in about 0.1 s)."""
    zone = ZoneInfo(name)
    starts_s = [_FIRST_DAY * _DAY_S]
    offsets_s = [_offset_s(zone, starts_s[0])]
    for second in range(starts_s[0] + _STEP_S, _END_DAY * _DAY_S, _STEP_S):
        offset = _offset_s(zone, second)
        if offset != offsets_s[-1]:
            low, high = second - _STEP_S, second
            while high - low > 1:
                middle = (low + high) // 2
                if _offset_s(zone, middle) == offset:
                    high = middle
                else:
                    low = middle
            starts_s.append(high)
            offsets_s.append(offset)
    return ZoneTable(np.array(starts_s, np.int64) * 1000, np.array(offsets_s, np.int64) * 1000)


def _offset_s(zone: ZoneInfo, utc_s: int) -> int:
    # `fromutc` interprets its argument's local time as UTC.
    offset = zone.fromutc(_EPOCH.replace(tzinfo=zone) + timedelta(seconds=utc_s)).utcoffset()
    return 0 if offset is None else offset.days * _DAY_S + offset.seconds


FloatArray = NDArray[np.float32]

_MINUTE_MS = 60_000
_DAY_MINUTES = 1440
_WEEK_DAYS = 7
_WEEK_MINUTES = _WEEK_DAYS * _DAY_MINUTES
_EPOCH_MINUTE = 3 * _DAY_MINUTES
"""The minute of the week, from Monday 0:00, of 1970-01-01T00:00."""


def calendar_angles(schema: EventSchema, times_ms: IntArray) -> FloatArray:
    """Compute the calendar's columns [T, C] of timestamps [T] of a schema."""
    if schema.timestamp is None:
        raise ValueError("expected a schema with a timestamp")
    parts = schema.timestamp.calendar
    local_ms = times_ms + zone_table(schema.timezone).offsets(times_ms)
    if parts == DEFAULT_CALENDAR:
        return _calendar().take(_week_minutes(local_ms), axis=0)
    tables = []
    if "hour" in parts or "weekday" in parts:
        week = _calendar().take(_week_minutes(local_ms), axis=0)
        tables += [week[:, :2]] * ("hour" in parts) + [week[:, 2:]] * ("weekday" in parts)
    if "yearday" in parts:
        years = local_ms.astype("datetime64[ms]").astype("datetime64[Y]")
        first = years.astype("datetime64[D]").astype(np.int64)
        length = (years + np.timedelta64(1, "Y")).astype("datetime64[D]").astype(np.int64) - first
        day = local_ms // DAY_MS - first
        leap, common = (_angles(days).take(day, axis=0, mode="clip") for days in (366, 365))
        tables.append(np.where((length == 366)[:, np.newaxis], leap, common))
    return np.hstack(tables) if tables else np.zeros((len(times_ms), 0), np.float32)


def _week_minutes(local_ms: IntArray) -> IntArray:
    """Compute the minute of the week, from Monday 0:00, of each local time."""
    minutes = local_ms // _MINUTE_MS
    minutes += _EPOCH_MINUTE
    minutes %= _WEEK_MINUTES
    return minutes


@cache
def _calendar() -> FloatArray:
    """Table of sine and cosine of hour and weekday for each minute of the week."""
    hours, days = _angles(_DAY_MINUTES), _angles(_WEEK_DAYS)
    return np.hstack([np.tile(hours, (_WEEK_DAYS, 1)), np.repeat(days, _DAY_MINUTES, axis=0)])


@cache
def _angles(period: int) -> FloatArray:
    turns = [2 * math.pi * step / period for step in range(period)]
    return np.array([(math.sin(turn), math.cos(turn)) for turn in turns], np.float32)
