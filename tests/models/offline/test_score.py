"""`carry score` writes what the service answers, however the file is cut and wherever it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import models
from carry_client import Carry
from models.artifact.artifact import load_artifact
from models.artifact.writing import write_artifact
from models.errors import ArtifactError, DataError, SpecError
from models.events.schema import CategoricalField, EventSchema, NumericField, TimestampField
from models.offline import score as parts
from models.offline.score import score_file
from models.spec.model import parse_spec
from tests.support.command import carry
from tests.support.models import random_weights, small_spec
from tests.support.service import Service

FLIGHTS = Path(models.__file__).parent / "pretrained" / "flights"
START_MS = 1_370_000_000_000


def random_events(schema: EventSchema, count: int, seed: int = 1) -> pl.DataFrame:
    """Events of three streams, in order of time, some values absent; gaps of up to two hours."""
    random = np.random.default_rng(seed)
    times = START_MS + np.cumsum(random.integers(1, 7_200_000, count))
    columns: dict[str, Any] = {"stream": [f"s{at}" for at in random.integers(3, size=count)]}
    for field in schema.fields:
        match field:
            case TimestampField():
                values: list[Any] = times.tolist()
            case NumericField():
                values = random.normal(field.mean or 0.0, 3, count).tolist()
            case CategoricalField():
                values = [*"new", *(field.vocabulary or ())]
                values = [values[at] for at in random.integers(len(values), size=count)]
            case _:
                values = random.integers(2, size=count).astype(bool).tolist()
        if field.optional:
            values = [None if random.random() < 0.2 else value for value in values]
        columns[field.name] = values
    return pl.DataFrame(columns)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with sessions, whose states and clocks matter."""
    spec = small_spec().model_copy(update={"session_gap_s": 5000.0, "training": None})
    path = tmp_path_factory.mktemp("models") / "small"
    write_artifact(path, spec, random_weights(spec))
    return path


@pytest.fixture(scope="module")
def frame(small: Path) -> pl.DataFrame:
    schema = load_artifact(small).spec.events
    assert schema is not None
    return random_events(schema, 300)


def outputs_of(path: Path) -> pl.DataFrame:
    return pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)


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
    result = score_file(FLIGHTS, tmp_path / "events.csv", tmp_path / "out.csv", rows_per_piece=50)
    assert (result.events, result.streams, result.out_of_order) == (240, 3, 0)
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
def test_outputs_do_not_depend_on_pieces(
    small: Path, frame: pl.DataFrame, tmp_path: Path, kind: str
) -> None:
    data = tmp_path / f"events.{kind}"
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[kind](
        data
    )
    tables = []
    for rows in (7, 1000):
        out = tmp_path / f"{rows}.parquet"
        score_file(small, data, out, stream="stream", rows_per_piece=rows)
        tables.append(outputs_of(out))
    assert_equal(*tables)
    assert tables[0].height == 300
    assert not list(tmp_path.glob(".*"))
    values = tables[0].select(pl.selectors.float())
    assert values.to_numpy().std(axis=0).min() > 0


