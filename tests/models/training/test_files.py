"""Spoilt files are rejected in one line: the place, what was expected, what came, what to do."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from models.errors import DataError
from models.spec.model import ModelSpec, parse_spec, schema_of
from models.training.data import streams_of
from models.training.files import files_below, read_data

HEADER = "id,at,x,flag,name"
ROWS = ["a,2025-01-01T00:00:00Z,1.5,true,é", "b,2025-01-01T01:00:00Z,,false,u"]
GOOD = "\n".join([HEADER, *ROWS, ""]).encode()


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return parse_spec(
        {
            "name": "t",
            "events": {
                "fields": [
                    {"kind": "timestamp", "name": "at"},
                    {"kind": "numeric", "name": "x", "optional": True},
                    {"kind": "boolean", "name": "flag"},
                    {"kind": "categorical", "name": "name"},
                    {"kind": "numeric", "name": "later", "optional": True},
                ]
            },
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "sequence", "name": "y"}],
            "training": {"stream": "id"},
        }
    )


def changed(old: str, new: str) -> bytes:
    return GOOD.replace(old.encode(), new.encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a table with one row per event, got an empty file"),
        (f"{HEADER}\n".encode(), r"at least one row, got none"),
        (
            changed(",", ";"),
            r"line 1: columns separated by commas, got semicolons: 'id;at.*separator=';'",
        ),
        (changed(",", "\t"), r"line 1: columns separated by commas, got tabs"),
        (GOOD.decode().encode("latin-1"), r"line 2: UTF-8, got the byte 0xe9.*iconv -f ISO-8859-1"),
        (GOOD.decode().encode("utf-16"), r"UTF-8, got UTF-16; convert it: iconv -f UTF-16"),
        (changed("flag", "x"), r"line 1: columns of different names, got 'x' as columns 3, 4"),
        (changed(",u", ",u,v"), r"row 2: 5 cells, as in the header, got 6"),
        (changed("false", "no"), r"row 2: true or false, got 'no'"),
        (changed("1.5", "1,5"), r"row 1: 5 cells, as in the header, got 6"),
        (changed("1.5", "'1.5'"), r"row 1: a number, got "),
        (changed("T01:00", " noon"), r"row 2: an RFC 3339 timestamp from 1900"),
        (changed("b,", ","), r"row 2: a stream's name, got none"),
        (changed("flag", "flags"), r"field 'flag': expected .*: a column of that name, got \['id'"),
        (changed("id,", "key,"), r"field 'id': expected .*: a column of that name, got \['key'"),
    ],
    ids=lambda value: "",
)
def test_malformed_csv_files_are_rejected(
    spec: ModelSpec, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "events.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        streams_of(spec, read_data(path, schema_of(spec)), str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("events.parquet", b"PAR1", r"a table in parquet form"),
        ("events.parquet", GOOD, r"in parquet form, got text; name it \.csv$"),
        ("events.csv", b"PAR1\x15\x04", r"in csv form, got Parquet; name it \.parquet$"),
        ("events.csv", b'{"id": "a"}', r"in csv form, got JSON Lines; name it \.jsonl$"),
        ("events.csv", b"PK\x03\x04", r"in csv form, got a ZIP archive, as Excel writes"),
        ("events.csv", b'[{"id": 1}]', r"in csv form, got one JSON array: write each"),
        ("events.ndjson", GOOD, r"events\.ndjson, line 1: a JSON object, got 'id,at,x,flag"),
        ("events.jsonl", b'{"id": 1}\n[{"id": 1}]', r"line 2: a JSON object, got '\[\{"),
        ("events.jsonl", b'{"id": "\xe9"}', r"line 1: UTF-8, got the byte 0xe9"),
        ("events.xlsx", b"PK", r"a file ending in \.csv, \.jsonl, \.ndjson, \.parquet"),
    ],
    ids=lambda value: "",
)
def test_malformed_files_of_other_formats_are_rejected(
    spec: ModelSpec, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_data(tmp_path / name, schema_of(spec))
    with pytest.raises(DataError, match="an existing file"):
        read_data(tmp_path / "none.csv", schema_of(spec))


@pytest.mark.parametrize("name", ["events.csv.gz", "events.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_compressed_files_are_rejected(tmp_path: Path, name: str, damage: str) -> None:
    random = np.random.default_rng(1).integers(0, 10**9, 5000)
    is_csv = ".csv" in name
    lines = [str(each) if is_csv else f'{{"id": {each}}}' for each in random]
    content = bytearray(gzip.compress("\n".join(["id", *lines] if is_csv else lines).encode()))
    middle = len(content) // 2
    if damage == "cut":
        del content[middle:]
    else:
        content[middle : middle + 200] = bytes(200)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: compressed text, by gzip, got "):
        read_data(tmp_path / name, None)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_a_table_has_the_rows_of_the_file(spec: ModelSpec, tmp_path: Path, mark: bytes) -> None:
    """A byte order mark is skipped; columns of optional fields may be missing."""
    path = tmp_path / "events.csv"
    path.write_bytes(mark + GOOD)
    frame = read_data(path, schema_of(spec))
    assert frame.columns == HEADER.split(",")
    assert frame["x"].to_list() == [1.5, None]
    assert frame["flag"].to_list() == [True, False]
    assert streams_of(spec, frame).columns.present["later"].tolist() == [False, False]


def test_files_of_folders_are_one_table(spec: ModelSpec, tmp_path: Path) -> None:
    """In the order of their names, whatever their kinds; parts of a path are columns."""
    whole = tmp_path / "whole.csv"
    whole.write_bytes(GOOD)
    frame = read_data(whole, schema_of(spec))
    folder = tmp_path / "history"
    for name in ("later=1", "later=2", ".hidden"):
        (folder / name).mkdir(parents=True)
    (folder / "later=1" / "a.csv.gz").write_bytes(gzip.compress(GOOD))
    frame.write_parquet(folder / "later=2" / "b.parquet")
    (folder / "later=2" / "c.jsonl.gz").write_bytes(gzip.compress(frame.write_ndjson().encode()))
    (folder / ".hidden" / "d.csv").write_bytes(GOOD)
    (folder / "_SUCCESS").touch()
    read = read_data(folder, schema_of(spec))
    assert read["id"].to_list() == ["a", "b"] * 3
    assert read["later"].to_list() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert read["x"].to_list() == [1.5, None] * 3
    assert read_data([whole, folder / "later=1"], schema_of(spec)).height == 4
    assert read_data(folder / "*" / "*.parquet", schema_of(spec)).height == 2
    with pytest.raises(DataError, match=r"each file once, got .*whole\.csv, .*whole\.csv"):
        read_data([whole, tmp_path / "whole*"], schema_of(spec))


def test_an_error_in_one_of_several_files_names_the_file_and_its_row(
    spec: ModelSpec, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(GOOD)
    (tmp_path / "b.csv").write_bytes(changed("T01:00", " noon"))
    with pytest.raises(DataError, match=r"b\.csv, row 2: an RFC 3339 timestamp"):
        read_data(tmp_path, schema_of(spec))
    (tmp_path / "b.csv").write_bytes(changed("flag", "flags"))
    with pytest.raises(DataError, match=r"'flag': expected .*b\.csv: a column of that name"):
        read_data(tmp_path, schema_of(spec))
    (tmp_path / "b.csv").write_bytes(gzip.compress(GOOD))
    with pytest.raises(DataError, match=r"csv form, got compressed data; name it \.csv\.gz$"):
        read_data(tmp_path / "b.csv", schema_of(spec))


def test_folders_without_files_or_with_circles_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder with files of events, got none"):
        files_below(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    with pytest.raises(DataError, match="each folder once, got it also as"):
        files_below(tmp_path)
    with pytest.raises(DataError, match=r"\*\.csv: files that match, got none"):
        read_data(tmp_path / "*.csv", None)
