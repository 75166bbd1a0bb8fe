"""Encoding: compared with a scalar reference, and across chunk boundaries."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import DataError, StateError
from models.events.encode import Clock, encode, encode_many, gaps_ms
from models.events.parse import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS
from models.events.schema import (
    CategoricalField,
    EventSchema,
    NumericField,
    TimestampField,
)
from models.events.values import check_rows, log_gap, standardise
from models.spec.layout import state_spec
from models.spec.model import parse_spec
from models.spec.state import StateSpec
from tests.support.events import FULL_SCHEMA, NORMALISED, SPARSE_TIMES, events
from tests.support.strict_events import columns_from_events

SECOND = 1000
MONDAY_NOON = 1_362_999_600_000
"""Monday 2013-03-11T07:00 in New York, a day after its clocks were set forward."""


def encoded_by_hand(
    schema: EventSchema, chunk: list[dict[str, Any]], clock: tuple[int, int, int]
) -> tuple[list[list[float]], tuple[int, int, int]]:
    """The encoding's table, one event at a time, in float64."""
    zone = ZoneInfo(schema.timezone)
    last, seen, late = clock
    rows = []
    for event in chunk:
        row: list[float] = []
        for field in schema.fields:
            value = event.get(field.name)
            missing = [float(value is None)] if field.optional else []
            match field:
                case CategoricalField():
                    known = list(field.vocabulary or ())
                    if value is None:
                        row.append(len(known) + 1)
                    else:
                        row.append(known.index(value) + 1 if value in known else 0)
                case TimestampField():
                    if value is None:
                        row += [0.0] * 5 + missing
                        continue
                    gap = max(value - last, 0) / 1000 if seen else 0.0
                    late += 1 if seen and value < last else 0
                    last = max(value, last) if seen else value
                    seen += 1
                    here = (
                        datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=value)
                    ).astimezone(zone)
                    hour = 2 * math.pi * (here.hour * 60 + here.minute) / 1440
                    day = 2 * math.pi * here.weekday() / 7
                    row.append((math.log(1 + gap) - field.gap_mean) / field.gap_std)
                    row += [math.sin(hour), math.cos(hour), math.sin(day), math.cos(day)]
                    row += missing
                case NumericField():
                    if value is None:
                        row += [0.0, *missing]
                        continue
                    if field.transform == "signed_log1p":
                        value = math.copysign(math.log1p(abs(value)), value)
                    row += [(value - field.mean) / field.std, *missing]
                case _:
                    row += [float(bool(value)), *missing]
        rows.append(row)
    return rows, (last, seen, late)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([FULL_SCHEMA, SPARSE_TIMES]).flatmap(
        lambda schema: st.tuples(st.just(schema), events(schema, 12))
    ),
    st.sampled_from([(0, 0, 0), (1_370_000_000_123, 7, 2)]),
)
def test_encoding_matches_the_reference(
    case: tuple[EventSchema, list[dict[str, Any]]], before: tuple[int, int, int]
) -> None:
    schema, chunk = case

    rows, clock = encode(schema, columns_from_events(schema, chunk), Clock(*before))

    wanted, after = encoded_by_hand(schema, chunk, before)
    assert rows.dtype == np.float32
    assert rows.shape == (len(chunk), len(schema.columns))
    np.testing.assert_allclose(
        rows, np.array(wanted, np.float64).reshape(rows.shape), rtol=1e-6, atol=1e-6
    )
    assert (clock.last_ms, clock.seen, clock.out_of_order) == after


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([FULL_SCHEMA, SPARSE_TIMES, NORMALISED]))
def test_encoding_is_chunk_invariant_bit_for_bit(data: st.DataObject, schema: EventSchema) -> None:
    chunk = data.draw(events(schema))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(chunk)), max_size=6)))
    before = data.draw(st.sampled_from(CLOCKS))
    columns = columns_from_events(schema, chunk)

    whole, after = encode(schema, columns, before)
    clock, parts = before, []
    for start, stop in zip([0, *cuts], [*cuts, len(chunk)], strict=True):
        rows, clock = encode(schema, columns[start:stop], clock)
        parts.append(rows)

    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert clock == after