def test_a_run_that_is_interrupted_is_resumed(
    small: Path, frame: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts after the last checkpoint are computed again."""
    data, whole, cut = (tmp_path / name for name in ("events.csv", "whole.csv", "cut.csv"))
    frame.write_csv(data)
    score_file(small, data, whole, stream="stream")

    def stop(rows: int) -> None:
        if rows >= 120:
            raise KeyboardInterrupt
        if rows >= 80:
            monkeypatch.setattr(parts, "CHECKPOINT_EVERY_S", 1e9)

    options = {"stream": "stream", "rows_per_piece": 40}
    with pytest.raises(ArtifactError, match="no checkpoint to resume from"):
        score_file(small, data, cut, resume=True, **options)
    monkeypatch.setattr(parts, "CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        score_file(small, data, cut, advance=stop, **options)
    assert not cut.exists()
    with pytest.raises(ArtifactError, match="another model or specification, or other data"):
        score_file(small, whole, cut, resume=True, **options)
    done: list[int] = []
    score_file(small, data, cut, resume=True, advance=done.append, **options)
    assert done[0] == 120
    assert_equal(outputs_of(cut), outputs_of(whole))
    with pytest.raises(ArtifactError, match="--overwrite"):
        score_file(small, data, cut, **options)


def test_unsupported_models_and_data_are_rejected_with_the_place(
    small: Path, frame: pl.DataFrame, tmp_path: Path
) -> None:
    data, out = tmp_path / "events.csv", tmp_path / "out.parquet"
    frame.write_csv(data)
    with pytest.raises(SpecError, match="--stream"):
        score_file(small, data, out)
    with pytest.raises(DataError, match=r"\.parquet, \.csv, got '\.xlsx'"):
        score_file(small, data, tmp_path / "out.xlsx", stream="stream")
    with pytest.raises(DataError, match=r"events.csv: a column of that name"):
        score_file(small, data, out, stream="pump")
    lines = data.read_text().splitlines()
    lines[251] = "," + lines[251].split(",", 1)[1]
    data.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"events.csv, row 251: a stream's name"):
        score_file(small, data, out, stream="stream", rows_per_piece=40)
    is_long = pl.int_range(pl.len()) == 250
    long = pl.when(is_long).then(pl.lit("x" * 257)).otherwise("carrier")
    frame.with_columns(long.alias("carrier")).write_csv(data)
    with pytest.raises(DataError, match=r"events.csv, row 251: a category"):
        score_file(small, data, out, stream="stream", rows_per_piece=40)
    plain = frame.with_columns(pl.col("stream").reverse())
    plain.write_csv(data)
    assert score_file(small, data, out, stream="stream").events == 300
    both_ways = parse_spec(
        {
            "name": "both",
            "events": small_spec().events,
            "layers": [{"kind": "bidirectional", "units": 2}],
            "heads": [{"kind": "sequence", "name": "y"}],
        }
    )
    write_artifact(tmp_path / "both", both_ways, random_weights(both_ways))
    with pytest.raises(SpecError, match="do not depend on how a stream is cut"):
        score_file(tmp_path / "both", data, out, stream="stream", overwrite=True)


def test_the_command_warns_of_events_out_of_order(
    small: Path, frame: pl.DataFrame, tmp_path: Path
) -> None:
    frame.reverse().write_parquet(tmp_path / "events.parquet")
    files = [str(small), str(tmp_path / "events.parquet"), str(tmp_path / "out.csv")]
    result = carry("score", *files, "--stream", "stream")
    assert result.exit_code == 0, result.stderr
    assert b"300 events of 3 streams" in result.stdout
    assert b"297 events are earlier" in result.stdout


def test_events_out_of_order_are_counted_in_every_session(
    small: Path, frame: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = load_artifact(small).spec.events
    assert schema is not None
    assert schema.timestamp is not None
    time = schema.timestamp.name
    minute, hours = 60_000, 36_000_000
    times = [START_MS + minute, START_MS, *(START_MS + hours * at for at in range(1, 9))]
    events = frame.head(10).with_columns(pl.lit("s").alias("stream"), pl.Series(time, times))
    events.write_parquet(tmp_path / "events.parquet")
    monkeypatch.setattr(parts, "CHECKPOINT_EVERY_S", 0.0)

    def stop(rows: int) -> None:
        if rows >= 6:
            raise KeyboardInterrupt

    files = (small, tmp_path / "events.parquet", tmp_path / "out.parquet")
    with pytest.raises(KeyboardInterrupt):
        score_file(*files, stream="stream", rows_per_piece=3, advance=stop)
    result = score_file(*files, stream="stream", rows_per_piece=3, resume=True)
    assert (result.events, result.out_of_order) == (10, 1)
