"""Bytes of the entries of histories: exact round trips, cuts and rejected bytes."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.events.columns import block_of, canonical_bytes
from models.events.encode import Clock, encode
from models.events.schema import EventSchema, NumericField
from service.core.values import Feed, Steps
from service.store.history_codec import HistoryCodec, HistoryEntry, entries_from, read_range
from service.store.layout import CodecError
from tests.support.events import FULL_SCHEMA, NORMALISED, SPARSE_TIMES, events
from tests.support.strict_events import columns_from_events

SCHEMAS = [FULL_SCHEMA, SPARSE_TIMES, NORMALISED]


def steps_of(schema: EventSchema, chunk: list[dict[str, Any]], **options: Any) -> Steps:
    return Steps(Feed.EVENTS, len(chunk), columns_from_events(schema, chunk), None, **options)


def rows_of(count: int, features: int = 3, **options: Any) -> Steps:
    rows = np.random.default_rng(count).normal(size=(count, features)).astype(np.float32)
    return Steps(Feed.INPUTS, count, None, rows, **options)


@pytest.mark.parametrize("schema", SCHEMAS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_events_are_read_back_as_they_came(schema: EventSchema, data: st.DataObject) -> None:
    chunk = data.draw(events(schema, 12))
    resets = tuple(at for at in range(len(chunk)) if data.draw(st.booleans()))
    rate = data.draw(st.none() | st.floats(0.1, 5))
    steps = steps_of(schema, chunk, resets=resets, false_alarms_per_day=rate)
    codec = HistoryCodec(schema, 9)
    value = codec.encode(2**62, steps, final=True, starts=not chunk)
    assert read_range(value) == range(2**62, 2**62 + len(chunk))
    entry = codec.decode(value)
    read = entry.steps
    assert (entry.start, entry.final, entry.starts) == (2**62, True, not chunk)
    assert (read.feed, read.length, read.rows) == (Feed.EVENTS, len(chunk), None)
    assert (read.resets, read.false_alarms_per_day) == (resets, rate)
    assert read.columns is not None
    assert steps.columns is not None
    assert canonical_bytes(schema, read.columns) == canonical_bytes(schema, steps.columns)
    clock = Clock()
    for got, expected in zip(
        encode(schema, read.columns, clock), encode(schema, steps.columns, clock), strict=True
    ):
        np.testing.assert_equal(got, expected)
    assert codec.encode(2**62, read, final=True, starts=not chunk) == value


@pytest.mark.parametrize("schema", SCHEMAS)
@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 12))
def test_joined_entries_are_those_of_longer_chunks(
    schema: EventSchema, data: st.DataObject, most: int
) -> None:
    chunk = data.draw(events(schema, 12))
    resets = tuple(at for at in range(len(chunk)) if data.draw(st.booleans()))
    cuts = sorted({0, len(chunk), *data.draw(st.lists(st.integers(0, len(chunk)), max_size=6))})
    whole = HistoryEntry(5, steps_of(schema, chunk, resets=resets), final=True, starts=True)
    codec = HistoryCodec(schema, 9)

    def encoded(entry: HistoryEntry) -> bytes:
        return codec.encode(entry.start, entry.steps, final=entry.final, starts=entry.starts)

    parts = [whole.cut(5 + first, 5 + stop) for first, stop in pairwise(cuts)]
    joined = list(codec.decode_joined(map(encoded, parts), most))
    assert [encoded(each) for each in joined] == [
        encoded(whole.cut(each.start, each.stop)) for each in joined
    ]
    assert [each.start for each in joined[1:]] == [each.stop for each in joined[:-1]]
    assert not parts or (joined[0].start, joined[-1].stop) == (5, 5 + len(chunk))
    longest = max([most, *(part.steps.length for part in parts)])
    assert all(each.steps.length <= longest for each in joined)
    assert all(first.steps.length + then.steps.length > most for first, then in pairwise(joined))


@pytest.mark.parametrize("options", [{}, {"resets": (0, 3, 4)}, {"false_alarms_per_day": 0.25}])
@pytest.mark.parametrize("count", [0, 1, 5, 700])
def test_rows_are_read_back_as_they_came(count: int, options: dict[str, Any]) -> None:
    codec = HistoryCodec(FULL_SCHEMA, 3)
    steps = rows_of(count, **options)
    entry = codec.decode(codec.encode(7, steps, starts=True))
    assert (entry.start, entry.stop, entry.final, entry.starts) == (7, 7 + count, False, True)
    assert entry.steps.rows is not None
    assert steps.rows is not None
    assert entry.steps.rows.tobytes() == steps.rows.tobytes()
    assert entry.steps.rows.shape == (count, 3)
    assert (entry.steps.feed, entry.steps.columns) == (Feed.INPUTS, None)
    assert (entry.steps.resets, entry.steps.false_alarms_per_day) == (
        options.get("resets", ()),
        options.get("false_alarms_per_day"),
    )


def test_a_long_chunk_keeps_its_last_events() -> None:
    chunk = [{"load": i, "at": i} for i in range(10)]
    codec, steps = HistoryCodec(SPARSE_TIMES, 1), steps_of(SPARSE_TIMES, chunk, resets=(0, 6, 9))
    entry = codec.decode(codec.encode_last(100, steps, 4, final=True, starts=True))
    assert (entry.start, entry.stop, entry.final, entry.starts) == (106, 110, True, False)
    assert entry.steps.resets == (0, 3)
    assert entry.steps.columns is not None
    assert entry.steps.columns.values["load"].tolist() == [6, 7, 8, 9]
    whole = codec.encode_last(100, steps, 10, final=True, starts=True)
    assert whole == codec.encode(100, steps, final=True, starts=True)


def test_a_cut_keeps_the_entries_before_a_position() -> None:
    codec = HistoryCodec(None, 3)
    steps = [rows_of(4), rows_of(3, resets=(0, 2)), rows_of(0)]
    first = codec.encode(10, steps[0], starts=True)
    second = codec.encode(14, steps[1])
    last = codec.encode(17, steps[2], final=True)
    values = [first, second, last]
    assert codec.keep_until(values, 17) == values
    assert codec.keep_until(values, 14) == [first]
    assert codec.keep_until(values, 10) == []
    kept = [codec.decode(each) for each in codec.keep_until(values, 16)]
    assert steps[1].rows is not None
    assert [(each.start, each.stop, each.final) for each in kept] == [
        (10, 14, False),
        (14, 16, False),
    ]
    np.testing.assert_equal(kept[1].steps.rows, steps[1].rows[:2])
    assert kept[1].steps.resets == (0,)
    (cut,) = codec.keep_until([codec.encode(10, steps[0], final=True, starts=True)], 12)
    assert codec.decode(cut).starts
    assert not codec.decode(cut).final


class Counted(list[bytes]):
    """Entries that count how often one is read."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        self.reads += isinstance(at, int)
        return super().__getitem__(at)

    def __iter__(self) -> Any:
        self.reads += len(self)
        return super().__iter__()


