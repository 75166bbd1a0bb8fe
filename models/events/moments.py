"""RFC 3339 timestamps to epoch milliseconds, a list at a time.

The texts of one client look alike: the same digits after the second, the same kind of offset.
Such a list is checked against its shape in one comparison and parsed by NumPy in another call;
any other list goes through the validator that the event type uses, text by text. What is
accepted, and as which moment, is the same either way.
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

# Every digit becomes 0, and everything else stays as it is.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_SHAPE = re.compile(rb"0000-00-00[T ]00:00:00(?:\.0{1,9})?([Zz]|[+-]00:00)")


def epoch_ms(moments: Sequence[str | int]) -> IntArray | None:
    """Epoch milliseconds int64 [T] of timestamps as events may state them.

    Args:
        moments: RFC 3339 texts, or integers that are known to be in range.

    Returns:
        None where one of them is no timestamp that an event may have.
    """
    kinds = set(map(type, moments))
    if kinds == {str}:
        texts: Sequence[str] = moments  # type: ignore[assignment]
        alike = same_shape_ms(texts)
        if alike is not None:
            return alike
    elif kinds <= {int}:
        return np.array(moments, np.int64)
    validate = timestamp_validator().validate_python
    try:
        return np.array([timestamp_ms(validate(moment)) for moment in moments], np.int64)
    except ValidationError:
        return None


def same_shape_ms(texts: Sequence[str]) -> IntArray | None:
    """As `epoch_ms`; None as well where the texts differ in shape."""
    if len(texts[0]) > _LONGEST:
        return None
    try:
        written = "\n".join(texts).encode()
        parts = _parts(texts[0].encode().translate(_DIGITS))
        if parts is None:
            return None
        shape, dtype = parts
        written += b"\n"
        if written.translate(_DIGITS) != shape * len(texts):
            return None
        found = np.frombuffer(written, dtype)
        times_ms = found["local"].astype("datetime64[ms]").view(np.int64)
        times_ms = times_ms - _offsets_ms(found["offset"].tolist())
    except ValueError:
        # No text in UTF-8, a date that no calendar has, or an offset of a day and more.
        return None
    if np.min(times_ms) < MIN_TIMESTAMP_MS or np.max(times_ms) >= MAX_TIMESTAMP_MS:
        return None
    return times_ms


# Shapes are of what clients write: short, and so is what is remembered.
@lru_cache(maxsize=256)
def _parts(shape: bytes) -> tuple[bytes, np.dtype[np.void]] | None:
    """A line of that shape and its parts, or None for a shape that no timestamp has."""
    match = _SHAPE.fullmatch(shape)
    if match is None:
        return None
    offset = match.start(1)
    # NumPy cuts digits after the millisecond off.
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


# There are 2,882 offsets.
@lru_cache(maxsize=4096)
def _offset_ms(offset: bytes) -> int:
    if offset in b"Zz":
        return 0
    hours, minutes = int(offset[1:3]), int(offset[4:6])
    if hours > 23 or minutes > 59:
        raise ValueError(f"expected an offset below a day, got {offset!r}")
    span_ms = (60 * hours + minutes) * _MINUTE_MS
    return -span_ms if offset[:1] == b"-" else span_ms
