"""Vectorised UTC offsets of a time zone.

`zoneinfo` computes the offset of one time. Here the zone's transitions between 1899 and
2201 are computed once, to the second, and offsets are looked up by binary search.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

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