def test_a_position_is_found_without_reading_every_entry() -> None:
    codec, generator = HistoryCodec(None, 3), np.random.default_rng(5)
    values, stop = Counted(), 7
    for length in generator.integers(1, 4, 1000):
        list.append(values, codec.encode(stop, rows_of(int(length))))
        stop += int(length)
    for position in (7, 8, 500, *generator.integers(7, stop, 20).tolist(), stop):
        expected = [each for each in list.__iter__(values) if read_range(each).stop >= position]
        values.reads = 0
        assert entries_from(values, position) == expected
        last = codec.keep_until(values, position)[-1:]
        assert [read_range(each).stop for each in last] == [position] * (position > 7)
        assert values.reads <= 2 * 12


def test_the_bytes_of_an_entry_are_those_of_the_layout() -> None:
    steps = Steps(Feed.INPUTS, 2, None, np.array([[1], [-2]], np.float32), (1,), 0.5)
    lead = "0500000000000000020000001f"
    body = "000000000000e03f0100000001000000010000000000803f000000c0"
    crc = zlib.crc32(bytes.fromhex(lead + body)).to_bytes(4, "little").hex()
    value = HistoryCodec(None, 1).encode(5, steps, final=True, starts=True)
    assert value.hex() == lead + crc + body


def test_another_version_reads_events_of_the_same_fields() -> None:
    chunk = [{"load": 1.5, "at": 5, "carrier": "B6", "heavy": True}]
    value = HistoryCodec(FULL_SCHEMA, 9).encode(0, steps_of(FULL_SCHEMA, chunk))
    carrier = FULL_SCHEMA.field("carrier").model_copy(update={"vocabulary": ("B6", "new")})
    fields = [carrier if field.name == "carrier" else field for field in FULL_SCHEMA.fields]
    changed = FULL_SCHEMA.model_copy(update={"fields": tuple(fields)})
    columns = HistoryCodec(changed, 9).decode(value).steps.columns
    assert columns is not None
    assert columns.values["carrier"].tolist() == ["B6"]
    assert block_of(changed, columns).numbers.tolist() != []
    for other in (
        changed.model_copy(update={"fields": changed.fields[::-1]}),
        changed.model_copy(update={"fields": changed.fields[1:]}),
        changed.model_copy(update={"fields": (*changed.fields, NumericField(name="more"))}),
    ):
        with pytest.raises(CodecError, match="other fields"):
            HistoryCodec(other, 9).decode(value)
    with pytest.raises(CodecError, match="other fields"):
        HistoryCodec(None, 9).decode(value)
    with pytest.raises(CodecError, match="4 features"):
        HistoryCodec(None, 4).decode(HistoryCodec(None, 3).encode(0, rows_of(2)))


@pytest.mark.parametrize("steps", [steps_of(SPARSE_TIMES, [{"load": 1, "at": 2}]), rows_of(2)])
def test_damaged_bytes_are_rejected(steps: Steps) -> None:
    codec = HistoryCodec(SPARSE_TIMES, 3)
    value = codec.encode(5, steps)
    assert isinstance(codec.decode(value), HistoryEntry)
    for at in range(len(value)):
        damaged = value[:at] + bytes([value[at] ^ 0x10]) + value[at + 1 :]
        for each in (damaged, value[:at], value + b"\0"):
            with pytest.raises(CodecError):
                codec.decode(each)


def test_steps_without_a_schema_are_rejected() -> None:
    with pytest.raises(CodecError, match="schema"):
        HistoryCodec(None, 3).encode(0, steps_of(SPARSE_TIMES, [{"load": 1}]))
