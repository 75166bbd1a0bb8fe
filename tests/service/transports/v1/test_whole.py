"""The post's bidirectional network through the API: whole sequences, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from tests.service.transports.v1.harness import LIMITS, Harness, harness, problem
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.servers import RealServer

SPEC = parse_spec(
    {
        "name": "tagger",
        "features": 2,
        "layers": [
            {"kind": "bidirectional", "units": 3},
            {"kind": "bidirectional", "units": 3, "starts_from": "bidirectional_1"},
        ],
        "heads": [{"kind": "dense", "name": "label", "units": 2, "activation": "softmax"}],
        "max_chunk_steps": 25,
    }
)


@pytest.fixture
def tagger(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "tagger", SPEC, contracting_weights(SPEC, 1))


@pytest.fixture
async def api(pipeline_server: RealServer, tagger: Artifact) -> AsyncIterator[Harness]:
    async with harness(pipeline_server, {"tagger": tagger}) as running:
        yield running


async def test_sequences_are_predicted_whole(api: Harness, tagger: Artifact) -> None:
    """Longer than the runtime's usual slices and side by side, each is one Keras call."""
    random = np.random.default_rng(1)
    rows = [random.normal(size=(length, 2)).astype(np.float32) for length in (21, 3, 6)]
    body = {"sequences": [{"inputs": each.tolist()} for each in rows]}
    response = await api.client.post("/v1/models/tagger/predict?return_state=true", json=body)
    assert response.status_code == 200, response.text
    for each, found in zip(rows, response.json()["predictions"], strict=True):
        zero = tagger.state.zero().floats
        wanted, after = oracle_step(SPEC, tagger.weights, each, zero)
        np.testing.assert_allclose(found["outputs"]["label"], wanted, rtol=1e-5, atol=1e-5)
        state = found["state"]
        assert list(state) == [f"bidirectional_1.{part}" for part in PARTS]
        packed = np.concatenate([state[name] for name in state])
        np.testing.assert_allclose(packed, after, rtol=1e-5, atol=1e-5)


PARTS = ("forward.hidden", "forward.carry", "backward.hidden", "backward.carry")


async def test_a_sequence_beyond_the_limit_is_rejected(api: Harness) -> None:
    body = {"sequences": [{"inputs": [[0.0, 0.0]] * 26}]}
    response = await api.client.post("/v1/models/tagger/predict", json=body)
    document = problem(response, 413, "chunk_too_long")
    assert document["expected"] == 25 < LIMITS.max_predict_steps


CHUNK: dict[str, Any] = {"position": 0, "inputs": [[0.0, 1.0]]}


async def test_chunks_and_restores_are_rejected(api: Harness, tagger: Artifact) -> None:
    """Of a model that takes whole sequences there is no stream."""
    zero = tagger.state.by_name(tagger.state.zero())
    state = {
        "fingerprint": tagger.fingerprint.hex(),
        "feed": "inputs",
        "position": 0,
        "state": {name: value.tolist() for name, value in zero.items()},
    }
    for method, path, body in (
        ("POST", "streams/s/chunks", CHUNK),
        ("POST", "chunks", {"chunks": [{"stream": "s", **CHUNK}]}),
        ("PUT", "streams/s/state", state),
    ):
        response = await api.client.request(method, f"/v1/models/tagger/{path}", json=body)
        document = problem(response, 422, "chunks_unsupported")
        assert document["expected"] == "/predict"
        assert document.get("stream") == ("s" if body is CHUNK else None)
    assert api.position(model="tagger") is None


async def test_the_model_detail_reports_chunking_whole(api: Harness) -> None:
    model = (await api.client.get("/v1/models/tagger")).json()
    assert (model["chunking"], model["max_chunk_steps"], model["blocks"]) == ("whole", 25, None)
