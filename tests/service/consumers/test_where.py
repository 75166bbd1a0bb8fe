"""Conditions on outputs choose which are written; every event is processed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.spec.layout import Output, OutputSpec
from service.consumers.where import parse_condition
from service.core.errors import OperatorError
from tests.support.consumers import add, consuming, fields_of, outputs_of
from tests.support.pipelines import oracle_outputs, rows_of
from tests.support.servers import RealServer, becomes, real_server

OUTPUTS = OutputSpec(
    (
        Output("surprise", ()),
        Output("surprise.alarm", ()),
        Output("delay", (2,), ("0.5", "0.9")),
    )
)
ROWS = np.array([[1, 0, 5, 7], [3, 1, 5, 9], [5, 1, -2, 2]], np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with real_server("valkey") as running:
        yield running


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("surprise > 3", [2]),
        ("surprise >= 3", [1, 2]),
        ("surprise<3", [0]),
        ("surprise <= 3", [0, 1]),
        ("alarm", [1, 2]),
        ("surprise.alarm == 0", [0]),
        ("delay[0.9] != 9", [0, 2]),
        ("alarm and delay[0.5] > 0", [1]),
        ("surprise < 2 or alarm and delay[0.9] < 5", [0, 2]),
        ("delay[0.5] > -1e1", [0, 1, 2]),
    ],
)
def test_rows_are_chosen(text: str, chosen: list[int]) -> None:
    assert parse_condition(text, OUTPUTS)(ROWS).nonzero()[0].tolist() == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("delay > 1", "expected comparisons of surprise, surprise.alarm, delay[0.5]"),
        ("surprise > high", "expected a number, got 'high'"),
        ("surprise >", "got 'surprise >'"),
        ("", "got ''"),
        ("surprise > 1 and", "got 'surprise > 1 and'"),
        ("not alarm", "got 'not alarm'"),
    ],
)
def test_an_invalid_condition_is_an_error(text: str, message: str) -> None:
    with pytest.raises(OperatorError, match=re.escape(message)):
        parse_condition(text, OUTPUTS)


async def test_outputs_that_are_not_written_are_acknowledged(
    server: RealServer, artifact: Artifact
) -> None:
    rows = rows_of(np.random.default_rng(2), 40)
    expected = oracle_outputs(artifact, rows)
    column = artifact.outputs.slices["steep"].start
    limit = float(np.median(expected[:, column]))
    with server.client() as client:
        add(client, "events", *[fields_of("a", row) for row in rows])
        async with consuming(server.url, artifact, where=f"steep > {limit}") as consumer:
            await becomes(lambda: consumer.counts["committed"] == 40, "all")
        found: list[Any] = outputs_of(client, "scores")["a"]
        assert [at for at, _ in found] == np.flatnonzero(expected[:, column] > limit).tolist()
        assert client.xpending("events", "carry")["pending"] == 0
