"""Stage 1 of a backfill: every row of a source is an event of its bucket, or is rejected once."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest

from models.errors import DataError
from models.spec.model import parse_spec
from service.backfill.plan import FOLDERS, PLAN, BackfillError, Job, Plan
from service.backfill.report import list_rejected
from service.backfill.run import resume_plan
from service.backfill.shuffle import plan_tasks, read_bucket, write_units
from service.backfill.source import find_sources

SPEC = parse_spec(
    {
        "name": "pumps",
        "events": {
            "timezone": "Europe/Vienna",
            "fields": [
                {"kind": "timestamp", "name": "at", "without_offset": "local"},
                {"kind": "numeric", "name": "load"},
                {"kind": "boolean", "name": "on", "optional": True, "coerce": True},
                {"kind": "categorical", "name": "kind", "optional": True},
            ],
        },
        "layers": [{"kind": "lstm", "units": 2}],
        "heads": [{"kind": "sequence", "name": "y"}],
    }
)
NOON_MS = 1_750_413_600_000
"""2025-06-20T10:00:00Z, noon in Vienna."""


def make_job(out: Path, *history: Path | str, **options: Any) -> Job:
    """A job over sources, with its folders."""
    options = {"stream": "pump", "order": "at", "partitions": 64, "buckets": 5} | options
    plan = Plan(
        model="pumps",
        fingerprint="00" * 16,
        sources=find_sources([str(each) for each in history]),
        **options,
    )
    for name in FOLDERS:
        (out / name).mkdir(parents=True, exist_ok=True)
    return Job(plan, out, SPEC, {})


def shuffle(job: Job) -> dict[str, int]:
    """Write all units; returns the rejected rows by reason."""
    for task in plan_tasks(job.plan):
        write_units(job, task)
    return {
        f"{each['column']}: {each['reason']}" if each["column"] else each["reason"]: each["events"]
        for each in list_rejected(job)
    }


def events(job: Job) -> pl.DataFrame:
    """The events of all buckets, with their buckets."""
    pieces = [
        piece.with_columns(read_from=pl.lit(bucket))
        for bucket in range(job.plan.buckets)
        for piece in read_bucket(job, bucket)
    ]
    return pl.concat(pieces).rename(lambda name: name.removeprefix("."))


def rejections(job: Job) -> list[tuple[Any, ...]]:
    """File, row, column and value of the rejected rows."""
    files = sorted((job.out / "rejected").glob("*.parquet"))
    rows = pl.concat([pl.read_parquet(file) for file in files])
    return rows.select("file", "row", "column", "value").rows()


def table(rows: int, streams: int = 7) -> pl.DataFrame:
    """Events of several streams, later ones first."""
    index = pl.int_range(rows, eager=True)
    return pl.DataFrame(
        {
            "pump": ("p" + (index % streams).cast(pl.String)),
            "at": NOON_MS + (index * 7919 % rows) * 1000,
            "load": index / 8,
            "on": index % 3 == 0,
            "kind": pl.Series(["a", None, "b"] * rows)[:rows],
            "note": pl.Series(["x"] * rows),
        }
    )


def write(folder: Path, frame: pl.DataFrame, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.{kind}"
    if kind == "csv":
        frame.write_csv(path)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    elif kind == "jsonl":
        frame.write_ndjson(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(frame.write_ndjson().encode()))
    else:
        frame.write_parquet(path, row_group_size=37)
    return path


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.parquet", None, r"cut\.parquet: a table of events, got '"),
        ("cut.csv.gz", None, r"cut\.csv\.gz: a table of events, got '"),
        ("latin.csv", b"pump,at,load\n\xe9,1,1\n", r"latin\.csv, line 2: UTF-8, got the byte 0xe9"),
        ("latin.jsonl", b'{"pump": "\xe9"}\n', r"latin\.jsonl, line 1: UTF-8, got the byte 0xe9"),
        ("other.csv", b"pump,at,loads\na,1,1\n", r"field 'load': expected .*other\.csv: a column"),
        ("other.jsonl", b'{"pump": "a", "at": 1}\n', r"field 'load': expected .*other\.jsonl: a"),
        ("twice.csv", b"pump,at,load,at\na,1,1\n", r"twice\.csv, line 1: columns of different"),
        ("german.csv", b"pump;at;load\na;1;1,5\n", r"german\.csv, line 1: .*got semicolons"),
        ("seconds.csv", b"pump,at,load\na,1750413600,1\n", r"seconds\.csv, row 1: epoch milli"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\\" not in value else "",
)
def test_files_that_cannot_be_read_end_the_run(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is None:
        whole = write(tmp_path / "whole", table(500), name.removeprefix("cut."))
        content = whole.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        shuffle(make_job(tmp_path / "out", path))
    assert "\n" not in str(caught.value)


def test_a_column_of_another_type_is_named_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "history", table(10), "parquet")
    other = table(10).with_columns(pl.col("load").cast(pl.String))
    other.write_parquet(tmp_path / "history" / "other.parquet")
    with pytest.raises(DataError, match=r"'load': expected .*other\.parquet: a column of numbers"):
        shuffle(make_job(tmp_path / "out", tmp_path / "history"))


def test_files_without_rows_have_no_events(tmp_path: Path) -> None:
    for kind in ("csv", "parquet"):
        write(tmp_path / "history", table(10)[:0], kind)
    job = make_job(tmp_path / "out", tmp_path / "history")
    assert shuffle(job) == {}
    assert [list(read_bucket(job, bucket)) for bucket in range(5)] == [[]] * 5


def test_a_changed_file_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, table(10), "csv")
    job = make_job(tmp_path / "out", path)
    path.write_text(path.read_text() + "a,1750413600004,5,true,x,\n")
    with pytest.raises(BackfillError, match=r"events\.csv: was changed since"):
        shuffle(job)


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


def test_parts_of_paths_are_columns(tmp_path: Path) -> None:
    for name in ("a", "b%3A1", "__HIVE_DEFAULT_PARTITION__"):
        frame = table(2).drop("pump", "load")
        write(tmp_path / "history" / f"pump={name}" / "load=2.5", frame, "parquet")
    job = make_job(tmp_path / "out", tmp_path / "history")
    shuffle(job)
    assert sorted(set(events(job).select("stream", "load").rows())) == [("a", 2.5), ("b:1", 2.5)]
    assert [bad[2:] for bad in rejections(job)] == [("pump", "none")] * 2


def test_sources_are_found_and_sorted(tmp_path: Path) -> None:
    for name in ("b.csv", "a/c.parquet", "a/_SUCCESS", ".hidden/x.csv", "d/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x\n1\n")
    table(3).write_parquet(tmp_path / "a/c.parquet")

    def names(*arguments: str) -> list[str]:
        found = find_sources([str(tmp_path / argument) for argument in arguments])
        return [str(Path(source.path).relative_to(tmp_path)) for source in found]

    assert names(".") == ["a/c.parquet", "b.csv", "d/e.jsonl"]
    assert names("d", "b.csv") == ["b.csv", "d/e.jsonl"]
    assert names("*/*.parquet") == ["a/c.parquet"]
    assert find_sources([str(tmp_path / "a")])[0].rows == 3
    for argument, message in {
        "none.csv": r"none\.csv: expected an existing file that may be read, got No such file",
        "*.json": r"expected files of that form, got none",
        ".hidden/.git": r"expected a file ending in \.csv, ",
    }.items():
        with pytest.raises(BackfillError, match=message):
            names(argument)
    with pytest.raises(BackfillError, match="expected each file once"):
        names("b.csv", "*.csv")
    (tmp_path / "d" / "empty.csv").write_bytes(b"")
    with pytest.raises(BackfillError, match=r"empty\.csv: .*got an empty file"):
        names(".")


def test_files_behind_links_are_read_once_or_rejected(tmp_path: Path) -> None:
    history = tmp_path / "history"
    file = write(history, table(2), "csv")
    write(tmp_path / "elsewhere", table(2), "parquet")
    (history / "january").symlink_to(tmp_path / "elsewhere")
    names = [Path(source.path).name for source in find_sources([str(history)])]
    assert sorted(names) == ["events.csv", "events.parquet"]

    with pytest.raises(BackfillError, match="expected each file once"):
        find_sources([str(file), f"{history}/../history/{file.name}"])
    (history / "again.csv").symlink_to(file)
    with pytest.raises(BackfillError, match=r"expected each file once, got it also as"):
        find_sources([str(history)])
    (history / "again.csv").unlink()
    (history / "all").symlink_to(history)
    with pytest.raises(BackfillError, match=r"history/all: expected each folder once"):
        find_sources([str(history)])


def test_a_table_in_a_folder_is_not_read_as_its_files(tmp_path: Path) -> None:
    """Some of them may be deleted from the table."""
    write(tmp_path / "lake" / "pumps", table(2), "parquet")
    (tmp_path / "lake" / "pumps" / "_delta_log").mkdir()
    with pytest.raises(BackfillError, match=r"lake/pumps: is a table of Delta Lake"):
        find_sources([str(tmp_path / "lake")])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_paths_may_have_the_characters_of_patterns(tmp_path: Path, kind: str) -> None:
    frame = table(3).with_columns(pump=pl.Series(["a", "b c", "d"]))
    file = write(tmp_path / "[1] *?{a,b}", frame, kind)
    job = make_job(tmp_path / "out [0-9] x=*?", file)
    shuffle(job)
    shuffle(job)
    assert events(job).height == 2
    assert [bad["places"] for bad in list_rejected(job)] == [[f"{file}, row 2"]]


def test_marks_of_the_byte_order_are_no_part_of_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "history", table(2), "jsonl")
    marked = b"\xef\xbb\xbf" + file.read_bytes()
    file.write_bytes(2 * marked)
    job = make_job(tmp_path / "out", file)
    shuffle(job)
    assert events(job)["row"].sort().to_list() == [1, 2, 3, 4]


def test_rejected_rows_of_a_repaired_file_are_forgotten(tmp_path: Path) -> None:
    """The run ended between the two files of the unit."""
    file = write(tmp_path / "history", table(2), "csv")
    job = make_job(tmp_path / "out", file)
    job.rejected_unit(0).write_bytes(b"of the file before it was repaired")
    shuffle(job)
    assert not job.rejected_unit(0).exists()


def test_rows_that_a_file_got_after_it_was_read_are_not_ignored(tmp_path: Path) -> None:
    history = tmp_path / "history"
    empty = write(history, table(0), "csv")
    job = make_job(tmp_path / "out", history)
    (job.out / PLAN).write_bytes(msgspec.json.encode(job.plan))
    shuffle(job)
    table(3).write_csv(empty)
    now = msgspec.structs.replace(job.plan, sources=find_sources([str(history)]))
    with pytest.raises(BackfillError, match=r"events\.csv: was changed since its rows were"):
        resume_plan(job.out, now)


def test_a_file_may_be_repaired_before_its_rows_are_read(tmp_path: Path) -> None:
    history = tmp_path / "history"
    good = write(history / "a", table(10), "csv")
    broken = write(history / "b", table(10), "csv")
    content = broken.read_bytes()
    broken.write_bytes(content + b"\xff")
    job = make_job(tmp_path / "out", history)
    (job.out / PLAN).write_bytes(msgspec.json.encode(job.plan))
    with pytest.raises(DataError, match=r"b/events\.csv, line 12: UTF-8"):
        shuffle(job)

    broken.write_bytes(content)
    now = msgspec.structs.replace(job.plan, sources=find_sources([str(history)]), buckets=9)
    resumed = resume_plan(job.out, now)

    assert resumed == msgspec.structs.replace(now, buckets=job.plan.buckets)
    good.write_bytes(good.read_bytes() + b"\n")
    now = msgspec.structs.replace(job.plan, sources=find_sources([str(history)]))
    with pytest.raises(BackfillError, match=r"a/events\.csv: was changed since its rows were"):
        resume_plan(job.out, now)
    now = msgspec.structs.replace(job.plan, stream="kind")
    with pytest.raises(BackfillError, match="stream was pump, and is kind"):
        resume_plan(job.out, now)
    now = msgspec.structs.replace(job.plan, sources=job.plan.sources[1:])
    with pytest.raises(BackfillError, match=r"the history lacks .*/a/events\.csv"):
        resume_plan(job.out, now)
    assert resume_plan(tmp_path / "new", now) == now
