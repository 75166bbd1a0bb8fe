"""Reader of events: agrees with the pydantic type, which is independent of it, on every value."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from models.errors import DataError
from models.events.columns import EventColumns, block_of, canonical_bytes, layout_of
from models.events.encode import Clock, encode
from models.events.parse import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS
from models.events.reader import EventReader
from models.events.schema import EventSchema
from tests.support.events import FULL_SCHEMA, GOOD, SPARSE_TIMES, events
from tests.support.strict_events import columns_from_events, event_type

ALL_OPTIONAL = FULL_SCHEMA.model_copy(
    update={
        "fields": tuple(
            field.model_copy(update={"optional": True, "name": f"__{field.name}__"})
            for field in reversed(FULL_SCHEMA.fields)
        )
    }
)
"""Every kind optional, in another order, under names that Python's objects use."""

TIMES_ONLY = FULL_SCHEMA.model_copy(update={"fields": (FULL_SCHEMA.field("at"),)})
TEXTS_ONLY = FULL_SCHEMA.model_copy(update={"fields": (FULL_SCHEMA.field("carrier"),)})
SCHEMAS = [FULL_SCHEMA, SPARSE_TIMES, ALL_OPTIONAL, TIMES_ONLY, TEXTS_ONLY]

READERS = {id(schema): EventReader(schema) for schema in SCHEMAS}
STRICT: dict[int, TypeAdapter[list[dict[str, Any]]]] = {
    id(schema): TypeAdapter(Annotated[list[event_type(schema)], Field(fail_fast=True)])
    for schema in SCHEMAS
}
REQUIRED = {name: GOOD[name] for name in ("load", "at", "carrier", "heavy")}
READER = READERS[id(FULL_SCHEMA)]


def strict(schema: EventSchema, body: bytes) -> EventColumns | None:
    """The columns by way of the strict type, or None where it rejects the events."""
    try:
        return columns_from_events(schema, STRICT[id(schema)].validate_json(body))
    except ValidationError:
        return None


def assert_same(schema: EventSchema, found: EventColumns | None, wanted: EventColumns) -> None:
    assert found is not None
    assert found.steps == wanted.steps
    assert list(found.values) == list(found.present) == list(wanted.values)
    for name, values in wanted.values.items():
        assert found.values[name].dtype == values.dtype
        assert found.values[name].tolist() == values.tolist()
        assert found.present[name].dtype == np.bool_
        assert found.present[name].tolist() == wanted.present[name].tolist()
    assert canonical_bytes(schema, found) == canonical_bytes(schema, wanted)
    for clock in (Clock(), Clock(1_370_000_000_123, 7, 2)):
        rows, after = encode(schema, found, clock)
        wanted_rows, wanted_after = encode(schema, wanted, clock)
        assert rows.tobytes() == wanted_rows.tobytes()
        assert after == wanted_after


def read(schema: EventSchema, chunk: Any) -> EventColumns | None:
    """The columns of Python's objects, or None where the reader rejects the events."""
    reader = READERS[id(schema)]
    try:
        return reader.read(msgspec.convert(chunk, list[reader.event])).columns
    except (msgspec.ValidationError, DataError):
        return None


def decoded(body: bytes) -> EventColumns | None:
    try:
        return read(FULL_SCHEMA, orjson.loads(body))
    except orjson.JSONDecodeError:
        return None


def packed(body: bytes) -> EventColumns | None:
    try:
        return READER.read(msgspec.msgpack.decode(body, type=list[READER.event])).columns
    except (msgspec.MsgspecError, DataError, UnicodeDecodeError):
        return None


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SCHEMAS).flatmap(lambda s: st.tuples(st.just(s), events(s, 12))))
def test_events_are_read_as_the_pydantic_type_reads_them(
    case: tuple[EventSchema, list[dict[str, Any]]],
) -> None:
    schema, chunk = case
    wanted = strict(schema, json.dumps(chunk).encode())
    assert wanted is not None
    assert_same(schema, read(schema, chunk), wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEMAS[:3]).flatmap(lambda s: st.tuples(st.just(s), events(s, 12))),
    st.integers(-14, 14),
    st.integers(-14, 14),
)
def test_a_slice_equals_decoding_its_events(
    case: tuple[EventSchema, list[dict[str, Any]]], start: int, stop: int
) -> None:
    schema, chunk = case
    found = read(schema, chunk)
    assert found is not None

    assert_same(schema, found[start:stop], columns_from_events(schema, chunk[start:stop]))


def test_an_empty_list_of_events_gives_empty_columns() -> None:
    found = EventReader(FULL_SCHEMA, marks_resets=True).read([])
    assert found.resets == ()
    assert_same(FULL_SCHEMA, found.columns, columns_from_events(FULL_SCHEMA, []))


def test_decoded_columns_are_not_copied() -> None:
    # one equal to it has been met before
    layout_of(FULL_SCHEMA)
    schema = FULL_SCHEMA.model_copy()
    reader = EventReader(schema)
    found = reader.read(msgspec.convert([GOOD], list[reader.event])).columns

    assert block_of(schema, found) is found.block
    assert block_of(schema, found[:1]).numbers.base is found.block.numbers


def test_another_schema_encodes_with_its_own_numbers() -> None:
    other = FULL_SCHEMA.model_copy(
        update={
            "fields": tuple(
                field.model_copy(update={"vocabulary": ("zz", "UA")})
                if field.name == "carrier"
                else field
                for field in FULL_SCHEMA.fields
            )
        }
    )
    found = read(FULL_SCHEMA, [GOOD])
    assert found is not None

    rows, _ = encode(other, found, Clock())
    assert rows[0, other.column_index["carrier"]] == 2
    assert canonical_bytes(other, found) == canonical_bytes(FULL_SCHEMA, found)


