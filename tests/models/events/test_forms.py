"""Values in other forms are taken alike by tables and requests, as the schema's fields say."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from models.errors import DataError
from models.events.columns import EventColumns
from models.events.frame import columns_from_frame, resolve_forms
from models.events.parse import event_json_schema
from models.events.reader import EventReader
from models.events.schema import EventSchema
from tests.support.strict_events import columns_from_events, event_adapter

NOON_MS = 1_750_413_600_000
"""2025-06-20T10:00:00Z, noon in Vienna."""


def schema_of(**options: Any) -> EventSchema:
    kind = "boolean" if "coerce" in options else "timestamp"
    field = {"kind": kind, "name": "x", **options}
    return EventSchema.model_validate({"timezone": "Europe/Vienna", "fields": [field]})


def read(schema: EventSchema, values: list[Any]) -> EventColumns:
    """Columns as the service reads them."""
    reader = EventReader(schema)
    events = [{"x": value} for value in values]
    return reader.read(msgspec.convert(events, list[reader.event])).columns


def served(schema: EventSchema, values: list[Any]) -> EventColumns:
    """Columns as the service reads them, checked against the pydantic type."""
    adapter = event_adapter(schema)
    events = [adapter.validate_python({"x": value}) for value in values]
    found, expected = read(schema, values), columns_from_events(schema, events)
    np.testing.assert_array_equal(found.values["x"], expected.values["x"])
    return found


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"coerce": None}, [1, 0], [True, False]),
        ({"coerce": None}, ["true", "False", "1", "0"], [True, False, True, False]),
        ({"coerce": None}, [True, False], [True, False]),
        ({}, ["2025-06-20T12:00:00", "2025-06-20 12:00:01"], [NOON_MS, NOON_MS + 1000]),
        ({}, ["2025-06-20T12:00:00+02:00", "2025-06-20T12:00"], [NOON_MS, NOON_MS]),
        ({"epoch": "s"}, [NOON_MS // 1000, NOON_MS // 1000 + 7], [NOON_MS, NOON_MS + 7000]),
        ({"epoch": "s"}, [NOON_MS / 1000 + 0.5], [NOON_MS + 500]),
        ({"epoch": "s"}, ["2025-06-20T12:00:00+02:00"], [NOON_MS]),
        ({}, [NOON_MS], [NOON_MS]),
    ],
    ids=str,
)
def test_the_service_accepts_the_forms_of_the_training_table(
    options: dict[str, Any], values: list[Any], expected: list[Any]
) -> None:
    frame = pl.DataFrame({"x": values})
    schema = resolve_forms(schema_of(**options), frame)
    trained = columns_from_frame(schema, frame)
    assert trained.values["x"].tolist() == expected
    assert served(schema, values).values["x"].tolist() == expected
    assert EventSchema.model_validate(schema.model_dump()) == schema


@pytest.mark.parametrize(
    ("options", "usual", "other", "table", "request_"),
    [
        ({"coerce": None}, [True], [1], r"event 0.*`coerce: true`", "Expected `bool`"),
        ({"coerce": None}, [True], ["true"], r"event 0.*`coerce: true`", "Expected `bool`"),
        ({"coerce": True}, [1], [2], "event 0.*0 or 1", "or 1 or 0"),
        (
            {},
            ["2025-06-20T12:00:00Z"],
            ["2025-06-20T12:00:00"],
            r"event 0.*`without_offset: local`.*, got 2025-06-20T12:00:00$",
            "with an offset",
        ),
        ({}, ["2025-06-20T12:00:00Z"], ["soon"], "event 0.*RFC 3339", "timestamp"),
        ({}, [NOON_MS], [NOON_MS // 1000], "`epoch: s`", None),
        ({"epoch": "s"}, [NOON_MS // 1000], [NOON_MS], "2200-01-01", "`float`"),
        (
            {"without_offset": "local"},
            ["2025-03-30T01:00"],
            ["2025-03-30T02:30"],
            r"exists in Europe/Vienna .*such as UTC, as `timezone`.*clocks skipped",
            "Europe/Vienna",
        ),
    ],
    ids=str,
)
def test_other_forms_are_rejected_in_tables_and_requests(
    options: dict[str, Any],
    usual: list[Any],
    other: list[Any],
    table: str,
    request_: str | None,
) -> None:
    schema = resolve_forms(schema_of(**options), pl.DataFrame({"x": usual}))
    served(schema, usual)
    with pytest.raises(DataError, match=table):
        columns_from_frame(schema, pl.DataFrame({"x": other}))
    if request_ is not None:
        with pytest.raises((DataError, msgspec.ValidationError), match=request_):
            read(schema, other)
        with pytest.raises(ValidationError):
            event_adapter(schema).validate_python({"x": other[0]})


def test_options_of_the_schema_are_kept_and_documented() -> None:
    local = pl.DataFrame({"x": ["2025-06-20T12:00"]})
    schema = schema_of(without_offset="reject")
    assert resolve_forms(schema, local) == schema
    assert "without_offset" not in schema_of().model_dump()["fields"][0]
    described = event_json_schema(resolve_forms(schema_of(epoch="s"), local))["properties"]["x"]
    assert "epoch seconds" in described["description"]
    assert "without an offset in local time" in described["description"]
    assert "string" in event_json_schema(schema_of(coerce=True))["properties"]["x"]["description"]
