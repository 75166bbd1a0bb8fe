"""Options of a replay, events of streams, the bound of outputs."""

from __future__ import annotations

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
from service.commands.replay.send import ReplayError, event_schema, split_streams
from tests.service.commands.replay.standin import SPEC
from tests.support.events import FULL_SCHEMA

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
    names = [7, 8, 7, 7, 8]
    frame = table(stream=names, wind=[None, None, 1.5, None, None], other=names)
    found = split_streams(SCHEMA, frame, limit=4, prefix="p:")
    by_name = {stream.name: stream for stream in found}
    assert {name: len(stream) for name, stream in by_name.items()} == {"p:7": 2, "p:8": 2}
    assert by_name["p:7"].events(0, 2) == [
        {"at": 10, "delay": 10.0, "kind": "a"},
        {"at": 40, "delay": 40.0, "kind": "a", "wind": 1.5},
    ]
    assert by_name["p:8"].events(1, 2) == [{"at": 20, "delay": 20.0, "kind": "a"}]


def test_streams_that_cannot_be_sent_are_rejected() -> None:
    for name, got in (("a/b", "'a/b'"), (".", "'.'"), ("..", "'..'"), (None, "none")):
        with pytest.raises(ReplayError, match=f"row 1: .*got {got}"):
            split_streams(SCHEMA, table(stream=[name, *"yxxy"]))
    with pytest.raises(ReplayError, match="--stream-column"):
        split_streams(SCHEMA, table(), stream="who")
    with pytest.raises(DataError, match="'delay'"):
        split_streams(SCHEMA, table().drop("delay"))


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


def test_bound_of_outputs_is_absolute_and_relative() -> None:
    ones = np.full((2, 3), 100, np.float32)
    assert (excess(ones + np.float32(1.0e-3), ones) <= ABSOLUTE).all()
    assert not (excess(ones + np.float32(1.1e-3), ones) <= ABSOLUTE).any()
