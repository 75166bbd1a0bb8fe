"""Strict validation of events with pydantic, their JSON Schema, and vectorised timestamps.

The event schema becomes a pydantic type, so that events are validated while their JSON is parsed,
errors have their location, and the same type generates the JSON Schema. Python objects (from
MessagePack) are validated by the same type with the same rules: a number is never accepted as a
string, nor a boolean as a number, and nothing is coerced but what the schema's fields say.

Rejected are unknown fields, missing required fields, NaN and infinity, empty or too long
categories, timestamps without an offset (unless local ones are accepted) or outside 1900 to 2200.

The timestamps of one client have the same shape: number of decimals, kind of offset. Such a list is
compared with its shape at once, and parsed by one NumPy call; any other list is validated string by
string by the validator of the event type. Both ways accept the same strings and return the same
times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import Annotated, Any, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, SchemaValidator, core_schema
from typing_extensions import TypedDict

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

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MIN = datetime(1900, 1, 1, tzinfo=UTC)
_MAX = datetime(2200, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

MIN_TIMESTAMP_MS = (_MIN - _EPOCH) // _MILLISECOND
MAX_TIMESTAMP_MS = (_MAX - _EPOCH) // _MILLISECOND
"""Timestamps are in [1900-01-01, 2200-01-01), as epoch milliseconds."""

_RFC3339 = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)

_EXAMPLE_TIMESTAMP = "2013-01-01T05:17:00-05:00"
_WITH_OFFSET = " with an offset (Z, or one such as -05:00)"
_BOOLEAN_FORM = "true or false, or 1 or 0, or a string of these"


class Timestamp:
    """Type of a timestamp: an RFC 3339 string with an offset, or integer epoch milliseconds.

    Strings without an offset are ambiguous and rejected, as are times
    outside [1900-01-01, 2200-01-01) and leap seconds (`:60`). The validated value is an aware
    `datetime` or an int; `timestamp_ms` converts both to epoch milliseconds. It is built from
    pydantic's compiled validators, as a validator in Python takes ten times as long.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _timestamp_schema()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        number = {
            "type": "integer",
            "minimum": MIN_TIMESTAMP_MS,
            "exclusiveMaximum": MAX_TIMESTAMP_MS,
        }
        return {"anyOf": [{"type": "string", "format": "date-time"}, number]}


def _timestamp_schema() -> CoreSchema:
    number = core_schema.int_schema(strict=True, ge=MIN_TIMESTAMP_MS, lt=MAX_TIMESTAMP_MS)
    text = core_schema.str_schema(strict=True, pattern=_RFC3339, regex_engine="rust-regex")
    # Not strict, as it must parse the string that the previous step validated.
    moment = core_schema.datetime_schema(
        strict=False,
        tz_constraint="aware",
        ge=_MIN,
        lt=_MAX,
        microseconds_precision="truncate",
    )
    return core_schema.union_schema(
        [number, core_schema.chain_schema([text, moment])],
        mode="left_to_right",
        custom_error_type="timestamp",
        custom_error_message=(
            f"Input should be {_timestamp_form(_WITH_OFFSET, 'integer epoch milliseconds')}"
        ),
    )


class _CoercedBoolean:
    """Type of a boolean that may be written as a number or a string; validated to bool."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        number = core_schema.int_schema(strict=True, ge=0, le=1)
        text = core_schema.str_schema(strict=True, to_lower=True, pattern="(?i)^(true|false|1|0)$")
        forms = core_schema.union_schema(
            [core_schema.bool_schema(strict=True), number, text],
            mode="left_to_right",
            custom_error_type="boolean",
            custom_error_message=f"Input should be {_BOOLEAN_FORM}",
        )
        return core_schema.no_info_after_validator_function(
            lambda value: value in (True, "true", "1"), forms
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": [True, False, 1, 0, "true", "false", "1", "0"]}


class _OtherTimestamp:
    """Type of a timestamp in the forms that its field's options name; validated to epoch ms."""

    def __init__(self, field: TimestampField, timezone: str):
        self._field, self._timezone = field, timezone

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        if self._field.epoch == "s":
            lowest_s, highest_s = MIN_TIMESTAMP_MS / 1000, MAX_TIMESTAMP_MS / 1000
            number: CoreSchema = core_schema.no_info_after_validator_function(
                seconds_to_ms, core_schema.float_schema(strict=True, ge=lowest_s, lt=highest_s)
            )
            text = core_schema.chain_schema(
                [core_schema.str_schema(strict=True), _timestamp_schema()]
            )
            forms: list[CoreSchema | tuple[CoreSchema, str]] = [
                number,
                core_schema.no_info_after_validator_function(timestamp_ms, text),
            ]
        else:
            forms = [
                core_schema.no_info_after_validator_function(timestamp_ms, _timestamp_schema())
            ]
        if self._field.without_offset == "local":
            local = core_schema.no_info_after_validator_function(
                lambda text: local_ms(text, self._timezone), core_schema.str_schema(strict=True)
            )
            forms.append(local)
        return core_schema.union_schema(
            forms,
            mode="left_to_right",
            custom_error_type="timestamp",
            custom_error_message=f"Input should be {expected_form(self._field, self._timezone)}",
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, {"type": "number"}]}


