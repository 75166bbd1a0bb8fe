"""Attention over the stream in training: sums are carried between windows, and it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

from models.spec.model import ModelSpec, parse_spec
from models.training.data import fitted_spec, streams_of
from models.training.evaluate import evaluate
from models.training.loop import Loop
from models.training.plan import plan_of
from models.training.trainer import train
from tests.support.oracle import joined
from tests.support.training import HOUR_MS, latch_frame, latch_spec, states_of_one_run

ATTENDING = [
    {"kind": "dense", "units": 8, "activation": "tanh"},
    {"kind": "attention", "name": "past", "over": "stream", "units": 8},
    # what a model has to have; no head reads it
    {"kind": "gru", "units": 1, "inputs": ["features"]},
]


def attending_spec(**training: Any) -> ModelSpec:
    """The latch's task for a network whose only memory is attention over the stream.

    The mark itself is hidden: its column is nearly 0.
    """
    data = latch_spec(**training).model_dump()
    for field in data["events"]["fields"]:
        if field["name"] == "mark":
            field["std"] = 1e6
    heads = [{**head, "input": "past"} for head in data["heads"] if head["name"] == "up"]
    return parse_spec({**data, "layers": ATTENDING, "heads": heads})


def test_carried_sums_equal_one_run_over_the_stream() -> None:
    spec = attending_spec(learning_rate=1e-30, weight_decay=0.0)
    streams = streams_of(spec, latch_frame())
    fitted = fitted_spec(spec, streams, 16 * HOUR_MS)
    loop = Loop(fitted, plan_of(fitted, streams, {}, 16 * HOUR_MS, 22 * HOUR_MS), 1)
    for epoch in range(4):
        for _ in loop.train_epoch(epoch):
            pass
    ends = zip(loop.arrays()["ended"], states_of_one_run(loop), strict=True)
    for ended, one_run in ends:
        np.testing.assert_allclose(
            joined(fitted, ended), joined(fitted, one_run), rtol=1e-5, atol=1e-5
        )
    assert any(segment.before is not None for segment in loop.plan.segments)


def test_dependencies_across_windows_are_learned_and_served(tmp_path: Path) -> None:
    """The first event decides every later mark, and a window is 4 events."""
    spec = attending_spec(epochs=8, patience=8, learning_rate=0.05, average_decay=0.9)
    result = train(spec, latch_frame(60), tmp_path / "a", quiet=True)
    losses = [record["validation"]["up"] for record in result.history]
    assert losses[0] > 0.5
    assert min(losses) < 0.1
    scores = evaluate(result.artifact, latch_frame(60), chunk=5, since="1970-01-01T22:00:00Z")
    assert scores["heads"]["up"]["auc"] > 0.97
