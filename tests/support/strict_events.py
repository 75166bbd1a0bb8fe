"""Strict validation of events by pydantic: an oracle of the reader of events.

A number is never accepted as a string, nor a boolean as a number, and nothing is coerced but what
the fields of the schema say. Events from JSON and objects follow the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from pydantic_core import SchemaValidator, core_schema
from typing_extensions import TypedDict

from models.events.columns import EventColumns
from models.events.parse import (
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    RESET,
    can_mark_resets,
    local_ms,
)
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
_RFC3339 = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)


class _Of:
    """A type that is validated by a schema of pydantic-core."""

    def __init__(self, schema: core_schema.CoreSchema):
        self._schema = schema

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return self._schema


def _rfc3339() -> core_schema.CoreSchema:
    text = core_schema.str_schema(strict=True, pattern=_RFC3339, regex_engine="rust-regex")
    # not strict, as it must parse the string that the previous step validated
    moment = core_schema.datetime_schema(
        strict=False,
        tz_constraint="aware",
        ge=datetime(1900, 1, 1, tzinfo=UTC),
        lt=datetime(2200, 1, 1, tzinfo=UTC),
        microseconds_precision="truncate",
    )
    return core_schema.chain_schema([text, moment])


def _timestamp(field: TimestampField, timezone: str) -> core_schema.CoreSchema:
    number = core_schema.int_schema(strict=True, ge=MIN_TIMESTAMP_MS, lt=MAX_TIMESTAMP_MS)
    if field.epoch == "s":
        ends = {"ge": MIN_TIMESTAMP_MS / 1000, "lt": MAX_TIMESTAMP_MS / 1000}
        number = core_schema.no_info_after_validator_function(
            lambda seconds: round(seconds * 1000), core_schema.float_schema(strict=True, **ends)
        )
    forms = [number, _rfc3339()]
    if field.without_offset == "local":
        text = core_schema.str_schema(strict=True)
        forms.append(
            core_schema.no_info_after_validator_function(lambda t: local_ms(t, timezone), text)
        )
    return core_schema.union_schema(forms, mode="left_to_right")


def _boolean() -> core_schema.CoreSchema:
    text = core_schema.str_schema(strict=True, to_lower=True, pattern="(?i)^(true|false|1|0)$")
    forms = [
        core_schema.bool_schema(strict=True),
        core_schema.int_schema(strict=True, ge=0, le=1),
        text,
    ]
    return core_schema.no_info_after_validator_function(
        lambda value: value in (True, "true", "1"),
        core_schema.union_schema(forms, mode="left_to_right"),
    )


def _type_of(field: EventField, timezone: str) -> Any:
    match field:
        case NumericField():
            return float
        case CategoricalField():
            return Annotated[str, Field(min_length=1, max_length=MAX_CATEGORY_CHARS)]
        case BooleanField(coerce=True):
            return Annotated[Any, _Of(_boolean())]
        case BooleanField():
            return bool
        case TimestampField():
            return Annotated[Any, _Of(_timestamp(field, timezone))]


def event_type(schema: EventSchema, *, marks_resets: bool = False) -> Any:
    """The TypedDict of one event, which may have the member `reset` if it is free."""
    fields: dict[str, Any] = {}
    for field in schema.fields:
        value = _type_of(field, schema.timezone)
        fields[field.name] = NotRequired[value | None] if field.optional else value
    if marks_resets and can_mark_resets(schema):
        fields[RESET] = NotRequired[bool]
    event = TypedDict("Event", fields)  # type: ignore[misc]
    return with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))(event)


def event_adapter(schema: EventSchema) -> TypeAdapter[dict[str, Any]]:
    """The validator of one event, from JSON (`validate_json`) or objects (`validate_python`)."""
    return TypeAdapter(event_type(schema))


def strict_ms(moment: Any) -> int:
    """Epoch milliseconds of a standard timestamp; ValidationError for anything else."""
    field = TimestampField(name="at")
    return timestamp_ms(SchemaValidator(_timestamp(field, "UTC")).validate_python(moment))


def timestamp_ms(moment: datetime | int) -> int:
    """Epoch milliseconds of a validated timestamp, rounded down."""
    return moment if isinstance(moment, int) else (moment - _EPOCH) // timedelta(milliseconds=1)


def columns_from_events(schema: EventSchema, events: Sequence[Mapping[str, Any]]) -> EventColumns:
    """Columns of events that `event_adapter` has validated; an optional field may be None."""
    dtypes = {"numeric": np.float64, "timestamp": np.int64, "boolean": np.bool_}
    present, values = {}, {}
    for field in schema.fields:
        given = [event.get(field.name) for event in events]
        there = [value is not None for value in given]
        blank: Any = "" if field.kind == "categorical" else 0
        filled = [blank if value is None else value for value in given]
        if field.kind == "timestamp":
            filled = [timestamp_ms(moment) for moment in filled]
        column = np.array(filled, dtypes.get(field.kind, object))
        present[field.name] = np.array(there, np.bool_)
        # -0.0 and 0.0 are one number to a client, so they must be one to digest and network
        values[field.name] = column + 0.0 if field.kind == "numeric" else column
    return EventColumns(len(events), present, values)
