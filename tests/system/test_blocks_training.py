"""Training of a model with blocks from a table, and its score when served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

pytest.importorskip("tensorflow")

from models.artifact.artifact import load_artifact
from models.training.data import streams_of
from models.training.evaluate import run_chunks
from service.commands.cli import app
from tests.support.oracle import oracle_in_blocks
from tests.support.service import running
from tests.support.training import both_ways_frame, both_ways_spec

BLOCKS = {"size": 3, "lookahead": 1}
CUTS = (2, 1, 4, 1, 3)
EPOCHS = 3
"""Scores need not be good."""


def carry(*words: str | Path) -> str:
    """Run a command in this process, which has loaded TensorFlow."""
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def streamed(client: httpx.Client, name: str, events: list[dict[str, Any]]) -> list[float]:
    """Send a stream in chunks, the last one final."""
    outputs: list[float] = []
    at = 0
    for count in CUTS:
        piece = events[at : at + count]
        body = {"position": at, "events": piece, "final": at + count >= len(events)}
        reply = client.post(f"/v1/models/tagger/streams/{name}/chunks", json=body)
        found = reply.raise_for_status().json()
        assert found["output_position"] == len(outputs)
        outputs += found["outputs"]["up"]
        at += count
        if at >= len(events):
            return outputs
    raise AssertionError(f"{len(events)} events, and cuts for {at}")


def test_a_model_trained_with_blocks_is_served_with_the_evaluated_score(tmp_path: Path) -> None:
    frame = both_ways_frame()
    frame.write_csv(tmp_path / "events.csv")
    (tmp_path / "SPEC.yaml").write_text(
        both_ways_spec(blocks=BLOCKS, epochs=EPOCHS).model_dump_json()
    )
    out = tmp_path / "models" / "tagger"
    carry("train", tmp_path / "SPEC.yaml", tmp_path / "events.csv", out, "--no-trees", "--quiet")
    scores = json.loads(carry("evaluate", out, tmp_path / "events.csv"))
    artifact = load_artifact(out)
    streams = streams_of(artifact.spec, frame)
    evaluated = run_chunks(artifact, streams)[:, 0]
    rows = streams.encoded(artifact.spec.events)
    served = np.zeros(streams.events)
    with running(tmp_path, out) as service, httpx.Client(base_url=service.url) as client:
        assert client.get("/v1/models/tagger").json()["blocks"] == BLOCKS
        for name, (start, stop) in zip(streams.names, streams.spans, strict=True):
            own = frame.filter(pl.col("id") == name).sort("at")
            events = own.select("at", "noise", "flag").to_dicts()
            served[start:stop] = streamed(client, name, events)
            wanted = oracle_in_blocks(artifact.spec, artifact.weights, rows[start:stop])[:, 0]
            np.testing.assert_allclose(served[start:stop], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(evaluated, served, rtol=1e-5, atol=1e-5)
    truth = streams.frame["up"].to_numpy()
    loss = -np.log(np.where(truth, served, 1 - served)).mean()
    assert scores["heads"]["up"]["log_loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["blocks"] == BLOCKS
