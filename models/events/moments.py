"""Vectorised parsing of RFC 3339 timestamps to epoch milliseconds.

The strings of one client have the same shape: number of decimals, kind of offset.
Such a list is compared with its shape at once, and parsed by one NumPy call;
any other list is validated string by string by the validator of the event type. Both ways
accept the same strings and return the same times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from models.events.parse import (
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    timestamp_ms,
    timestamp_validator,
)

IntArray = NDArray[np.int64]

_MINUTE_MS = 60_000
_LONGEST = len("2013-01-01T05:17:00.123456789-05:00")

# Replaces every digit by 0.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_SHAPE = re.compile(rb"0000-00-00[T ]00:00:00(?:\.0{1,9})?([Zz]|[+-]00:00)")


def epoch_ms(moments: Sequence[str | int]) -> IntArray | None:
    """Parse timestamps of events to epoch milliseconds, int64 [T].

    Args:
        moments: RFC 3339 strings, or integers that are validated already.

    Returns:
        None if one of them is invalid.
    """
    kinds = set(map(type, moments))
    if kinds == {str}:
        strings: Sequence[str] = moments  # type: ignore[assignment]
        alike = parse_uniform_strings(strings)
        if alike is not None:
            return alike
    elif kinds <= {int}:
        return np.array(moments, np.int64)
    validate = timestamp_validator().validate_python
    try:
        return np.array([timestamp_ms(validate(moment)) for moment in moments], np.int64)
    except ValidationError:
        return None


def parse_uniform_strings(strings: Sequence[str]) -> IntArray | None:
    """Parse strings of one shape; None if shapes differ or a string is invalid."""
    if len(strings[0]) > _LONGEST:
        return None
    try:
        written = "\n".join(strings).encode()
        parts = _parts(strings[0].encode().translate(_DIGITS))
        if parts is None:
            return None
        shape, dtype = parts
        written += b"\n"
        if written.translate(_DIGITS) != shape * len(strings):
            return None
        found = np.frombuffer(written, dtype)
        times_ms = found["local"].astype("datetime64[ms]").view(np.int64)
        times_ms = times_ms - _offsets_ms(found["offset"].tolist())
    except ValueError:
        # A lone surrogate, a date that does not exist, or an offset of a day or more.
        return None
    if np.min(times_ms) < MIN_TIMESTAMP_MS or np.max(times_ms) >= MAX_TIMESTAMP_MS:
        return None
    return times_ms


# Only short strings get here, so the cache is small.
@lru_cache(maxsize=256)
def _parts(shape: bytes) -> tuple[bytes, np.dtype[np.void]] | None:
    """A line of a shape and the dtype of its parts; None if no timestamp has that shape."""
    match = _SHAPE.fullmatch(shape)
    if match is None:
        return None
    offset = match.start(1)
    # NumPy truncates after the millisecond.
    return shape + b"\n", np.dtype(
        {
            "names": ["local", "offset"],
            "formats": [f"S{offset}", f"S{len(shape) - offset}"],
            "offsets": [0, offset],
            "itemsize": len(shape) + 1,
        }
    )


def _offsets_ms(offsets: list[bytes]) -> int | IntArray:
    first = offsets[0]
    if offsets.count(first) == len(offsets):
        return _offset_ms(first)
    return np.array([_offset_ms(offset) for offset in offsets], np.int64)


# There are 2,882 different offsets.
@lru_cache(maxsize=4096)
def _offset_ms(offset: bytes) -> int:
    if offset in b"Zz":
        return 0
    hours, minutes = int(offset[1:3]), int(offset[4:6])
    if hours > 23 or minutes > 59:
        raise ValueError(f"expected an offset below a day, got {offset!r}")
    span_ms = (60 * hours + minutes) * _MINUTE_MS
    return -span_ms if offset[:1] == b"-" else span_ms