CLOCKS = [Clock(), Clock(1_370_000_000_123, 7, 2), Clock(MIN_TIMESTAMP_MS, 1, 0)]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([FULL_SCHEMA, SPARSE_TIMES, NORMALISED]))
def test_batched_encoding_equals_separate_encoding(
    data: st.DataObject, schema: EventSchema
) -> None:
    in_order = data.draw(st.booleans())
    chunks = data.draw(st.lists(events(schema, 6), min_size=1, max_size=5))
    if in_order:
        chunks = [sorted(chunk, key=lambda event: event.get("at") or 0) for chunk in chunks]
    columns = [columns_from_events(schema, chunk) for chunk in chunks]
    clocks = data.draw(
        st.lists(st.sampled_from(CLOCKS), min_size=len(chunks), max_size=len(chunks))
    )
    # so that streams have statistics of their own
    earlier = data.draw(events(schema, len(chunks)))
    clocks = [
        encode(schema, columns_from_events(schema, earlier[:count]), clock)[1]
        for count, clock in enumerate(clocks)
    ]

    rows, after = encode_many(schema, columns, clocks)

    alone = [encode(schema, *each) for each in zip(columns, clocks, strict=True)]
    assert [each.tobytes() for each in rows] == [each.tobytes() for each, _ in alone]
    assert [each.shape for each in rows] == [each.shape for each, _ in alone]
    assert all(each.flags.c_contiguous for each in rows)
    assert after == [clock for _, clock in alone]


def test_batched_encoding_names_the_first_rejected_chunk() -> None:
    good = {"load": 1.0, "at": 0, "carrier": "x", "heavy": True}
    chunks = [[good], [good, {**good, "load": 1e39}], [{**good, "load": -1e39}]]
    columns = [columns_from_events(FULL_SCHEMA, chunk) for chunk in chunks]

    with pytest.raises(DataError) as caught:
        encode_many(FULL_SCHEMA, columns, [Clock()] * 3)
    assert (caught.value.index, caught.value.field, caught.value.got) == (1, "load", "1e+39")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(MIN_TIMESTAMP_MS, MAX_TIMESTAMP_MS - 1), max_size=40))
def test_vectorized_gaps_equal_scalar_gaps_bit_for_bit(times: list[int]) -> None:
    field = FULL_SCHEMA.timestamp
    assert field is not None
    clock = CLOCKS[1]
    chunk = [{"load": 1.0, "at": time, "carrier": "x", "heavy": True} for time in times]
    rows, _ = encode(FULL_SCHEMA, columns_from_events(FULL_SCHEMA, chunk), clock)

    gaps, _ = gaps_ms(np.array(times, np.int64), clock)
    wanted = [
        np.float32((log_gap(gaps[at : at + 1])[0] - field.gap_mean) / field.gap_std)
        for at in range(len(times))
    ]
    assert rows[:, FULL_SCHEMA.column_index["at.gap"]].tolist() == wanted


def test_an_absent_value_is_positive_zero() -> None:
    chunk = [{"load": 1.0, "at": 0, "carrier": "x", "heavy": True}] * 2
    rows, _ = encode(FULL_SCHEMA, columns_from_events(FULL_SCHEMA, chunk), Clock())

    for name in ("delay", "late"):
        column = rows[:, FULL_SCHEMA.column_index[name]]
        assert column.tobytes() == bytes(8)
        assert rows[:, FULL_SCHEMA.column_index[f"{name}.missing"]].tolist() == [1, 1]


def at(schema: EventSchema, *times: int | None, clock: Clock | None = None) -> Any:
    chunk = [{"at": time, "load": 1.0} for time in times]
    return encode(schema, columns_from_events(schema, chunk), clock or Clock())


GAPS = EventSchema.model_validate(
    {
        "timezone": "America/New_York",
        "fields": [{"kind": "timestamp", "name": "at", "gap_mean": 0, "gap_std": 1}],
    }
)


def test_a_millisecond_survives_next_to_a_gap_of_a_century() -> None:
    first = -2_000_000_000_001
    rows, _ = at(GAPS, first, first + 1, clock=None)

    assert rows[1, 0] == np.float32(np.log1p(0.001))


