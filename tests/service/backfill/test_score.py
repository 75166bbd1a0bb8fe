"""`carry score` writes what the service answers, in the order of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from carry_client import Carry
from models.artifact.artifact import Artifact, load_artifact
from models.errors import ArtifactError, DataError, SpecError
from models.spec.model import schema_of
from service.backfill import score as scoring
from service.backfill.engines import TaskError, ThisProcess
from service.backfill.plan import BackfillError
from tests.support.backfill import (
    START_MS,
    Recording,
    random_events,
    small_artifact,
    time_column,
)
from tests.support.command import carry
from tests.support.models import PRETRAINED
from tests.support.service import Service

FLIGHTS = PRETRAINED / "flights"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return small_artifact(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def frame(small: Artifact) -> pl.DataFrame:
    return random_events(schema_of(small.spec), 300)


def score_file(path: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    return scoring.score_file(path, data, out, ThisProcess, **options)


def outputs_of(path: Path) -> pl.DataFrame:
    return pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path, glob=False)


def assert_equal(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    assert found.columns == expected.columns
    for name in expected.columns:
        if expected[name].dtype.is_float():
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert found[name].to_list() == expected[name].to_list()


def test_outputs_equal_those_of_the_service(service: Service, tmp_path: Path) -> None:
    schema = load_artifact(FLIGHTS).spec.events
    assert schema is not None
    frame = random_events(schema, 240)
    frame.write_csv(tmp_path / "events.csv")
    result = score_file(FLIGHTS, tmp_path / "events.csv", tmp_path / "out.csv")
    assert (result["events"], result["streams"], result["out_of_order"]) == (240, 3, 0)
    scored = outputs_of(tmp_path / "out.csv")
    assert scored["stream"].to_list() == frame["stream"].to_list()
    random = np.random.default_rng(4)
    with Carry(service.url) as carry:
        for name in ("s0", "s1", "s2"):
            events = frame.filter(pl.col("stream") == name).drop("stream").to_dicts()
            stream = carry.model("flights").stream(f"scored-{name}")
            replies = []
            while events:
                size = int(random.integers(1, 30))
                chunk, events = events[:size], events[size:]
                replies.append(pl.DataFrame(stream.send(chunk).to_columns()))
            expected = pl.concat(replies)
            own = scored.filter(pl.col("stream") == name).select(expected.columns)
            assert_equal(own, expected)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_outputs_are_in_the_order_of_the_file(
    small: Artifact,
    frame: pl.DataFrame,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / f"events [1]*.{kind}"
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[kind](
        data
    )
    tables = []
    for rows in (7, 1000):
        monkeypatch.setattr(scoring, "JOINED_ROWS", rows)
        out = tmp_path / f"[{rows}] x*.parquet"
        score_file(small.path, data, out, stream="stream")
        tables.append(outputs_of(out))
    assert_equal(*tables)
    for name in ("stream", "at"):
        assert tables[0][name].to_list() == frame[name].to_list()
    assert not list(tmp_path.glob(".*"))
    values = tables[0].select(pl.selectors.float())
    assert values.to_numpy().std(axis=0).min() > 0


def test_a_run_that_is_interrupted_is_resumed(
    small: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    data, whole, cut = (tmp_path / name for name in ("events.csv", "whole.csv", "cut.csv"))
    frame.write_csv(data)
    score_file(small.path, data, whole, stream="stream")
    engines: list[Recording] = []

    def interrupted(job: Any) -> Recording:
        engines.append(Recording(job, stop_after=1))
        return engines[-1]

    with pytest.raises(KeyboardInterrupt):
        scoring.score_file(small.path, data, cut, interrupted, stream="stream")
    assert not cut.exists()
    with pytest.raises(BackfillError, match="is of another backfill"):
        score_file(small.path, whole, cut, stream="stream", resume=True)
    score_file(small.path, data, cut, stream="stream", resume=True)
    assert_equal(outputs_of(cut), outputs_of(whole))
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ArtifactError, match="--overwrite"):
        score_file(small.path, data, cut, stream="stream")


def test_streams_may_have_names_that_a_store_does_not_accept(
    small: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    data, out = tmp_path / "events.csv", tmp_path / "out.parquet"
    frame.write_csv(data)
    score_file(small.path, data, out, stream="stream")
    named = frame.with_columns("航空 " + pl.col("stream") + "." * 300)
    named.write_csv(data)
    score_file(small.path, data, tmp_path / "named.parquet", stream="stream")
    found = outputs_of(tmp_path / "named.parquet")
    assert found["stream"].to_list() == named["stream"].to_list()
    assert_equal(found.drop("stream"), outputs_of(out).drop("stream"))


def test_unsupported_models_and_data_are_rejected_with_the_place(
    small: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    data, out = tmp_path / "events.csv", tmp_path / "out.parquet"
    frame.write_csv(data)
    with pytest.raises(SpecError, match="--stream"):
        score_file(small.path, data, out)
    with pytest.raises(DataError, match=r"\.parquet, \.csv, got '\.xlsx'"):
        score_file(small.path, data, tmp_path / "out.xlsx", stream="stream")
    with pytest.raises(TaskError, match=r"events.csv: a column of that name"):
        score_file(small.path, data, out, stream="pump")
    lines = data.read_text().splitlines()
    lines[251] = "," + lines[251].split(",", 1)[1]
    data.write_text("\n".join(lines))
    with pytest.raises(TaskError, match=r"events.csv, row 251: "):
        score_file(small.path, data, out, stream="stream")
    is_long = pl.int_range(pl.len()) == 250
    long = pl.when(is_long).then(pl.lit("x" * 257)).otherwise("carrier")
    frame.with_columns(long.alias("carrier")).write_csv(data)
    with pytest.raises(TaskError, match=r"events.csv, row 251: a category"):
        score_file(small.path, data, out, stream="stream")
    frame.with_columns(pl.col("stream").reverse()).write_csv(data)
    assert score_file(small.path, data, out, stream="stream")["events"] == 300


def test_the_command_warns_of_events_out_of_order(
    small: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    frame.reverse().write_parquet(tmp_path / "events.parquet")
    files = [str(small.path), str(tmp_path / "events.parquet"), str(tmp_path / "out.csv")]
    result = carry("score", *files, "--stream", "stream")
    assert result.exit_code == 0, result.stderr
    assert b"300 events of 3 streams" in result.stdout
    assert b"297 events are earlier" in result.stdout


def test_events_out_of_order_are_counted_in_every_session(
    small: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    minute, hours = 60_000, 36_000_000
    times = [START_MS + minute, START_MS, *(START_MS + hours * at for at in range(1, 9))]
    events = frame.head(10).with_columns(
        pl.lit("s").alias("stream"), pl.Series(time_column(small), times)
    )
    events.write_parquet(tmp_path / "events.parquet")
    files = (small.path, tmp_path / "events.parquet", tmp_path / "out.parquet")
    report = score_file(*files, stream="stream")
    assert (report["events"], report["out_of_order"]) == (10, 1)
