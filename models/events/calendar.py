"""Calendar features of timestamps: sine and cosine of local time, from tables.

Faster than vectorised sin and cos, and the same bits for any chunk length. The equations are in
`models.events.encode`.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from models.events.schema import DEFAULT_CALENDAR, EventSchema
from models.events.zones import DAY_MS, zone_table

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

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
