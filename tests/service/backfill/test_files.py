"""Files of a backfill on this machine: which are read, and what ends or resumes a run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import polars as pl
import pytest

from models.errors import DataError
from service.backfill.plan import PLAN, BackfillError
from service.backfill.report import list_rejected
from service.backfill.run import resume_plan
from service.backfill.shuffle import read_bucket
from service.backfill.source import find_sources
from tests.support.units import events, make_job, rejections, shuffle, table, write


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
        "*.json": r"expected files that match, got none",
        "a/_SUCCESS": r"expected a file ending in \.csv, ",
    }.items():
        with pytest.raises((BackfillError, DataError), match=message):
            names(argument)
    with pytest.raises(BackfillError, match="expected each file once"):
        names("b.csv", "*.csv")
    (tmp_path / "d" / "empty.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.csv: .*got an empty file"):
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
    with pytest.raises(DataError, match=r"history/all: each folder once"):
        find_sources([str(history)])


def test_a_table_in_a_folder_is_not_read_as_its_files(tmp_path: Path) -> None:
    """Some of them may be deleted from the table."""
    write(tmp_path / "lake" / "pumps", table(2), "parquet")
    (tmp_path / "lake" / "pumps" / "_delta_log").mkdir()
    with pytest.raises(DataError, match=r"lake/pumps: files, .* got a table of Delta Lake"):
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