def _timestamp_form(offset: str, numbers: str) -> str:
    return (
        f"an RFC 3339 timestamp{offset}, for example {_EXAMPLE_TIMESTAMP}, or {numbers}; "
        "from 1900-01-01 to before 2200-01-01"
    )


def expected_form(field: EventField, timezone: str) -> str | None:
    """Description of a field's values that have several forms: timestamps, coerced booleans."""
    if isinstance(field, BooleanField) and field.coerce:
        return _BOOLEAN_FORM
    if not isinstance(field, TimestampField):
        return None
    is_local = field.without_offset == "local"
    offset = f", without an offset in {timezone}" if is_local else _WITH_OFFSET
    numbers = "epoch seconds" if field.epoch == "s" else "integer epoch milliseconds"
    return _timestamp_form(offset, numbers)


def value_validator(schema: EventSchema, field: EventField) -> Callable[[Any], Any]:
    """Converts one value of a field in any of its forms, as in an event."""
    adapter: TypeAdapter[Any] = _value_adapter(field, schema.timezone)
    return adapter.validate_python


@cache
def _value_adapter(field: EventField, timezone: str) -> TypeAdapter[Any]:
    return TypeAdapter(_value_type(field, timezone))


def seconds_to_ms(seconds: float) -> int:
    """Epoch seconds to epoch milliseconds, rounded."""
    return round(seconds * 1000)


def local_ms(text: str, timezone: str) -> int:
    """Epoch milliseconds of a date and time without an offset, of two possible ones the earlier.

    Raises:
        ValueError: it is none, has an offset, is skipped by clocks, or is out of range.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is not None:
        raise ValueError("expected no offset")
    moments, exists = zone_table(timezone).to_utc(
        np.array([timestamp_ms(moment.replace(tzinfo=UTC))], np.int64)
    )
    if not exists[0] or not MIN_TIMESTAMP_MS <= moments[0] < MAX_TIMESTAMP_MS:
        raise ValueError(f"expected a local time that exists in {timezone}")
    return int(moments[0])


@cache
def timestamp_validator() -> SchemaValidator:
    """The validator of one timestamp, the same as in an event."""
    return SchemaValidator(_timestamp_schema())


def timestamp_ms(moment: datetime | int) -> int:
    """Convert a validated timestamp to epoch milliseconds, rounding down."""
    if isinstance(moment, int):
        return moment
    return (moment - _EPOCH) // _MILLISECOND


RESET = "reset"
"""The member of an event by which a client resets the state before it."""


def can_mark_resets(schema: EventSchema) -> bool:
    """Whether the member `reset` of an event is free for marks: no field of the schema has it."""
    return all(field.name != RESET for field in schema.fields)


def event_type(schema: EventSchema, name: str = "Event", *, marks_resets: bool = False) -> Any:
    """Create the TypedDict type of one event, for a `TypeAdapter` or a pydantic model.

    Args:
        schema: the event schema; fitted or not.
        name: title of the type in JSON Schema and OpenAPI.
        marks_resets: whether an event may have the member `reset`, if no field has its name.

    Returns:
        A type whose validated values are plain dicts of float, str, bool and, for the
        timestamp, aware datetime or int epoch milliseconds. Build it once per model.
    """
    fields = {field.name: _annotation(field, schema.timezone) for field in schema.fields}
    if marks_resets and can_mark_resets(schema):
        described = Field(description="Whether the state is reset before this event.")
        fields[RESET] = NotRequired[Annotated[bool, described]]
    event = TypedDict(name, fields)  # type: ignore[misc]
    return with_config(
        ConfigDict(
            strict=True,
            extra="forbid",
            allow_inf_nan=False,
            json_schema_extra={"examples": [example_event(schema)]},
        )
    )(event)


def event_adapter(schema: EventSchema) -> TypeAdapter[dict[str, Any]]:
    """The validator of one event, from JSON (`validate_json`) or objects (`validate_python`)."""
    return TypeAdapter(event_type(schema))


def event_json_schema(
    schema: EventSchema, name: str = "Event", *, marks_resets: bool = True
) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one event in a request, with descriptions and an example.

    Args:
        name, marks_resets: as of `event_type`.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(event_type(schema, name, marks_resets=marks_resets))
    return adapter.json_schema()


def example_event(schema: EventSchema) -> dict[str, Any]:
    """A valid event with typical values of every field."""
    return {field.name: _example(field) for field in schema.fields}


def _value_type(field: EventField, timezone: str) -> Any:
    match field:
        case NumericField():
            return float
        case CategoricalField():
            return Annotated[str, Field(min_length=1, max_length=MAX_CATEGORY_CHARS)]
        case BooleanField(coerce=True):
            return Annotated[Any, _CoercedBoolean()]
        case BooleanField():
            return bool
        case TimestampField(epoch="ms", without_offset=None | "reject"):
            return Timestamp
        case TimestampField():
            return Annotated[Any, _OtherTimestamp(field, timezone)]


def _annotation(field: EventField, timezone: str) -> Any:
    value = _value_type(field, timezone)
    described = Field(description=_description(field), examples=[_example(field)])
    if field.optional:
        return NotRequired[Annotated[value | None, described]]
    return Annotated[value, described]


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
