"""Forms of values: timestamps, compared with pydantic's, and the JSON Schema of events."""

from __future__ import annotations

from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.events.parse import (
    _parts,
    epoch_ms,
    event_json_schema,
    example_event,
    value_converter,
)
from models.events.reader import EventReader
from models.events.schema import EventSchema
from tests.support.events import FULL_SCHEMA, SPARSE_TIMES
from tests.support.strict_events import strict_ms

to_epoch_ms = value_converter(FULL_SCHEMA, FULL_SCHEMA.field("at"))


def one_by_one(moments: list[Any], convert: Any) -> list[int] | None:
    try:
        return [convert(each) for each in moments]
    except (ValidationError, ValueError):
        return None


def assert_agrees(moments: list[Any]) -> None:
    """Alone and together, timestamps are converted as pydantic converts them."""
    wanted = one_by_one(moments, strict_ms)
    assert one_by_one(moments, to_epoch_ms) == wanted
    found = epoch_ms(moments)
    if found is not None:
        assert found.dtype == np.int64
        assert found.tolist() == wanted


def _number(low: int, high: int, digits: int) -> st.SearchStrategy[str]:
    likely = st.integers(low, high)
    return st.one_of(*[likely] * 9, st.integers(0, 10**digits - 1)).map(
        lambda number: f"{number:0{digits}}"
    )


FRACTIONS = st.integers(0, 10).flatmap(
    lambda digits: st.just("") if digits == 0 else st.from_regex(rf"\.[0-9]{{{digits}}}\Z")
)
OFFSETS = st.one_of(
    st.sampled_from(["Z", "z", "", "+0000", "-00:00", "+23:59", "-23:59", "+24:00", "+00:60"]),
    st.builds("{}{}:{}".format, st.sampled_from("+-"), _number(0, 23, 2), _number(0, 59, 2)),
)
LOCALS = st.builds(
    "{}-{}-{}{}{}:{}:{}".format,
    _number(1899, 2200, 4),
    _number(1, 12, 2),
    _number(1, 31, 2),
    st.sampled_from("TTTTt _"),
    _number(0, 23, 2),
    _number(0, 59, 2),
    _number(0, 59, 2),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(LOCALS, min_size=1, max_size=4), FRACTIONS, st.lists(OFFSETS, min_size=1))
def test_timestamps_equal_those_of_pydantic(
    local: list[str], fraction: str, offsets: list[str]
) -> None:
    assert_agrees([f"{text}{fraction}{offsets[0]}" for text in local])
    mixed = [f"{text}{fraction}{offsets[at % len(offsets)]}" for at, text in enumerate(local)]
    assert_agrees(mixed)


OTHERS = [
    *("2013-01-01T05:17:00", "2013-01-01", "2013-01-01T05:17Z", "2013-02-30T05:17:00Z"),
    *("2013-13-01T05:17:00Z", "2013-01-01T24:00:00Z", "2013-01-01T05:17:60Z"),
    *("2013-01-01T05:17:00+0500", "2013-W01-1T05:17:00Z", "20130101T051700Z", "1357035420000"),
    *(" 2013-01-01T05:17:00Z", "2013-01-01T05:17:00Z\n", "2013-01-01T05:17:00.Z", ""),
    *("1899-12-31T23:59:59Z", "2200-01-01T00:00:00Z"),
]
"""Strings that are no timestamps."""


@pytest.mark.parametrize(
    "moments",
    [
        ["2013-01-01T05:17:00-05:0", "02013-01-01T05:17:00-05:00"],
        ["2013-01-01T05:17:00Z\n2013-01-01T05:17:00Z"],
        ["2013-01-01T05:17:00Z\n", "2013-01-01T05:17:00Z"],
        ["2013-01-01T05:17:00Z", ""],
        ["2013-01-01T05:17:00Z", "2013-01-01T05:17:00.5Z"],
        ["2013-01-01T05:17:00+01:00", "2013-01-01T05:17:00-01:00"],
        ["1900-01-01T00:00:00+00:01"],
        ["1899-12-31T23:59:00-00:01"],
        ["2200-01-01T00:00:00+00:01"],
        ["2199-12-31T23:59:59.999Z"],
        ["2199-12-31T23:59:59.999-00:01"],
        ["1969-12-31T23:59:59.9999999Z"],
        ["0000-01-01T00:00:00Z"],
        ["٢٠١٣-01-01T05:17:00Z"],
        ["2013-01-01T05:17:00+24:00"],
        ["2013-01-01T05:17:00-00:60"],
        ["2013-01-01T05:17:00+23:59", "2013-01-01T05:17:00+99:99"],
        ["1969-12-31T23:59:59.999999999Z", "1900-01-01T00:00:00.000999999Z"],
        ["\ud800"],
        *([each] for each in OTHERS),
    ],
)
def test_boundary_timestamps_equal_those_of_pydantic(moments: list[str]) -> None:
    assert_agrees(moments)


def test_long_texts_are_not_cached() -> None:
    before = _parts.cache_info().misses

    assert epoch_ms(["2013-01-01T05:17:00Z" + "x" * 16]) is None
    assert _parts.cache_info().misses == before


@pytest.mark.parametrize(
    "ending", ["Z", "+02:00", "-05:30", ".5Z", ".123Z", ".123456+00:00", ".123456789-05:00"]
)
def test_common_formats_are_parsed_vectorized(ending: str) -> None:
    strings = [f"2013-01-01T05:17:0{second}{ending}" for second in range(3)]

    found = epoch_ms(strings)

    assert found is not None
    assert found.tolist() == one_by_one(list(strings), strict_ms)


@pytest.mark.parametrize("schema", [FULL_SCHEMA, SPARSE_TIMES])
def test_the_json_schema_agrees_with_the_reader(schema: EventSchema) -> None:
    document = event_json_schema(schema)
    validator = jsonschema.Draft202012Validator(document)
    example = example_event(schema)

    assert document["examples"] == [example]
    reader = EventReader(schema)
    reader.read(msgspec.convert([example], list[reader.event]))
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


def test_a_field_called_reset_is_a_field() -> None:
    schema = EventSchema.model_validate({"fields": [{"kind": "numeric", "name": "reset"}]})
    assert not EventReader(schema, marks_resets=True).has_marks
    assert event_json_schema(schema)["properties"]["reset"]["type"] == "number"
    assert event_json_schema(FULL_SCHEMA)["properties"]["reset"]["type"] == "boolean"
    assert "reset" not in event_json_schema(FULL_SCHEMA, marks_resets=False)["properties"]
