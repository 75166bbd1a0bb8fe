"""Columns of events, and the canonical bytes of a chunk."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.events.columns import EventColumns, canonical_bytes
from models.events.schema import EventSchema
from tests.support.events import FULL_SCHEMA, SPARSE_TIMES, events
from tests.support.strict_events import columns_from_events

EVENTS: list[dict[str, Any]] = [
    {"load": -0.0, "delay": 2.5, "at": 5, "carrier": "UA", "heavy": True, "gate": "B"},
    {"load": 4, "delay": None, "at": -7, "carrier": "Österreich", "heavy": False, "late": True},
]


def canonical_by_hand(schema: EventSchema, chunk: list[dict[str, Any]]) -> bytes:
    """The layout of the docstring, value by value."""
    out = b""
    for field in schema.fields:
        given = [event.get(field.name) for event in chunk]
        out += b"".join(b"\0" if value is None else b"\1" for value in given)
        match field.kind:
            case "numeric":
                out += b"".join(struct.pack("<d", (value or 0.0) + 0.0) for value in given)
            case "timestamp":
                out += b"".join(struct.pack("<q", value or 0) for value in given)
            case "boolean":
                out += bytes(1 if value else 0 for value in given)
            case "categorical":
                strings = [(value or "").encode() for value in given]
                out += b"".join(struct.pack("<I", len(text)) for text in strings) + b"".join(
                    strings
                )
    return out


def test_canonical_bytes_of_one_numeric_and_one_category() -> None:
    schema = EventSchema.model_validate(
        {
            "fields": [
                {"kind": "numeric", "name": "x", "optional": True},
                {"kind": "categorical", "name": "c"},
            ]
        }
    )
    columns = columns_from_events(schema, [{"x": 1.0, "c": "é"}, {"c": "ab"}])

    assert canonical_bytes(schema, columns).hex() == (
        "0100" + "000000000000f03f" + "0000000000000000"
        "0101" + "02000000" + "02000000" + "c3a9" + "6162"
    )


@settings(max_examples=60, deadline=None)
@given(events(FULL_SCHEMA, 12))
def test_canonical_bytes_follow_the_documented_layout(chunk: list[dict[str, Any]]) -> None:
    columns = columns_from_events(FULL_SCHEMA, chunk)

    assert canonical_bytes(FULL_SCHEMA, columns) == canonical_by_hand(FULL_SCHEMA, chunk)


def test_absent_equals_null_and_zero_has_no_sign() -> None:
    base = EVENTS[0]
    absent = {key: value for key, value in base.items() if key != "delay"}

    def of(event: dict[str, Any]) -> bytes:
        return canonical_bytes(FULL_SCHEMA, columns_from_events(FULL_SCHEMA, [event]))

    assert of(absent) == of({**base, "delay": None})
    assert of({**base, "load": 0.0}) == of({**base, "load": -0.0})
    assert of({**base, "delay": 0.0}) != of(absent)


def test_zero_has_no_sign_in_columns_of_any_origin() -> None:
    schema = EventSchema.model_validate({"fields": [{"kind": "numeric", "name": "x"}]})
    present = {"x": np.ones(1, np.bool_)}
    zero, negative = (EventColumns(1, present, {"x": np.array([x])}) for x in (0.0, -0.0))

    assert canonical_bytes(schema, negative) == canonical_bytes(schema, zero)


@settings(max_examples=40, deadline=None)
@given(events(SPARSE_TIMES, 12), st.integers(-14, 14), st.integers(-14, 14))
def test_a_slice_contains_its_events(chunk: list[dict[str, Any]], start: int, stop: int) -> None:
    cut = columns_from_events(SPARSE_TIMES, chunk)[start:stop]
    wanted = columns_from_events(SPARSE_TIMES, chunk[start:stop])

    assert cut.steps == wanted.steps
    assert canonical_bytes(SPARSE_TIMES, cut) == canonical_bytes(SPARSE_TIMES, wanted)
