"""The post's tables come out of the service itself, whole and in any cuts."""

from __future__ import annotations

import itertools

import httpx
import numpy as np
import pytest

from tests.support.post_tables import (
    GRU_HIDDEN,
    GRU_OUTPUTS,
    INPUT,
    LSTM_CARRY,
    LSTM_HIDDEN,
    LSTM_OUTPUTS,
    PRINTED,
)

OUTPUTS = {"lstm": LSTM_OUTPUTS, "gru": GRU_OUTPUTS}
STATES = {
    "lstm": {"cell.hidden": LSTM_HIDDEN, "cell.carry": LSTM_CARRY},
    "gru": {"cell.hidden": GRU_HIDDEN},
}

CUTS = [cut for count in range(5) for cut in itertools.combinations(range(1, len(INPUT)), count)]
"""All sixteen ways to cut five events."""


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_table_in_every_chunking(client: httpx.Client, kind: str, cut: tuple[int, ...]) -> None:
    stream = f"/v1/models/post-{kind}/streams/cut-{'-'.join(map(str, cut)) or 'whole'}"
    got: list[list[float]] = []
    bounds = [0, *cut, len(INPUT)]
    for start, end in itertools.pairwise(bounds):
        body = {"position": start, "inputs": [[value] for value in INPUT[start:end]]}
        reply = client.post(f"{stream}/chunks?return_state=true", json=body).raise_for_status()
        got += reply.json()["outputs"]["output"]
    np.testing.assert_allclose(np.ravel(got), OUTPUTS[kind], rtol=0, atol=PRINTED)
    state = reply.json()["state"]
    assert state == client.get(f"{stream}/state").json()["state"]
    for part, printed in STATES[kind].items():
        np.testing.assert_allclose(state[part], [printed], rtol=0, atol=PRINTED)
    assert got[-1] == state["cell.hidden"]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_return_sequences_false_gives_the_last_step(client: httpx.Client, kind: str) -> None:
    body = {"inputs": [[value] for value in INPUT]}
    path = f"/v1/models/post-{kind}/streams/last/chunks?return_sequences=false"
    outputs = client.post(path, json=body).raise_for_status().json()["outputs"]
    np.testing.assert_allclose(outputs["output"], [OUTPUTS[kind][-1]], rtol=0, atol=PRINTED)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_predict_gives_the_table_and_stores_nothing(client: httpx.Client, kind: str) -> None:
    model = f"/v1/models/post-{kind}"
    before = client.get(f"{model}/streams").json()
    body = {"sequences": [{"inputs": [[value] for value in INPUT]}] * 2}
    reply = client.post(f"{model}/predict", json=body).raise_for_status().json()
    for prediction in reply["predictions"]:
        sequence = np.ravel(prediction["outputs"]["output"])
        np.testing.assert_allclose(sequence, OUTPUTS[kind], rtol=0, atol=PRINTED)
    assert client.get(f"{model}/streams").json() == before
