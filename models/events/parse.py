"""From what a client sends to one validated event: a plain dict of Python values.

The event schema becomes a pydantic type, so that events are validated while their JSON is
parsed, errors say where they are, and the same type writes the JSON Schema. Python objects
(out of MessagePack) pass through the same type under the same rules: a number is never
taken for a string, a boolean never for a number, and nothing is guessed.

Refused: unknown fields, missing required fields, NaN and infinity, empty or overlong
categories, timestamps without an offset or outside 1900 to 2200.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, WithJsonSchema, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

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
_DAY_MS = 86_400_000

MIN_TIMESTAMP_MS = (datetime(1900, 1, 1, tzinfo=UTC) - _EPOCH).days * _DAY_MS
MAX_TIMESTAMP_MS = (datetime(2200, 1, 1, tzinfo=UTC) - _EPOCH).days * _DAY_MS
"""Timestamps lie in [1900-01-01, 2200-01-01), as epoch milliseconds."""

_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ](?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?"
    r"(?P<offset>[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)?",
    re.ASCII,
)

_EXAMPLE_TIMESTAMP = "2013-01-01T05:17:00-05:00"
_WANTED = f"an RFC 3339 timestamp such as {_EXAMPLE_TIMESTAMP} or integer epoch milliseconds"


def timestamp_ms(value: object) -> int:
    """Epoch milliseconds of an RFC 3339 string with an offset, or of an int taken as such.

    Digits below the millisecond are cut off. Leap seconds (`:60`) are refused.

    Raises:
        PydanticCustomError: (a ValueError) anything else, or a moment outside
            [1900-01-01, 2200-01-01).
    """
    if isinstance(value, str):
        found = _RFC3339.fullmatch(value)
        if found is None:
            raise PydanticCustomError("timestamp_format", f"Input should be {_WANTED}")
        if found["offset"] is None:
            raise PydanticCustomError(
                "timestamp_offset",
                "Input should carry an offset: Z, or one such as -05:00 "
                "(without it the moment is not known)",
            )
        try:
            since = datetime.fromisoformat(value.upper()) - _EPOCH
        except (ValueError, OverflowError) as error:
            raise PydanticCustomError(
                "timestamp_format", f"Input should be {_WANTED}; there is no such day"
            ) from error
        result = since.days * _DAY_MS + since.seconds * 1000 + since.microseconds // 1000
    elif isinstance(value, int) and not isinstance(value, bool):
        result = value
    else:
        raise PydanticCustomError("timestamp_type", f"Input should be {_WANTED}")
    if not MIN_TIMESTAMP_MS <= result < MAX_TIMESTAMP_MS:
        raise PydanticCustomError(
            "timestamp_range",
            "Input should be a moment from 1900-01-01 to before 2200-01-01 "
            "(numbers are epoch milliseconds)",
        )
    return result


_TIMESTAMP_JSON = {
    "anyOf": [
        {"type": "string", "format": "date-time"},
        {
            "type": "integer",
            "minimum": MIN_TIMESTAMP_MS,
            "exclusiveMaximum": MAX_TIMESTAMP_MS,
        },
    ]
}


def event_type(schema: EventSchema, name: str = "Event") -> Any:
    """A TypedDict type of one event, for a `TypeAdapter` or as part of a pydantic model.

    Args:
        schema: the event schema; it need not be fitted.
        name: the type's title in JSON Schema and OpenAPI.

    Returns:
        A type whose validated values are plain dicts: float, str, bool and, for the
        timestamp, int epoch milliseconds. Build it once per model.
    """
    fields = {field.name: _annotation(field) for field in schema.fields}
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
    """Validates one event, from JSON (`validate_json`) or objects (`validate_python`)."""
    return TypeAdapter(event_type(schema))


def event_json_schema(schema: EventSchema) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one event, with descriptions and an example."""
    return event_adapter(schema).json_schema()


def example_event(schema: EventSchema) -> dict[str, Any]:
    """An event that the schema accepts, with every field, made of typical values."""
    return {field.name: _example(field) for field in schema.fields}


def _annotation(field: EventField) -> Any:
    value: Any
    match field:
        case NumericField():
            value = float
        case CategoricalField():
            value = Annotated[str, Field(min_length=1, max_length=MAX_CATEGORY_CHARS)]
        case BooleanField():
            value = bool
        case TimestampField():
            value = Annotated[
                int, PlainValidator(timestamp_ms), WithJsonSchema(dict(_TIMESTAMP_JSON))
            ]
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
        case NumericField():
            how = "A finite number."
        case BooleanField():
            how = "true or false."
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