@pytest.mark.parametrize(
    ("moment", "minutes", "weekday"),
    [
        ("2013-03-10T06:59:59+00:00", 119, 6),
        ("2013-03-10T07:00:00+00:00", 180, 6),
        ("2013-11-03T05:59:00+00:00", 119, 6),
        ("2013-11-03T06:00:00+00:00", 60, 6),
        ("2013-03-11T03:59:59+00:00", 1439, 6),
        ("2013-03-11T04:00:00+00:00", 0, 0),
        ("1969-12-31T23:59:59+00:00", 1139, 2),
    ],
)
def test_calendar_angles_follow_the_local_time_across_dst(
    moment: str, minutes: int, weekday: int
) -> None:
    rows, _ = at(GAPS, int(datetime.fromisoformat(moment).timestamp() * 1000))

    hour, day = 2 * math.pi * minutes / 1440, 2 * math.pi * weekday / 7
    np.testing.assert_allclose(
        rows[0, 1:], [math.sin(hour), math.cos(hour), math.sin(day), math.cos(day)], atol=1e-7
    )


@pytest.mark.parametrize(
    ("local", "day", "days"),
    [
        ("2023-01-01T00:00:00+11:00", 0, 365),
        ("2023-12-31T23:59:59+11:00", 364, 365),
        ("2024-02-29T12:00:00+11:00", 59, 366),
        ("2024-12-31T23:59:59+11:00", 365, 366),
        ("1969-12-31T13:00:00Z", 364, 365),
    ],
)
def test_the_day_of_the_year_is_an_angle_of_the_local_year(local: str, day: int, days: int) -> None:
    moment = round(datetime.fromisoformat(local).timestamp() * 1000)
    time = NORMALISED.field("at").model_copy(update={"calendar": ("yearday",)})
    schema = EventSchema(timezone="Australia/Sydney", fields=(time,))

    (row,) = at(schema, moment)[0]

    assert [column.name for column in schema.columns] == [
        "at.gap",
        "at.yearday_sin",
        "at.yearday_cos",
    ]
    angle = 2 * math.pi * day / days
    np.testing.assert_allclose(row[1:], [math.sin(angle), math.cos(angle)], atol=1e-6)


def test_a_number_that_overflows_float32_is_rejected_with_its_index() -> None:
    chunk = [{"load": value, "at": 0, "carrier": "x", "heavy": True} for value in (1.0, 1e39, 2.0)]

    with pytest.raises(DataError) as caught:
        encode(FULL_SCHEMA, columns_from_events(FULL_SCHEMA, chunk), Clock())
    assert (caught.value.index, caught.value.field) == (1, "load")
    assert "float32" in caught.value.expected
    assert caught.value.got == "1e+39"


def test_a_number_that_overflows_float64_is_rejected() -> None:
    schema = EventSchema.model_validate(
        {"fields": [{"kind": "numeric", "name": "x", "mean": -1e308, "std": 0.1}]}
    )
    with pytest.raises(DataError):
        encode(schema, columns_from_events(schema, [{"x": 1.7e308}]), Clock())


def test_an_unfitted_schema_cannot_encode() -> None:
    schema = EventSchema.model_validate({"fields": [{"kind": "numeric", "name": "x"}]})

    with pytest.raises(ValueError, match="fitted"):
        encode(schema, columns_from_events(schema, [{"x": 1.0}]), Clock())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=40))
def test_standardise_equals_the_column_bit_for_bit(values: list[float]) -> None:
    for name in ("load", "delay"):
        field = FULL_SCHEMA.field(name)
        assert isinstance(field, NumericField)
        chunk = [
            {"load": value, "delay": value, "at": 0, "carrier": "x", "heavy": True}
            for value in values
        ]
        rows, _ = encode(FULL_SCHEMA, columns_from_events(FULL_SCHEMA, chunk), Clock())

        column = rows[:, FULL_SCHEMA.column_index[name]]
        assert standardise(field, values).tobytes() == column.tobytes()
        assert standardise(field, values[0]) == column[0]


CLOCKED = state_spec(
    parse_spec(
        {
            "name": "m",
            "events": FULL_SCHEMA.model_dump(),
            "layers": [{"kind": "gru", "units": 2}],
            "heads": [{"kind": "sequence", "name": "h"}],
        }
    )
)


