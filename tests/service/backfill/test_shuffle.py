"""Stage 1 of a backfill: every row of a source is an event of its bucket, or is rejected once."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import polars as pl
import pytest

from models.errors import DataError
from service.backfill.shuffle import plan_tasks, read_bucket, write_units
from tests.support.units import NOON_MS, events, make_job, rejections, shuffle, table, write


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_event_is_in_its_bucket_in_order(tmp_path: Path, kind: str) -> None:
    frame = table(500)
    path = write(tmp_path / "history", frame, kind)
    job = make_job(tmp_path / "out", path, unit_rows=60, piece_rows=33)
    assert shuffle(job) == {}

    units = sorted((job.out / "shuffle").glob("unit-*.parquet"))
    assert [pl.read_parquet(unit).height for unit in units] == [60] * 8 + [20]
    found = events(job)

    assert found["read_from"].equals(found["bucket"].cast(pl.Int32))
    for stream, bucket in found.select("stream", "bucket").unique().rows():
        partition = zlib.crc32(f"pumps/{stream}".encode()) % 64
        assert bucket == partition * 5 // 64
    for _, piece in found.group_by("read_from"):
        assert piece.equals(piece.sort("stream", "order", "file", "row"))
    by_row = found.sort("row")
    assert by_row["row"].to_list() == list(range(1, 501))
    assert by_row["stream"].to_list() == frame["pump"].to_list()
    for name in ("at", "load", "on", "kind"):
        assert by_row[name].to_list() == frame[name].to_list()
    assert by_row["order"].equals(by_row["at"].alias("order"))


def test_bytes_depend_on_neither_the_size_of_units_nor_the_order_of_tasks(tmp_path: Path) -> None:
    frame = table(300)
    for at in range(3):
        write(tmp_path / "history" / f"day={at}", frame[at * 100 : at * 100 + 100], "csv")
    few = make_job(tmp_path / "few", tmp_path / "history")
    many = make_job(tmp_path / "many", tmp_path / "history", unit_rows=9)
    shuffle(few)
    for task in reversed(plan_tasks(many.plan)):
        write_units(many, task)
    assert events(few).equals(events(many))


def test_a_stream_longer_than_memory_is_read_in_parts(tmp_path: Path) -> None:
    frame = table(400, streams=1)
    path = write(tmp_path, frame, "parquet")
    job = make_job(tmp_path / "out", path, unit_rows=20, piece_rows=15)
    shuffle(job)
    (bucket,) = {row[0] for row in events(job).select("bucket").rows()}
    pieces = list(read_bucket(job, bucket))
    assert max(piece.height for piece in pieces) == 15
    assert pl.concat(pieces)[".at"].equals(frame["at"].sort())

    in_order = make_job(tmp_path / "in-order", path, unit_rows=20, piece_rows=15, order=None)
    shuffle(in_order)
    assert pl.concat(read_bucket(in_order, bucket))["row"].to_list() == list(range(1, 401))


def test_an_interrupted_run_writes_the_units_that_are_missing(tmp_path: Path) -> None:
    path = write(tmp_path, table(200), "csv")
    whole = make_job(tmp_path / "whole", path, unit_rows=30)
    shuffle(whole)
    files = sorted((whole.out / "shuffle").iterdir())
    assert len(files) == 8
    job = make_job(tmp_path / "out", path, unit_rows=30)
    shuffle(job)
    (job.out / "shuffle" / files[4].name).unlink()
    (job.out / "shuffle" / "unit-000000.complete").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in (job.out / "shuffle").iterdir()}

    shuffle(job)

    after = {file.name: file.stat().st_mtime_ns for file in (job.out / "shuffle").iterdir()}
    assert sorted(after) == sorted(file.name for file in files)
    assert {name: after[name] for name in before} == before
    assert events(job).equals(events(whole))


BAD_CSV = """\
pump,at,load,on,kind
a,2025-06-20T12:00:00,1,true,x
,2025-06-20T12:00:00,1,true,x
b/c,2025-06-20T12:00:00,1,true,x
a,2025-06-20T12:00:00+02:00,one,true,x
a,1750413600001,2,yes,x
a,2025-03-30T02:30:00,3,true,x
a,,4,true,x
a,1750413600002,,true,x
a,1750413600003,inf,true,x
a,1750413600004,5,true,{long}
a,1750413600005,6,true,x,more
a,1750413600006,7,,
b,"2025-06-20T10:00:00Z",8""".replace("{long}", "x" * 257)
BAD_ROWS = [
    (2, "pump", "none"),
    (3, "pump", "'b/c'"),
    (4, "load", "'one'"),
    (5, "on", "'yes'"),
    (6, "at", "2025-03-30T02:30:00.000, which clocks skipped"),
    (7, "at", "none"),
    (8, "load", "none"),
    (9, "load", "infinity"),
    (10, "kind", "one of 257"),
    (11, "", "more"),
    (13, "", "3: the file is cut"),
]


@pytest.mark.parametrize("unit_rows", [100, 1, 3])
def test_bad_rows_are_rejected_with_their_places(tmp_path: Path, unit_rows: int) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(BAD_CSV)
    job = make_job(tmp_path / "out", path, unit_rows=unit_rows)

    reasons = shuffle(job)

    assert rejections(job) == [(str(path), *bad) for bad in BAD_ROWS]
    assert sum(reasons.values()) == len(BAD_ROWS)
    assert reasons["load: expected a number"] == 1
    assert events(job)["row"].to_list() == [1, 12]
    assert events(job)["at"].to_list() == [NOON_MS, NOON_MS + 6]


def test_bad_lines_of_json_are_rejected_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"pump": 7, "at": NOON_MS, "load": 1.5, "kind": "x", "more": {"pump": 1}}
    lines = [
        json.dumps(good),
        "",
        json.dumps({**good, "load": "many"}),
        json.dumps({**good, "load": [1]}),
        "[1]",
        json.dumps(good)[:-5],
        json.dumps(good).replace('"load"', '"pump"'),
        json.dumps({**good, "load": True}),
        json.dumps({**good, "pump": None}),
        json.dumps({**good, "at": "2025-06-20T12:00:00"}),
    ]
    path.write_text("\n".join(lines) + "\n")
    job = make_job(tmp_path / "out", path)

    shuffle(job)

    assert [bad[1:3] for bad in rejections(job)] == [
        (3, "load"),
        (4, ""),
        (5, ""),
        (6, ""),
        (7, ""),
        (8, "load"),
        (9, "pump"),
    ]
    assert events(job).select("stream", "at", "row").rows() == [
        ("7", NOON_MS, 1),
        ("7", NOON_MS, 10),
    ]


def test_a_run_may_end_at_the_first_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(BAD_CSV)
    job = make_job(tmp_path / "out", path, on_error="fail")
    with pytest.raises(DataError, match=r"bad\.csv, row 2: a stream's name, 1 to 256.*got none"):
        shuffle(job)


def test_rejected_events_keep_their_places_where_they_end_streams(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(BAD_CSV)
    job = make_job(tmp_path / "out", path, on_error="halt")
    shuffle(job)
    found = events(job).sort("row")
    assert found.filter("rejected")["row"].to_list() == [4, 5, 6, 7, 8, 9, 10, 11, 13]
    nowhere = found.filter(pl.col("order") == -(2**63))["row"].to_list()
    assert nowhere == [6, 7]


def test_streams_are_ordered_by_a_column(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("pump,at,load,n\na,1750413600000,1,2\na,,2,3\na,1750413600000,3,\n")
    job = make_job(tmp_path / "out", path, order="n")
    shuffle(job)
    assert rejections(job) == [(str(path), 2, "at", "none"), (str(path), 3, "n", "none")]
    assert events(job).select("order", "row").rows() == [(2, 1)]

    moments = ["2025-06-20T10:00:00Z", "2025-06-20T12:00:00", "1750413600000"]
    frame = table(3, 1).with_columns(seen=pl.Series(moments))
    job = make_job(tmp_path / "times", write(tmp_path / "times", frame, "csv"), order="seen")
    shuffle(job)
    assert events(job)["order"].to_list() == [NOON_MS] * 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("unit_rows", [1, 10])
def test_cells_of_an_order_are_read_one_by_one(tmp_path: Path, kind: str, unit_rows: int) -> None:
    cells = ["9007199254740993", "-5", "99999999999999999999", "1.5", "soon", "1970-01-01T01:00:01"]
    frame = table(6, 1).with_columns(n=pl.Series(cells))
    path = write(tmp_path, frame, kind)
    job = make_job(tmp_path / "out", path, order="n", unit_rows=unit_rows)
    shuffle(job)
    assert events(job).select("order", "row").rows() == [
        (-5, 2),
        (1000, 6),
        (9007199254740993, 1),
    ]
    assert [bad[1:3] for bad in rejections(job)] == [(3, "n"), (4, "n"), (5, "n")]


def test_resets_are_marked_by_a_column_that_is_no_field(tmp_path: Path) -> None:
    frame = table(4, 1).with_columns(reset=pl.Series([True, None, False, True]), at=NOON_MS)
    write(tmp_path / "b", frame, "parquet")
    write(tmp_path / "b", frame, "csv")
    write(tmp_path / "a", frame.drop("reset")[:1], "parquet")
    job = make_job(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    shuffle(job)
    assert events(job)["reset"].to_list() == [False, *[True, False, False, True] * 2]


def test_ids_of_entries_are_read(tmp_path: Path) -> None:
    """An event without one, such as one from before the topic, is one of the history."""
    entries = ["17-3", None, "x", "18"]
    frame = table(4, 1).with_columns(entry=pl.Series(entries), at=NOON_MS)
    path = write(tmp_path, frame, "csv")
    job = make_job(tmp_path / "out", path, offset="entry", topic="in")
    shuffle(job)
    places = events(job).select("source", "offset", "sequence").rows()
    assert places == [("in", 17, 3), ("in", None, 0)]
    assert rejections(job) == [(str(path), 3, "entry", "'x'"), (str(path), 4, "entry", "'18'")]


def test_offsets_of_kafka_are_read_with_their_partitions(tmp_path: Path) -> None:
    offsets, partitions = [17, 18, None, 20], ["3", None, None, "x"]
    frame = table(4, 1).with_columns(
        number=pl.Series(offsets), partition=pl.Series(partitions), at=NOON_MS
    )
    path = write(tmp_path, frame, "parquet")
    options = {"offset": "number", "topic": "in", "topic_partition": "partition"}
    job = make_job(tmp_path / "out", path, **options)
    shuffle(job)
    places = events(job).select("source", "offset", "sequence").rows()
    assert places == [("kafka:in:3", 17, 0), (None, None, 0)]
    assert rejections(job) == [
        (str(path), 2, "partition", "None"), (str(path), 4, "partition", "'x'")
    ]  # fmt: skip
