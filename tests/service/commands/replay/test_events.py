"""Options of a replay, events of streams, the bound of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from carry.cli import app
from carry_client import ModelDescription, Output, read_description
from models.errors import DataError
from models.events.parse import event_json_schema
from models.offline.verification import ABSOLUTE, excess
from models.training.files import read_data
from service.commands.replay.send import ReplayError, StreamEvents, event_schema, split_streams
from tests.service.commands.replay.standin import SPEC
from tests.support.events import FULL_SCHEMA
from tests.support.strict_events import event_adapter

assert SPEC.events is not None
SCHEMA = SPEC.events


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--chunk", ["0..4", "5..4", "a", "1..", "..4", "1-4", "-1..4", ""]),
        ("--speed", ["0", "-1", "inf", "nan", "fast"]),
        ("--report", ["absent/report.json"]),
    ],
)
def test_invalid_option_is_rejected_before_anything_is_sent(option: str, values: list[str]) -> None:
    for value in values:
        result = CliRunner().invoke(app, ["replay", "--url", "http://127.0.0.1:1", option, value])
        assert result.exit_code == 2
        assert f"{option}: expected" in " ".join(result.output.replace("│", " ").split())


def table(**columns: list[Any]) -> pl.DataFrame:
    """Five events of the streams x and y, with other columns."""
    moments = [50, 10, 40, 10, 20]
    return pl.DataFrame(
        {
            "stream": ["x", "y", "x", "x", "y"],
            "at": moments,
            "delay": [1.0 * moment for moment in moments],
            "kind": ["a"] * 5,
            **columns,
        }
    )


def test_streams_contain_the_earliest_events_in_order() -> None:
    found = split_streams(SCHEMA, table(), limit=4, prefix="p:")
    by_name = {stream.name: stream for stream in found}
    assert by_name["p:x"].events(0, 2) == [
        {"at": 10, "delay": 10.0, "kind": "a"},
        {"at": 40, "delay": 40.0, "kind": "a"},
    ]
    assert by_name["p:y"].events(1, 2) == [{"at": 20, "delay": 20.0, "kind": "a"}]


def test_streams_that_cannot_be_sent_are_rejected() -> None:
    for name, got in (("a/b", "'a/b'"), (".", "'.'"), ("..", "'..'"), (None, "none")):
        with pytest.raises(ReplayError, match=f"row 1: .*got {got}"):
            split_streams(SCHEMA, table(stream=[name, *"yxxy"]))
    with pytest.raises(ReplayError, match="--stream-column"):
        split_streams(SCHEMA, table(), stream="who")
    with pytest.raises(DataError, match="'delay'"):
        split_streams(SCHEMA, table().drop("delay"))


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
    writers = {"csv": "write_csv", "jsonl": "write_ndjson", "parquet": "write_parquet"}
    getattr(frame, writers[suffix])(path)
    first, second = split_streams(SCHEMA, read_data(path, SCHEMA), stream="who")
    assert (first.name, second.name) == ("7", "8")
    assert first.events(0, 2) == [
        {"at": 1_356_998_401_000, "delay": 1.5, "kind": "a"},
        {"at": 1_356_998_403_000, "delay": -3.25, "kind": "a"},
    ]
    assert second.events(0, 1)[0]["wind"] == 1.0


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
    with pytest.raises(ReplayError, match="takes no events"):
        event_schema(read_description({**document, "events": None}))
    with pytest.raises(ValueError, match="cannot be read"):
        read_description({**document, "outputs": [1]})


def test_outputs_are_packed_by_the_description() -> None:
    model = ModelDescription(
        *("m", "0", (), (), None),
        outputs=(Output("v", (2,), True), Output("q", (2, 3), False), Output("p", (), False)),
        is_cut_invariant=True,
        max_body_bytes=1,
        max_chunk_steps=1,
        max_predict_steps=1,
    )
    good = {"q": np.arange(12).reshape(2, 2, 3).tolist(), "p": [7, 8], "v": [5, 6]}
    assert model.pack(good, 2).tolist() == [
        [5, 6, 0, 1, 2, 3, 4, 5, 7],
        [5, 6, 6, 7, 8, 9, 10, 11, 8],
    ]
    for wrong, error in (
        ({"v": [[5, 6], [5, 6]]}, "'v'"),
        ({"p": [7]}, "'p'"),
        ({"p": ["x", "y"]}, "expected numbers"),
        ({"other": 1}, "expected the outputs"),
    ):
        with pytest.raises(ValueError, match=error):
            model.pack({**good, **wrong}, 2)


def test_sent_events_pass_the_schema(streams: list[StreamEvents]) -> None:
    adapter = event_adapter(SCHEMA)
    for stream in streams:
        for event in stream.events(0, len(stream)):
            adapter.validate_python(event)


def test_bound_of_outputs_is_absolute_and_relative() -> None:
    ones = np.full((2, 3), 100, np.float32)
    assert (excess(ones + np.float32(1.0e-3), ones) <= ABSOLUTE).all()
    assert not (excess(ones + np.float32(1.1e-3), ones) <= ABSOLUTE).any()
