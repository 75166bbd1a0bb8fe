"""The service reproduces the post's tables with any chunking, on each runtime."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import numpy as np
import pytest

from models.artifact.artifact import write_artifact
from tests.support.post_tables import INPUT, OUTPUTS, PRINTED, STATES, post_model
from tests.support.service import running, runtime_environment

CUTS = [cut for count in range(5) for cut in itertools.combinations(range(1, len(INPUT)), count)]
"""All sixteen ways to cut five events."""
TOLERANCES = {"tensorflow": PRINTED, "onnxruntime": 5e-8}
"""ONNX Runtime's sigmoid and tanh are off by a few units in the last place."""


class Tables(NamedTuple):
    """A service of the post's layers, and how close it comes to what was printed."""

    client: httpx.Client
    tolerance: float

    def equal(self, found: object, printed: object) -> None:
        np.testing.assert_allclose(found, printed, rtol=0, atol=self.tolerance)


@pytest.fixture(scope="module", params=TOLERANCES)
def tables(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tables]:
    folder = tmp_path_factory.mktemp("post")
    for kind in OUTPUTS:
        write_artifact(folder / "models" / kind, *post_model(kind))
    with (
        running(folder, folder / "models", **runtime_environment(request.param, folder)) as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        assert f'"runtime":"{request.param}"' in service.log()
        yield Tables(client, TOLERANCES[request.param])


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_table_is_reproduced_with_every_chunking(
    tables: Tables, kind: str, cut: tuple[int, ...]
) -> None:
    stream = f"/v1/models/post-{kind}/streams/cut-{'-'.join(map(str, cut)) or 'whole'}"
    got: list[list[float]] = []
    bounds = [0, *cut, len(INPUT)]
    for start, end in itertools.pairwise(bounds):
        body = {"position": start, "inputs": [[value] for value in INPUT[start:end]]}
        reply = tables.client.post(
            f"{stream}/chunks?return_state=true", json=body
        ).raise_for_status()
        got += reply.json()["outputs"]["output"]
    tables.equal(np.ravel(got), OUTPUTS[kind])
    state = reply.json()["state"]
    assert state == tables.client.get(f"{stream}/state").json()["state"]
    for part, printed in STATES[kind].items():
        tables.equal(state[part], [printed])
    assert got[-1] == state["cell.hidden"]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_return_sequences_false_returns_the_last_step(tables: Tables, kind: str) -> None:
    body = {"inputs": [[value] for value in INPUT]}
    path = f"/v1/models/post-{kind}/streams/last/chunks?return_sequences=false"
    outputs = tables.client.post(path, json=body).raise_for_status().json()["outputs"]
    tables.equal(outputs["output"], [OUTPUTS[kind][-1]])


@pytest.mark.parametrize("kind", OUTPUTS)
def test_predict_returns_the_table_and_stores_nothing(tables: Tables, kind: str) -> None:
    model = f"/v1/models/post-{kind}"
    before = tables.client.get(f"{model}/streams").json()
    body = {"sequences": [{"inputs": [[value] for value in INPUT]}] * 2}
    reply = tables.client.post(f"{model}/predict", json=body).raise_for_status().json()
    for prediction in reply["predictions"]:
        sequence = np.ravel(prediction["outputs"]["output"])
        tables.equal(sequence, OUTPUTS[kind])
    assert tables.client.get(f"{model}/streams").json() == before