def test_a_clock_round_trips_through_the_state() -> None:
    clock = Clock(1_370_000_000_123, 7, 2)
    zero = CLOCKED.zero()

    ints = clock.into_ints(CLOCKED, zero.ints)

    assert not zero.ints.any()
    assert ints[CLOCKED.slices["clock.last_ms"]].tolist() == [1_370_000_000_123]
    assert ints[CLOCKED.slices["clock.seen"]].tolist() == [7]
    assert ints[CLOCKED.slices["clock.out_of_order"]].tolist() == [2]
    assert Clock.from_ints(CLOCKED, ints) == clock
    assert Clock.from_ints(CLOCKED, zero.ints) == Clock()


def test_a_model_without_timestamps_has_no_clock() -> None:
    spec, none = StateSpec(()), np.zeros(0, np.int64)

    assert Clock.from_ints(spec, none) == Clock()
    assert Clock(5, 1, 0).into_ints(spec, none).shape == (0,)


@pytest.mark.parametrize(
    ("last_ms", "seen", "out_of_order"),
    [(0, -1, 0), (0, 3, 3), (0, 3, -1), (0, 0, 1), (2**62, 1, 0), (-(2**63), 1, 0)],
)
def test_an_impossible_clock_is_rejected(last_ms: int, seen: int, out_of_order: int) -> None:
    ints = Clock(last_ms, seen, out_of_order).into_ints(CLOCKED, CLOCKED.zero().ints)

    with pytest.raises(StateError, match=r"clock\."):
        Clock.from_ints(CLOCKED, ints)


def good_rows() -> Any:
    chunk = [{"load": 1, "at": 0, "carrier": "UA", "heavy": True, "gate": None}] * 3
    return encode(FULL_SCHEMA, columns_from_events(FULL_SCHEMA, chunk), Clock())[0]


@pytest.mark.parametrize(
    ("column", "value", "expected", "got"),
    [
        ("load", np.nan, "finite", "NaN"),
        ("delay.missing", np.inf, "finite", "Infinity"),
        ("carrier", -np.inf, "finite", "-Infinity"),
        ("carrier", 0.5, "from 0 to 4", "0.5"),
        ("carrier", -1, "from 0 to 4", "-1"),
        ("carrier", 5, "from 0 to 4", "5"),
        ("gate", 4, "from 0 to 3", "4"),
    ],
)
def test_rows_outside_the_encoders_range_are_rejected(
    column: str, value: float, expected: str, got: str
) -> None:
    rows = good_rows()
    rows[2, FULL_SCHEMA.column_index[column]] = value

    with pytest.raises(DataError, match=expected) as caught:
        check_rows(FULL_SCHEMA.columns, rows)
    assert (caught.value.index, caught.value.field) == (2, column)
    assert caught.value.got == got


def test_the_highest_codes_pass_the_check() -> None:
    rows = good_rows()
    rows[0, FULL_SCHEMA.column_index["carrier"]] = 4
    rows[0, FULL_SCHEMA.column_index["gate"]] = 3
    rows[1, FULL_SCHEMA.column_index["gate"]] = 0

    check_rows(FULL_SCHEMA.columns, rows)


def test_rows_of_another_width_are_rejected() -> None:
    width = len(FULL_SCHEMA.columns)

    with pytest.raises(DataError, match=f"expected rows of {width} values, got {width - 1}"):
        check_rows(FULL_SCHEMA.columns, good_rows()[:, 1:])
    with pytest.raises(DataError, match="shape"):
        check_rows(FULL_SCHEMA.columns, good_rows()[0])


@settings(max_examples=60)
@given(
    case=st.sampled_from([SPARSE_TIMES, NORMALISED]).flatmap(
        lambda schema: st.tuples(st.just(schema), events(schema, 12))
    ),
    marks=st.sets(st.integers(0, 11)),
    clock=st.sampled_from([Clock(), Clock(MONDAY_NOON, 3, 1)]),
)
def test_events_with_resets_are_encoded_as_their_segments_by_themselves(
    case: tuple[EventSchema, list[dict[str, Any]]], marks: set[int], clock: Clock
) -> None:
    schema, chunk = case
    columns = columns_from_events(schema, chunk)
    resets = sorted(mark for mark in marks if mark < len(chunk))
    rows, after = encode(schema, columns, clock, resets)
    for number, (start, stop) in enumerate(pairwise([0, *resets, len(chunk)])):
        part = columns_from_events(schema, chunk[start:stop])
        expected, clock = encode(schema, part, Clock() if number else clock)
        assert rows[start:stop].tobytes() == expected.tobytes()
    assert after == clock
