"""Replies are read into arrays of exact shapes, and written as tables."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest

from carry_client.description import ModelDescription, Output
from carry_client.errors import Problem
from carry_client.replies import read_forecast, read_reply
from tests.support.pages import blocks

LAYOUT = (
    Output("late", (), False),
    Output("delay", (1, 3), False, ("0.1", "0.5", "0.9")),
    Output("pair", (2, 2), False, ("a", "b")),
    Output("whole", (2,), True),
)
MODEL = ModelDescription("m", "v", (), (), None, LAYOUT, True, 1, 1, 1)
HEAD = {"model": "m", "version": "v", "stream": "s", "epoch": "e", "position": 5, "tag": "t"}


def document(**outputs: Any) -> dict[str, Any]:
    return {**HEAD, "replayed": False, "outputs": outputs}


TWO_STEPS = document(
    late=[0.25, 0.5],
    delay=[[[1, 2, 3]], [[4, 5, 6]]],
    pair=[[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
    whole=[9, 10],
)


def test_each_number_of_an_output_has_a_column() -> None:
    reply = read_reply(MODEL, TWO_STEPS, 3)
    columns = {name: values.tolist() for name, values in reply.to_columns().items()}
    assert columns == {
        "position": [3, 4],
        "late": [0.25, 0.5],
        "delay[0.1]": [1, 4],
        "delay[0.5]": [2, 5],
        "delay[0.9]": [3, 6],
        "pair[0, a]": [1, 5],
        "pair[0, b]": [2, 6],
        "pair[1, a]": [3, 7],
        "pair[1, b]": [4, 8],
        "whole[0]": [9, 9],
        "whole[1]": [10, 10],
    }


def test_outputs_of_the_last_event_have_no_time_axis() -> None:
    last = document(late=0.5, delay=[[4, 5, 6]], pair=[[5, 6], [7, 8]], whole=[9, 10])
    reply = read_reply(MODEL, last, 4)
    assert len(reply) == 1
    assert reply.outputs["delay"].shape == (1, 3)
    assert reply.to_columns()["pair[1, a]"].tolist() == [7]


@pytest.mark.parametrize("nothing", [None, []])
def test_chunk_without_outputs_is_an_empty_table(nothing: object) -> None:
    """In blocks, outputs come later, from `output_position` on."""
    names = ("late", "delay", "pair")
    empty = {**document(**dict.fromkeys(names, nothing), whole=[9, 10]), "output_position": 2}
    reply = read_reply(MODEL, empty, 4)
    assert len(reply) == 0
    assert reply.first_position == 2
    assert {len(column) for column in reply.to_columns().values()} == {0}


@pytest.mark.parametrize(
    "outputs",
    [
        {"late": [[1]], "delay": [[[1, 2, 3]]], "pair": [[[1, 2], [3, 4]]], "whole": [9, 10]},
        {"late": [1], "delay": [[1, 2, 3]], "pair": [[[1, 2], [3, 4]]], "whole": [9, 10, 11]},
        {"late": [1]},
        {"late": ["x"], "delay": [], "pair": [], "whole": [9, 10]},
    ],
)
def test_outputs_of_other_shapes_are_an_unreadable_reply(outputs: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="unreadable_reply"):
        read_reply(MODEL, document(**outputs), 4)


def test_forecast_of_the_reference_is_read() -> None:
    (shown,) = (
        json.loads(text)
        for language, text in blocks("docs/reference/http-api.md")
        if language == "json" and '"quantiles"' in text
    )
    forecast = read_forecast(shown)
    series = forecast.series["temperature"]
    assert (series.quantiles.shape, series.paths.shape) == ((3, 3), (2, 3))
    columns = forecast.to_columns()
    assert list(columns) == [
        *("step", "time_ms", "temperature"),
        *(f"temperature[{level}]" for level in (0.1, 0.5, 0.9)),
    ]
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["temperature[0.9]"].tolist() == pytest.approx([5.0, 5.1, 4.9])
    assert columns["time_ms"].dtype == np.int64


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_missing_table_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    reply = read_reply(MODEL, TWO_STEPS, 3)
    with pytest.raises(ImportError) as raised:
        getattr(reply, f"to_{library}")()
    assert str(raised.value) == f"to_{library}() needs {library}: pip install {library}"
