"""Forms of the values in events: timestamps, booleans, and their JSON Schema.

A timestamp is an RFC 3339 string with an offset, or integer epoch milliseconds, in 1900 to 2199; a
field's options add epoch seconds and local times. Leap seconds (`:60`) are rejected. The timestamps
of one client have the same shape: number of decimals, kind of offset. Such a list is compared with
its shape at once, and parsed by one NumPy call; any other list is converted value by value. Both
ways accept the same strings and return the same times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.events.calendar import zone_table
from models.events.schema import (
    MAX_CATEGORY_CHARS,
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)

IntArray = NDArray[np.int64]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

MIN_TIMESTAMP_MS = (datetime(1900, 1, 1, tzinfo=UTC) - _EPOCH) // _MILLISECOND
MAX_TIMESTAMP_MS = (datetime(2200, 1, 1, tzinfo=UTC) - _EPOCH) // _MILLISECOND
"""Timestamps are in [1900-01-01, 2200-01-01), as epoch milliseconds."""

EPOCH_SECONDS = range(300_000_000, 4_200_000_000)
"""Integers that are probably epoch seconds: as seconds these are times of 1979 to 2103; as
milliseconds, of January and February 1970."""
RESET = "reset"
"""The member of an event by which a client resets the state before it."""
TRUTH = {"true": True, "false": False, "1": True, "0": False}
"""Strings that are booleans, in lower case."""

_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_EXAMPLE_TIMESTAMP = "2013-01-01T05:17:00-05:00"


def rfc3339_ms(text: str) -> int:
    """Epoch milliseconds of an RFC 3339 timestamp with an offset, rounded down.

    Raises:
        ValueError: it is none, or is out of range.
    """
    if not _RFC3339.fullmatch(text):
        raise ValueError("expected an RFC 3339 timestamp with an offset")
    return _in_range(datetime_ms(datetime.fromisoformat(text.upper())))


def local_ms(text: str, timezone: str) -> int:
    """Epoch milliseconds of a date and time without an offset, of two possible ones the earlier.

    Raises:
        ValueError: it is none, has an offset, is skipped by clocks, or is out of range.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is not None:
        raise ValueError("expected no offset")
    local = np.array([datetime_ms(moment.replace(tzinfo=UTC))], np.int64)
    moments, exists = zone_table(timezone).to_utc(local)
    if not exists[0]:
        raise ValueError(f"expected a local time that exists in {timezone}")
    return _in_range(int(moments[0]))


def datetime_ms(moment: datetime) -> int:
    """Epoch milliseconds of an aware datetime, rounded down."""
    return (moment - _EPOCH) // _MILLISECOND


def _in_range(moment_ms: int) -> int:
    if not MIN_TIMESTAMP_MS <= moment_ms < MAX_TIMESTAMP_MS:
        raise ValueError("expected a time from 1900-01-01 to before 2200-01-01")
    return moment_ms


def value_converter(schema: EventSchema, field: EventField) -> Callable[[Any], bool | int]:
    """Make the function that converts a timestamp or a boolean from any of its forms.

    Timestamps become epoch milliseconds; a value in none of the forms raises ValueError.
    """

    def to_epoch_ms(value: str | float) -> int:
        if isinstance(value, str):
            if allows_local and not _RFC3339.fullmatch(value):
                return local_ms(value, schema.timezone)
            return rfc3339_ms(value)
        if in_seconds and type(value) in (int, float):
            if MIN_TIMESTAMP_MS / 1000 <= value < MAX_TIMESTAMP_MS / 1000:
                return round(value * 1000)
        elif type(value) is int:
            return _in_range(value)
        raise ValueError("expected a timestamp")

    if not isinstance(field, TimestampField):
        return _to_boolean
    in_seconds, allows_local = field.epoch == "s", field.without_offset == "local"
    return to_epoch_ms


def _to_boolean(value: Any) -> bool:
    if type(value) is bool or (type(value) is int and value in (0, 1)):
        return bool(value)
    if isinstance(value, str) and (known := TRUTH.get(value.lower())) is not None:
        return known
    raise ValueError("expected a boolean")


def expected_form(field: EventField, timezone: str) -> str | None:
    """Description of a field's values that have several forms: timestamps, coerced booleans."""
    if isinstance(field, BooleanField) and field.coerce:
        return "true or false, or 1 or 0, or a string of these"
    if not isinstance(field, TimestampField):
        return None
    is_local = field.without_offset == "local"
    offset = f", without an offset in {timezone}" if is_local else _WITH_OFFSET
    numbers = "epoch seconds" if field.epoch == "s" else "integer epoch milliseconds"
    return (
        f"an RFC 3339 timestamp{offset}, for example {_EXAMPLE_TIMESTAMP}, or {numbers}; "
        "from 1900-01-01 to before 2200-01-01"
    )


