"""Sources of a backfill that are no files of this machine, and disks that are full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import polars as pl
import pytest

from models.errors import DataError
from service.backfill.plan import PLAN, BackfillError, Plan, Source
from service.backfill.run import resume_plan
from service.backfill.source import find_sources, read_batches
from tests.support.object_store import serve_objects

FRAME = pl.DataFrame({"pump": ["a", "b", "c"], "at": [1, 2, 3], "load": [1.5, None, 2.5]})


def rows_of(source: Source, names: list[str], batch_rows: int = 2, first: int = 0) -> list[object]:
    """The rows of a source with their numbers."""
    batches = read_batches(source, names, [], batch_rows, first=first)
    return [
        (int(number), *row)
        for batch in batches
        for number, row in zip(batch.rows, batch.frame.rows(), strict=True)
    ]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """The folder of a bucket, and the address of its object store."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    with serve_objects(tmp_path) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        yield bucket, address


def test_object_stores_are_read_by_url(store: tuple[Path, str]) -> None:
    bucket, address = store
    (bucket / "day=7").mkdir()
    FRAME.write_parquet(bucket / "day=7" / "b.parquet")
    FRAME[:1].write_parquet(bucket / "day=7" / "a.parquet")
    FRAME.write_csv(bucket / "t.csv")
    FRAME.write_ndjson(bucket / "t.jsonl")

    many = find_sources(["s3://bucket/day=7/*.parquet"])
    assert [(each.path, each.rows) for each in many] == [
        ("s3://bucket/day=7/a.parquet", 1),
        ("s3://bucket/day=7/b.parquet", 3),
    ]
    assert find_sources(["s3://bucket/day=7/"]) == many
    assert rows_of(many[1], ["pump", "day"], first=1) == [(2, "b", "7"), (3, "c", "7")]
    csv, jsonl = find_sources(["s3://bucket/t.jsonl", "s3://bucket/t.csv"])
    for text in (csv, jsonl):
        assert rows_of(text, ["pump", "load"], first=1) == [(2, "b", None), (3, "c", "2.5")]
    (http,) = find_sources([f"{address}/bucket/day=7/b.parquet"])
    assert rows_of(http, ["at"]) == [(1, 1), (2, 2), (3, 3)]
    with pytest.raises(BackfillError, match="expected the URL of each text file, got a pattern"):
        find_sources(["s3://bucket/*.csv"])
    with pytest.raises(DataError, match=r"s3://bucket/none\.parquet: a table of events, got "):
        find_sources(["s3://bucket/none.parquet"])


def test_a_delta_table_is_read_at_the_version_of_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("deltalake")
    FRAME.write_delta(tmp_path / "table")
    (source,) = find_sources([str(tmp_path / "table")])
    assert (source.kind, source.rows, source.table) == ("delta", 3, "0")
    FRAME[:1].write_delta(tmp_path / "table", mode="append")

    assert rows_of(source, ["pump", "load"]) == [(1, "a", 1.5), (2, "b", None), (3, "c", 2.5)]
    (newer,) = find_sources([f"delta:{tmp_path}/table"])
    assert (newer.rows, newer.table) == (4, "1")
    plan = Plan(
        model="m",
        fingerprint="",
        sources=(source,),
        stream="pump",
        order=None,
        partitions=1,
        buckets=1,
    )
    (tmp_path / PLAN).write_bytes(msgspec.json.encode(plan))
    assert resume_plan(tmp_path, msgspec.structs.replace(plan, sources=(newer,))) == plan
    with pytest.raises(DataError, match=r"none: a table of events, got "):
        find_sources([f"delta:{tmp_path}/none"])


def test_an_iceberg_table_is_read_at_the_snapshot_of_the_plan(tmp_path: Path) -> None:
    memory = pytest.importorskip("pyiceberg.catalog.memory")
    catalog = memory.InMemoryCatalog("test", warehouse=f"file://{tmp_path}")
    try:
        catalog.create_namespace("n")
        table = catalog.create_table("n.events", FRAME.to_arrow().schema)
        with pytest.raises(BackfillError, match="expected a table with rows, got one without"):
            find_sources([str(tmp_path / "n" / "events")])
        table.append(FRAME.to_arrow())
        (source,) = find_sources([str(tmp_path / "n" / "events")])
        table.append(FRAME[:1].to_arrow())
    finally:
        catalog.close()

    assert (source.kind, source.rows) == ("iceberg", 3)
    assert rows_of(source, ["pump", "at"]) == [(1, "a", 1), (2, "b", 2), (3, "c", 3)]
    assert rows_of(source, ["pump"], first=2) == [(3, "c")]
    (newer,) = find_sources([f"iceberg:{tmp_path}/n/events"])
    assert newer.rows == 4