ODD_VALUES = [
    *("null", "true", "0", "1", "-0", "-0.0", "1.0", "1e3", "1e400", "-1e400", "1e-400", "NaN"),
    *("Infinity", "-Infinity", "01", "1.", "+1", ".5", "9" * 30, "9" * 400, "123456789012345678"),
    *('""', '"a"', '"\\u0000"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\ude00"', '"\\u00e9"', '"3"'),
    *("[]", "{}", '["UA"]', f'"{"航" * 256}"', f'"{"航" * 257}"', f'"{"x" * 257}"', '"NaN"'),
    *("1357035420000", "1357035420000.0", str(MIN_TIMESTAMP_MS), str(MIN_TIMESTAMP_MS - 1)),
    *(str(MAX_TIMESTAMP_MS), str(MAX_TIMESTAMP_MS - 1), str(2**63), str(-(2**64)), str(10**30)),
    *('"2013-01-01T05:17:00"', '"2013-01-01T05:17:00Z"', '"2013-02-30T05:17:00Z"'),
    *('"2013-01-01T05:17:00.9999999Z"', '"2200-01-01T00:00:00Z"', '"2013-01-01T24:00:00Z"'),
    *('"2013-01-01T05:17:00\\n"', '"2013-01-01t05:17:00z"', '"2013-01-01T05:17:00+0500"'),
]


@pytest.mark.parametrize("text", ODD_VALUES)
@pytest.mark.parametrize("name", GOOD)
def test_unusual_values_are_accepted_if_the_pydantic_type_accepts_them(
    name: str, text: str
) -> None:
    body = json.dumps([GOOD, {**GOOD, name: "@"}, REQUIRED]).replace('"@"', text).encode()
    wanted, found = strict(FULL_SCHEMA, body), decoded(body)
    if wanted is None:
        assert found is None
    else:
        assert_same(FULL_SCHEMA, found, wanted)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 10**400, True, "3", b"x", None, [], {}],
)
@pytest.mark.parametrize("name", GOOD)
def test_unusual_objects_are_accepted_if_the_pydantic_type_accepts_them(
    name: str, value: Any
) -> None:
    chunk = [GOOD, {**GOOD, name: value}]
    found = read(FULL_SCHEMA, chunk)
    try:
        wanted = columns_from_events(FULL_SCHEMA, STRICT[id(FULL_SCHEMA)].validate_python(chunk))
    except ValidationError:
        assert found is None
        return
    assert_same(FULL_SCHEMA, found, wanted)


@pytest.mark.parametrize(
    "body",
    [
        *(json.dumps(value) for value in (None, {}, "x", 1, [1], [[]], [None], [{}], GOOD)),
        *(json.dumps([GOOD, wrong]) for wrong in ({**GOOD, "x": 1}, {"load": 1}, {"f0": 1})),
        json.dumps([GOOD]).replace('"load": 3', '"load": "3", "load": 4'),
        json.dumps([GOOD]).replace('"load"', '"lo\\u0061d"'),
    ],
)
def test_unusual_bodies_are_accepted_if_the_pydantic_type_accepts_them(body: str) -> None:
    wanted, found = strict(FULL_SCHEMA, body.encode()), decoded(body.encode())
    if wanted is None:
        assert found is None
    else:
        assert_same(FULL_SCHEMA, found, wanted)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_accepted_if_the_pydantic_type_accepts_them(data: st.DataObject) -> None:
    body = json.dumps([GOOD, REQUIRED], ensure_ascii=data.draw(st.booleans())).encode()
    at = data.draw(st.integers(0, len(body)))
    put = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"\\", b"e", b"9"])))
    damaged = body[:at] + put + body[at + data.draw(st.integers(0, 4)) :]
    wanted, found = strict(FULL_SCHEMA, damaged), decoded(damaged)
    if wanted is None:
        assert found is None
    else:
        assert_same(FULL_SCHEMA, found, wanted)


def test_msgpack_other_than_a_list_of_events_is_rejected() -> None:
    good = ormsgpack.packb([GOOD])
    no_utf8 = good.replace(b"\xa2UA", b"\xa2U\xff")
    wanted = strict(FULL_SCHEMA, json.dumps([GOOD]).encode())
    assert wanted is not None
    assert_same(FULL_SCHEMA, packed(good), wanted)
    for body in (good[:-1], good + b"\x01", ormsgpack.packb(GOOD), no_utf8):
        assert packed(body) is None


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**1023), 2**1023))
def test_numbers_are_decoded_exactly(number: float, whole: int) -> None:
    chunk = [{**GOOD, "load": number}, {**GOOD, "load": whole}]
    found = read(FULL_SCHEMA, chunk)

    assert found is not None
    assert found.values["load"].tolist() == [number, float(whole)]


def test_wrong_timestamp_is_reported_with_its_event_and_its_forms() -> None:
    chunk = [GOOD, {**GOOD, "at": "2013-02-30T05:17:00Z"}]
    with pytest.raises(DataError) as caught:
        READER.read(msgspec.convert(chunk, list[READER.event]))
    error = caught.value
    assert (error.index, error.field, error.got) == (1, "at", '"2013-02-30T05:17:00Z"')
    assert "RFC 3339 timestamp with an offset" in error.expected