_WITH_OFFSET = " with an offset (Z, or one such as -05:00)"


def can_mark_resets(schema: EventSchema) -> bool:
    """Whether the member `reset` of an event is free for marks: no field of the schema has it."""
    return all(field.name != RESET for field in schema.fields)


def event_json_schema(
    schema: EventSchema, name: str = "Event", *, marks_resets: bool = True
) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one event in a request, with descriptions and an example.

    Args:
        schema: the event schema; fitted or not.
        name: its title.
        marks_resets: whether an event may have the member `reset`, if no field has its name.
    """
    properties = {field.name: _property(field) for field in schema.fields}
    if marks_resets and can_mark_resets(schema):
        described = "Whether the state is reset before this event."
        properties[RESET] = {"description": described, "title": "Reset", "type": "boolean"}
    required = [field.name for field in schema.fields if not field.optional]
    return {
        "additionalProperties": False,
        "examples": [example_event(schema)],
        "properties": properties,
        **({"required": required} if required else {}),
        "title": name,
        "type": "object",
    }


def example_event(schema: EventSchema) -> dict[str, Any]:
    """A valid event with typical values of every field."""
    return {field.name: _example(field) for field in schema.fields}


def _property(field: EventField) -> dict[str, Any]:
    value: dict[str, Any]
    match field:
        case NumericField():
            value = {"type": "number"}
        case CategoricalField():
            value = {"maxLength": MAX_CATEGORY_CHARS, "minLength": 1, "type": "string"}
        case BooleanField(coerce=True):
            value = {"enum": [True, False, 1, 0, "true", "false", "1", "0"]}
        case BooleanField():
            value = {"type": "boolean"}
        case TimestampField(epoch="ms", without_offset=None | "reject"):
            bounds = {"exclusiveMaximum": MAX_TIMESTAMP_MS, "minimum": MIN_TIMESTAMP_MS}
            text = {"format": "date-time", "type": "string"}
            value = {"anyOf": [text, {**bounds, "type": "integer"}]}
        case TimestampField():
            value = {"anyOf": [{"type": "string"}, {"type": "number"}]}
    if field.optional:
        value = {"anyOf": [*value.get("anyOf", [value]), {"type": "null"}]}
    title = field.name.replace("_", " ").title()
    described = {"description": _description(field), "examples": [_example(field)], "title": title}
    return {**value, **described}


def _description(field: EventField) -> str:
    match field:
        case CategoricalField():
            how = "A category; one that training did not see counts as unknown."
        case TimestampField():
            how = "RFC 3339 with an offset, or integer epoch milliseconds."
            if field.epoch == "s":
                how = "RFC 3339 with an offset, or epoch seconds."
            if field.without_offset == "local":
                how = how.replace(" with an offset", ", without an offset in local time")
        case NumericField():
            how = "A finite number."
        case BooleanField():
            how = "true or false."
            if field.coerce:
                how = "true or false, also as 1 or 0, or as a string."
    absent = " May be absent or null." if field.optional else ""
    return f"{field.description} {how}{absent}".strip()


def _example(field: EventField) -> Any:
    match field:
        case NumericField():
            return 0.0 if field.mean is None or field.transform != "none" else round(field.mean, 2)
        case CategoricalField():
            return (field.vocabulary or ("a",))[0]
        case BooleanField():
            return False
        case TimestampField():
            return _EXAMPLE_TIMESTAMP


_MINUTE_MS = 60_000
_LONGEST = len("2013-01-01T05:17:00.123456789-05:00")

# Replaces every digit by 0.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_SHAPE = re.compile(rb"0000-00-00[T ]00:00:00(?:\.0{1,9})?([Zz]|[+-]00:00)")


def epoch_ms(moments: Sequence[str | int]) -> IntArray | None:
    """Parse timestamps to epoch milliseconds, int64 [T], if they are alike.

    Args:
        moments: strings, or integers that are validated already.

    Returns:
        None if they are neither integers nor valid strings of one shape.
    """
    kinds = set(map(type, moments))
    if kinds == {str}:
        return parse_uniform_strings(moments)  # type: ignore[arg-type]
    return np.array(moments, np.int64) if kinds <= {int} else None


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
