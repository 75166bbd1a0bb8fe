"""The pure parts: options, chunks, order, descriptions, wire, checks, metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from carry_client import Head, ModelDescription, Output, Problem, Reply, read_description
from models.events.columns import columns_from_events
from models.events.parse import event_adapter, event_json_schema
from service.replay.checks import agree, check_duplicates, check_outputs
from service.replay.metrics import CounterGrowth, counted
from service.replay.options import ReplayError, ReplayOptions, parse_range, parse_speed
from service.replay.schedule import Cursor, Schedule
from service.replay.source import StreamEvents, event_schema, load_streams, split_streams
from tests.service.replay.standin import SPEC
from tests.support.events import FULL_SCHEMA

MODEL = ModelDescription(
    *("m", "0", (), (), None),
    outputs=(Output("p", (), False), Output("q", (2, 3), False)),
    is_cut_invariant=True,
    max_body_bytes=1,
    max_chunk_steps=1,
    max_predict_steps=1,
)


@pytest.mark.parametrize(("text", "found"), [("1..64", (1, 64)), ("7", (7, 7)), ("3..3", (3, 3))])
def test_chunk_option_is_a_range_or_a_number(text: str, found: tuple[int, int]) -> None:
    assert parse_range(text) == found


@pytest.mark.parametrize("text", ["0..4", "5..4", "a", "1..", "..4", "1-4", "-1..4", ""])
def test_invalid_chunk_option_is_rejected(text: str) -> None:
    with pytest.raises(ReplayError, match="--chunk"):
        parse_range(text)


def test_speed_option_is_max_or_a_positive_factor() -> None:
    assert parse_speed("max") is None
    assert parse_speed("2.5") == 2.5
    for text in ("0", "-1", "inf", "nan", "fast"):
        with pytest.raises(ReplayError, match="--speed"):
            parse_speed(text)


def test_cuts_depend_on_seed_and_stream_alone(streams: list[StreamEvents]) -> None:
    def cuts(stream: StreamEvents, seed: int) -> list[int]:
        cursor, found = Cursor(stream, 2, 6, seed), []
        while cursor.remaining:
            found.append(cursor.size)
            assert cursor.size == found[-1]
            cursor.advance(cursor.position + cursor.size)
        assert cursor.cuts == len(found)
        return found

    stream = max(streams, key=len)
    first = cuts(stream, 1)
    assert sum(first) == len(stream)
    assert set(first[:-1]) == {2, 3, 4, 5, 6}
    assert cuts(stream, 1) == first
    assert cuts(stream, 2) != first
    assert cuts(replace(stream, name="other"), 1) != first


async def test_chunks_leave_in_the_order_of_their_last_events(
    streams: list[StreamEvents],
) -> None:
    schedule = Schedule([Cursor(stream, 1, 5, 1) for stream in streams], None, lambda: 0.0)
    ranks = []
    while taken := await schedule.take(1):
        (cursor,) = taken
        ranks.append(cursor.rank)
        cursor.advance(cursor.position + cursor.size)
        schedule.give_back(cursor)
    assert ranks == sorted(ranks)
    assert ranks[-1] == sum(len(stream) for stream in streams) - 1


async def test_schedule_returns_no_stream_twice(streams: list[StreamEvents]) -> None:
    schedule = Schedule([Cursor(stream, 1, 5, 1) for stream in streams], None, lambda: 0.0)
    taken = await schedule.take(3) + await schedule.take(3)
    assert sorted(cursor.name for cursor in taken) == ["s1", "s2", "s4", "s:3"]


async def test_speed_delays_a_chunk_until_its_last_event(streams: list[StreamEvents]) -> None:
    now_s = 0.0
    cursors = [Cursor(stream, 1, 1, 1) for stream in streams]
    schedule = Schedule(cursors, 100.0, lambda: now_s)
    first = await schedule.take(4)
    times = [int(stream.times_ms[0]) for stream in streams if stream.times_ms is not None]
    assert [cursor.time_ms for cursor in first] == [min(times)]
    now_s = (sorted(times)[1] - min(times)) / 1000 / 100 + 1e-6
    second = await schedule.take(4)
    assert [cursor.time_ms for cursor in second] == [sorted(times)[1]]


def test_streams_contain_the_earliest_events_in_order() -> None:
    events = [{"at": moment, "delay": 1.0 * moment, "kind": "a"} for moment in (50, 10, 40, 10, 20)]
    assert SPEC.events is not None
    columns = columns_from_events(SPEC.events, events)
    found = split_streams(SPEC.events, columns, ["x", "y", "x", "x", "y"], limit=4, prefix="p:")
    by_name = {stream.name: stream for stream in found}
    assert by_name["p:x"].events(0, 2) == [
        {"at": 10, "delay": 10.0, "kind": "a"},
        {"at": 40, "delay": 40.0, "kind": "a"},
    ]
    assert by_name["p:y"].events(1, 2) == [{"at": 20, "delay": 20.0, "kind": "a"}]
    assert by_name["p:x"].ranks.tolist() == [1, 3]
    for name in ("a/b", ".", ".."):
        with pytest.raises(ReplayError, match=f"'{name}'"):
            split_streams(SPEC.events, columns, [name] * 5)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_events_are_read_from_files(tmp_path: Path, suffix: str) -> None:
    frame = pl.DataFrame(
        {
            "who": [7, 8, 7],
            "at": ["2013-01-01T00:00:01Z", "2013-01-01T00:00:02Z", "2013-01-01T00:00:03Z"],
            "delay": [1.5, 2.0, -3.25],
            "kind": ["a", "b", "a"],
            "wind": [None, 1.0, None],
            "other": [1, 2, 3],
        }
    )
    path = tmp_path / f"data.{suffix}"
    write: Callable[..., Any] = {
        "csv": frame.write_csv,
        "jsonl": frame.write_ndjson,
        "parquet": frame.write_parquet,
    }[suffix]
    write(path)
    assert SPEC.events is not None
    options = ReplayOptions(data=path, stream_column="who")
    first, second = load_streams(SPEC.events, options)
    assert (first.name, second.name) == ("7", "8")
    assert first.events(0, 2) == [
        {"at": 1_356_998_401_000, "delay": 1.5, "kind": "a"},
        {"at": 1_356_998_403_000, "delay": -3.25, "kind": "a"},
    ]
    assert second.events(0, 1)[0]["wind"] == 1.0
    with pytest.raises(ReplayError, match="--stream-column"):
        load_streams(SPEC.events, ReplayOptions(data=path))


def test_unreadable_data_is_rejected(tmp_path: Path) -> None:
    assert SPEC.events is not None
    text = tmp_path / "data.txt"
    with pytest.raises(ReplayError, match=r"expected \.csv, \.jsonl or \.parquet"):
        load_streams(SPEC.events, ReplayOptions(data=text))
    with pytest.raises(ReplayError, match=r"none\.csv"):
        load_streams(SPEC.events, ReplayOptions(data=tmp_path / "none.csv"))
    path = tmp_path / "data.csv"
    path.write_text("stream,at\nx,2013-01-01T00:00:01Z\n")
    with pytest.raises(ReplayError, match="'delay'"):
        load_streams(SPEC.events, ReplayOptions(data=path))


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("data.csv", "stream,load,load\na,1,2\n", "line 1: columns of different names"),
        ("data.jsonl", '{"stream": "a", "load": 1, "load": 2}\n', "line 1: each member once"),
    ],
)
def test_duplicate_column_is_rejected(tmp_path: Path, name: str, text: str, place: str) -> None:
    assert SPEC.events is not None
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ReplayError, match=f"field 'load': expected {path}, {place}, got 'load'"):
        load_streams(SPEC.events, ReplayOptions(data=path))


def test_description_gives_fields_and_outputs() -> None:
    document = {
        "name": "full",
        "version": "1",
        "runtimes": ["numpy"],
        "columns": [],
        "limits": {"max_body_bytes": 1, "max_chunk_steps": 1, "max_predict_steps": 1},
        "events": event_json_schema(FULL_SCHEMA),
        "outputs": {"q": {"shape": [2, 3], "per": "step", "labels": []}},
        "chunking": "invisible",
    }
    found = read_description(document)
    shape = [(field.name, field.kind, field.optional) for field in event_schema(found).fields]
    assert shape == [(field.name, field.kind, field.optional) for field in FULL_SCHEMA.fields]
    assert found.outputs == (Output("q", (2, 3), False),)
    assert found.is_cut_invariant
    assert not read_description({**document, "chunking": "per_chunk"}).is_cut_invariant
    assert read_description({**document, "events": None}).fields is None
    with pytest.raises(ValueError, match="cannot be read"):
        read_description({**document, "outputs": [1]})


def test_sent_events_pass_the_schema(streams: list[StreamEvents]) -> None:
    assert SPEC.events is not None
    adapter = event_adapter(SPEC.events)
    for stream in streams:
        for event in stream.events(0, len(stream)):
            adapter.validate_python(event)


def test_outputs_are_packed_by_the_description() -> None:
    rows = MODEL.pack({"q": np.arange(12).reshape(2, 2, 3).tolist(), "p": [7, 8]}, 2)
    assert rows.tolist() == [[7, 0, 1, 2, 3, 4, 5], [8, 6, 7, 8, 9, 10, 11]]
    once = replace(MODEL, outputs=(Output("v", (2,), True), Output("p", (), False)))
    assert once.pack({"v": [5, 6], "p": [7, 8]}, 2).tolist() == [[5, 6, 7], [5, 6, 8]]
    for outputs, error in (
        ({"v": [[5, 6], [5, 6]], "p": [7, 8]}, "'v'"),
        ({"v": [5, 6], "p": [7]}, "'p'"),
        ({"v": [5, 6], "p": ["x", "y"]}, "expected numbers"),
        ({"v": [5, 6]}, "expected the outputs"),
    ):
        with pytest.raises(ValueError, match=error):
            once.pack(outputs, 2)


def test_tolerance_is_1e_5_absolute_and_relative() -> None:
    ones = np.full((2, 3), 100, np.float32)
    assert agree(ones + np.float32(1.0e-3), ones)
    assert not agree(ones + np.float32(1.1e-3), ones)
    assert not agree(ones, np.full((2, 3), np.nan, np.float32))
    assert not agree(ones[:1], ones)


HEAD = Head(5, "e", "t")


def _reply(value: float = 1, **changed: Any) -> Reply:
    given: dict[str, Any] = {
        "outputs": {"q": np.full((1, 2), value, np.float32)},
        "layout": (),
        **dict.fromkeys(("state", "attention", "state_token")),
        "stream": "s",
        "head": HEAD,
        "first_position": 4,
        "version": "v",
        "is_replayed": False,
        "is_created": False,
        **changed,
    }
    return Reply(**given)


def _problem(code: str, position: int) -> Problem:
    return Problem(409, code, document={"position": position})


APPLIED = _problem("already_applied", 5)
AHEAD = _problem("position_ahead", 3)


@pytest.mark.parametrize(
    ("second", "smooth", "fault"),
    [
        (_reply(is_replayed=True), True, None),
        (_reply(), True, "both were processed"),
        (_reply(), False, None),
        (_reply(is_replayed=True, head=HEAD._replace(tag="u")), True, "tag='u'"),
        (_reply(is_replayed=True, head=HEAD._replace(epoch="f")), True, "epoch='f'"),
        (_reply(is_replayed=True, head=HEAD._replace(position=6)), False, "position"),
        (_reply(is_replayed=True, stream="other"), False, "'other'"),
        (_reply(1.1, is_replayed=True), False, "differ"),
        (APPLIED, True, None),
        (_problem("already_applied", 6), True, "position"),
        (AHEAD, True, "refused: position_ahead"),
        (AHEAD, False, None),
    ],
)
def test_answers_to_a_duplicated_chunk_must_agree(
    second: Reply | Problem, smooth: bool, fault: str | None
) -> None:
    for pair in ((_reply(), second), (second, _reply())):
        found = check_duplicates(*pair, 4, smooth=smooth)
        assert (found is None) if fault is None else (found is not None and fault in found)


def test_two_replayed_answers_are_a_fault_unless_an_attempt_failed() -> None:
    replayed = _reply(is_replayed=True)
    found = check_duplicates(replayed, replayed, 4, smooth=True)
    assert found is not None
    assert "both were replayed" in found
    assert check_duplicates(replayed, replayed, 4, smooth=False) is None


def test_outputs_must_be_finite() -> None:
    assert check_outputs(_reply(), 4) is None
    assert (
        check_outputs(_reply(float("nan")), 4) == "stream 's', chunk at 4: expected finite outputs"
    )


def test_counter_growth_survives_a_restart_of_the_service() -> None:
    def text(chunks: int, alone: int, shared: int) -> str:
        return (
            f'carry_chunks_total{{model="m"}} {chunks}\ncarry_chunks_total{{model="n"}} 999\n'
            f'carry_refusals_total{{model="m",code="position_ahead"}} {chunks / 10}\n'
            "# TYPE carry_batch_rows histogram\n"
            f'carry_batch_rows_bucket{{model="m",le="1.0"}} {alone}\n'
            f'carry_batch_rows_bucket{{model="m",le="2.0"}} {alone}\n'
            f'carry_batch_rows_bucket{{model="m",le="4.0"}} {alone + shared}\n'
            f'carry_batch_rows_bucket{{model="m",le="+Inf"}} {alone + shared}\n'
            f'carry_batch_rows_count{{model="m"}} {alone + shared}\n'
            f'carry_batch_rows_sum{{model="m"}} {alone + 3 * shared}\n'
        )

    growth = CounterGrowth("m")
    for chunks, alone, shared in ((100, 10, 5), (130, 12, 8), (20, 1, 1), (50, 2, 3)):
        growth.sample(text(chunks, alone, shared))
    growth.sample("not metrics {")
    found = counted([growth])
    assert found.chunks == 30 + 20 + 30
    assert found.refusals == {"position_ahead": pytest.approx(8)}
    assert found.batches == (2 + 3) + 2 + 3
    assert found.shared_batches == 3 + 1 + 2
    assert found.mean_batch == pytest.approx((4 + 3 * 6) / 10)
    assert found.largest_batch == 4
    assert found.conflicts is None
    assert counted([CounterGrowth("m")]).refusals is None
