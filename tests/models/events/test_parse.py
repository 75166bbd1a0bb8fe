"""Validation of events from JSON and objects."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from pydantic import BaseModel, TypeAdapter, ValidationError

from models.events.parse import (
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    event_adapter,
    event_json_schema,
    event_type,
    example_event,
    timestamp_ms,
)
from models.events.reader import EventReader
from models.events.schema import EventSchema
from tests.support.events import FULL_SCHEMA, GOOD, SPARSE_TIMES, events

ADAPTER = event_adapter(FULL_SCHEMA)
GOOD_MS = 1_357_035_420_000


def rejections(event: Any) -> list[tuple[tuple[Any, ...], str]]:
    """Where and why an event is rejected; the same from JSON and from objects."""
    found = []
    for validate, data in (
        (ADAPTER.validate_json, json.dumps(event)),
        (ADAPTER.validate_python, event),
    ):
        with pytest.raises(ValidationError) as caught:
            validate(data)
        found.append([(item["loc"], item["msg"]) for item in caught.value.errors()])
    assert [loc for loc, _ in found[0]] == [loc for loc, _ in found[1]]
    return found[0]


@pytest.mark.parametrize("validate", ["json", "python"])
def test_a_valid_event_becomes_a_plain_dict(validate: str) -> None:
    event = (
        ADAPTER.validate_json(json.dumps(GOOD))
        if validate == "json"
        else ADAPTER.validate_python(GOOD)
    )

    assert type(event) is dict
    assert type(event["load"]) is float
    assert timestamp_ms(event.pop("at")) == GOOD_MS
    assert event == {name: value for name, value in GOOD.items() if name != "at"}


def test_optional_fields_may_be_absent_or_null() -> None:
    required = {"load": 0.0, "at": 0, "carrier": "x", "heavy": False}

    assert ADAPTER.validate_python(required) == required
    nulls = {**required, "delay": None, "gate": None, "late": None}
    assert ADAPTER.validate_json(json.dumps(nulls)) == nulls


@pytest.mark.parametrize("name", ["load", "at", "carrier", "heavy"])
def test_a_required_field_may_be_neither_absent_nor_null(name: str) -> None:
    assert rejections({key: value for key, value in GOOD.items() if key != name}) == [
        ((name,), "Field required")
    ]
    assert [loc for loc, _ in rejections({**GOOD, name: None})] == [(name,)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("load", value) for value in (True, "3", "NaN", [], {}, float("nan"), float("inf"))],
        ("load", -float("inf")),
        ("load", 10**400),
        *[("delay", value) for value in (False, "1", float("nan"))],
        *[("carrier", value) for value in ("", 1, True, ["UA"], "x" * 257)],
        ("gate", ""),
        *[("heavy", value) for value in (0, 1, "true", 1.0)],
        *[("late", value) for value in (0, "false")],
    ],
)
def test_a_value_of_another_type_is_rejected_at_its_field(name: str, value: Any) -> None:
    assert [loc for loc, _ in rejections({**GOOD, name: value})] == [(name,)]


def test_a_number_too_large_for_a_float_is_rejected_in_json() -> None:
    body = json.dumps(GOOD).replace('"load": 3', '"load": 1e400')

    with pytest.raises(ValidationError, match="finite"):
        ADAPTER.validate_json(body)


def test_bytes_are_rejected_as_category_and_timestamp() -> None:
    for name in ("carrier", "at"):
        with pytest.raises(ValidationError):
            ADAPTER.validate_python({**GOOD, name: b"2013-01-01T05:17:00Z"})


def test_categories_are_limited_in_characters_not_bytes() -> None:
    assert ADAPTER.validate_python({**GOOD, "carrier": "航" * 256})["carrier"] == "航" * 256
    assert rejections({**GOOD, "carrier": "航" * 257})


def test_unknown_fields_are_rejected() -> None:
    assert rejections({**GOOD, "extra": 1}) == [(("extra",), "Extra inputs are not permitted")]


@pytest.mark.parametrize("event", [[], "x", 1, None])
def test_an_event_must_be_an_object(event: Any) -> None:
    assert rejections(event)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00z", 0),
        ("1970-01-01 01:30:00+01:30", 0),
        ("1969-12-31T19:00:00-05:00", 0),
        ("1970-01-01T00:00:00.5Z", 500),
        ("1970-01-01T00:00:00.0019Z", 1),
        ("1970-01-01T00:00:00.123456789Z", 123),
        ("1969-12-31T23:59:59.9999Z", -1),
        ("1970-01-01T00:00:00-00:00", 0),
        ("2012-02-29T23:59:59.999Z", 1_330_559_999_999),
        ("1900-01-01T00:00:00Z", MIN_TIMESTAMP_MS),
        ("2199-12-31T23:59:59.999Z", MAX_TIMESTAMP_MS - 1),
    ],
)
@pytest.mark.parametrize("validate", ["json", "python"])
def test_rfc_3339_gives_epoch_milliseconds(validate: str, text: str, expected: int) -> None:
    event = {**GOOD, "at": text}
    read = (
        ADAPTER.validate_json(json.dumps(event))
        if validate == "json"
        else ADAPTER.validate_python(event)
    )

    assert timestamp_ms(read["at"]) == expected


@pytest.mark.parametrize("number", [0, -1, GOOD_MS, MIN_TIMESTAMP_MS, MAX_TIMESTAMP_MS - 1])
def test_integers_are_epoch_milliseconds(number: int) -> None:
    assert timestamp_ms(ADAPTER.validate_json(json.dumps({**GOOD, "at": number}))["at"]) == number


@pytest.mark.parametrize(
    "value",
    [
        "2013-01-01T05:17:00",
        "2013-01-01",
        "2013-01-01T05:17Z",
        "2013-02-30T05:17:00Z",
        "2013-13-01T05:17:00Z",
        "2013-01-01T24:00:00Z",
        "2013-01-01T05:17:60Z",
        "2013-01-01T05:17:00+24:00",
        "2013-01-01T05:17:00+0500",
        "2013-W01-1T05:17:00Z",
        "20130101T051700Z",
        " 2013-01-01T05:17:00Z",
        "2013-01-01T05:17:00Z\n",
        "2013-01-01T05:17:00.Z",
        "٢٠١٣-01-01T05:17:00Z",
        "1899-12-31T23:59:59Z",
        "2200-01-01T00:00:00Z",
        "1357035420000",
        "",
        MIN_TIMESTAMP_MS - 1,
        MAX_TIMESTAMP_MS,
        10**30,
        1357035420.5,
        1357035420000.0,
        True,
        [],
    ],
)
def test_other_timestamps_are_rejected_with_the_expected_format(value: Any) -> None:
    [(loc, message)] = rejections({**GOOD, "at": value})

    assert loc == ("at",)
    assert "RFC 3339 timestamp with an offset" in message
    assert "epoch milliseconds" in message
    assert "1900-01-01" in message


def test_errors_name_the_index_of_the_event() -> None:
    class Body(BaseModel):
        events: list[event_type(FULL_SCHEMA)]  # type: ignore[valid-type]

    with pytest.raises(ValidationError) as caught:
        Body.model_validate_json(json.dumps({"events": [GOOD, GOOD, {**GOOD, "load": "3"}]}))
    assert [item["loc"] for item in caught.value.errors()] == [("events", 2, "load")]


@settings(max_examples=40, deadline=None)
@given(events(FULL_SCHEMA, 5))
def test_json_and_objects_give_the_same_events(chunk: list[dict[str, Any]]) -> None:
    adapter = TypeAdapter(list[event_type(FULL_SCHEMA)])  # type: ignore[misc]

    assert adapter.validate_json(json.dumps(chunk)) == adapter.validate_python(chunk) == chunk


@pytest.mark.parametrize("schema", [FULL_SCHEMA, SPARSE_TIMES])
def test_the_json_schema_agrees_with_the_type(
    schema: EventSchema,
) -> None:
    document = event_json_schema(schema)
    validator = jsonschema.Draft202012Validator(document)
    example = example_event(schema)

    assert document["examples"] == [example]
    event_adapter(schema).validate_json(json.dumps(example))
    validator.validate(example)
    for wrong in ({**example, "extra": 1}, {**example, "load": "3"}, {**example, "at": 1.5}):
        assert not validator.is_valid(wrong)


def test_the_json_schema_describes_every_field() -> None:
    schema = EventSchema.model_validate(
        {
            "fields": [
                {"kind": "numeric", "name": "load", "description": "Tonnes.", "optional": True},
                {"kind": "timestamp", "name": "at"},
            ]
        }
    )
    document = event_json_schema(schema)

    assert document["required"] == ["at"]
    assert document["additionalProperties"] is False
    assert document["properties"]["load"]["description"] == (
        "Tonnes. A finite number. May be absent or null."
    )
    assert {"type": "string", "format": "date-time"} in document["properties"]["at"]["anyOf"]


def test_the_type_has_the_given_name() -> None:
    assert TypeAdapter(event_type(FULL_SCHEMA, "FlightEvent")).json_schema()["title"] == (
        "FlightEvent"
    )


def test_milliseconds_are_rounded_down() -> None:
    assert timestamp_ms(datetime(1969, 12, 31, 23, 59, 59, 999_001, tzinfo=UTC)) == -1
    assert timestamp_ms(datetime(2150, 6, 1, 0, 0, 0, 999_999, tzinfo=UTC)) == 5_693_328_000_999


def test_a_field_called_reset_is_a_field() -> None:
    schema = EventSchema.model_validate({"fields": [{"kind": "numeric", "name": "reset"}]})
    for marks_resets in (True, False):
        event: TypeAdapter[Any] = TypeAdapter(event_type(schema, marks_resets=marks_resets))
        assert event.validate_python({"reset": 1.5}) == {"reset": 1.5}
    assert not EventReader(schema, marks_resets=True).has_marks
    other = EventSchema.model_validate({"fields": [{"kind": "numeric", "name": "x"}]})
    event = TypeAdapter(event_type(other, marks_resets=True))
    assert event.validate_python({"x": 1.5, "reset": True}) == {"x": 1.5, "reset": True}
    with pytest.raises(ValidationError):
        event_adapter(other).validate_python({"x": 1.5, "reset": True})
