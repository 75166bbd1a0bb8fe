"""Every kind of network over HTTP, with kills of service and store.

A kind joins with its layers in `NETWORKS`. All that a runtime can run are served at once; a
stream of each is sent in chunks, and every reply and every state is what the oracle gives for
that chunk from the state before it. Goes for kinds whose chunks may be cut and those whose
chunks are one call each: the cuts stay the same.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, write_artifact
from models.artifact.graphs import ONNXRUNTIME
from models.spec.model import parse_spec
from service.engine.runtimes.loading import RUNTIMES
from tests.support.oracle import contracting_weights, joined, oracle_step
from tests.support.service import running, runtime_environment

NETWORKS: dict[str, list[dict[str, Any]]] = {
    "peepholes": [
        {"kind": "lstm", "units": 5, "peepholes": True},
        {"kind": "lstm", "units": 4, "peepholes": True},
    ],
    "normalised": [
        {"kind": "lstm", "units": 5, "layer_normalization": True},
        {"kind": "lstm", "units": 6, "projection": 5},
        {"kind": "add", "inputs": ["lstm_1", "lstm_2"]},
        {"kind": "gru", "units": 3, "reset_after": False},
    ],
    "handed": [
        {"kind": "lstm", "units": 4},
        {"kind": "gru", "units": 3},
        {"kind": "lstm", "units": 4, "starts_from": "lstm_1"},
        {"kind": "gru", "units": 3, "starts_from": "gru_1"},
    ],
    "attending": [
        {"kind": "gru", "units": 4},
        {"kind": "attention", "over": "stream", "units": 3},
        {"kind": "concatenate", "inputs": ["gru_1", "attention_1"]},
        {"kind": "conv1d", "units": 3, "kernel_size": 3, "dilation": 2},
        {"kind": "lstm", "units": 3},
        {"kind": "simple_rnn", "units": 3},
    ],
    "focused": [
        {"kind": "gru", "units": 4},
        {"kind": "attention", "over": "chunk", "units": 3},
        {"kind": "dense", "units": 2},
    ],
}
FEATURES = 3
CUTS = [4, 1, 7, 3, 9]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

Floats = NDArray[np.float32]


class Stream:
    """One stream of one network, and what it must answer chunk by chunk."""

    def __init__(self, artifact: Artifact, seed: int):
        self.artifact = artifact
        self.url = f"/v1/models/{artifact.spec.name}/streams/one"
        random = np.random.default_rng(seed)
        rows = random.normal(size=(sum(CUTS), FEATURES)).astype(np.float32)
        self.chunks = np.split(rows, np.cumsum(CUTS)[:-1])
        self.starts = [0, *np.cumsum(CUTS).tolist()]
        self.expected = []
        state = artifact.state.zero().floats
        for chunk in self.chunks:
            outputs, state = oracle_step(artifact.spec, artifact.weights, chunk, state)
            self.expected.append((outputs, state))

    def send(self, client: httpx.Client, number: int) -> dict[str, Any]:
        """One chunk; the reply and the stored state are the oracle's."""
        body = {"position": self.starts[number], "inputs": self.chunks[number].tolist()}
        reply = client.post(f"{self.url}/chunks", json=body).raise_for_status().json()
        outputs, state = self.expected[number]
        (head,) = self.artifact.outputs.outputs
        wanted = outputs[:, : head.size]
        wanted = wanted[-1] if head.per == "chunk" else wanted
        np.testing.assert_allclose(reply["outputs"]["output"], wanted, **CLOSE)
        stored = client.get(f"{self.url}/state").raise_for_status().json()
        assert stored["position"] == self.starts[number + 1]
        floats = np.concatenate([np.ravel(part) for part in stored["state"].values()])
        spec = self.artifact.spec
        np.testing.assert_allclose(joined(spec, floats), joined(spec, state), **CLOSE)
        return reply

    def check_resumes(self, client: httpx.Client, sent: list[dict[str, Any]]) -> int:
        """Its position after a kill is the end of a chunk, whose retry is replayed."""
        position = client.get(self.url).raise_for_status().json()["position"]
        number = self.starts.index(position)
        again = self.send(client, number - 1)
        assert again == {**sent[number - 1], "replayed": True}
        return number


KILLS = ((2, False), (4, True))
"""The chunks sent before each kill, and whether it also kills the store."""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_network_continues_after_a_kill(tmp_path: Path, runtime: str) -> None:
    streams: list[Stream] = []
    (tmp_path / "models").mkdir()
    for seed, (name, layers) in enumerate(NETWORKS.items()):
        head = {"kind": "sequence", "name": "output"}
        data = {"name": name, "features": FEATURES, "layers": layers, "heads": [head]}
        spec = parse_spec(data)
        weights = contracting_weights(spec, seed)
        artifact = write_artifact(tmp_path / "made" / name, spec, weights)
        if runtime != ONNXRUNTIME or artifact.graphs.data is not None:
            artifact.path.rename(tmp_path / "models" / name)
            streams.append(Stream(artifact, seed))

    environment = runtime_environment(runtime, tmp_path)
    with running(tmp_path, tmp_path / "models", **environment) as service:
        sent: dict[str, list[dict[str, Any]]] = {stream.url: [] for stream in streams}
        for until, kills_store in (*KILLS, (len(CUTS), False)):
            with httpx.Client(base_url=service.url, timeout=60) as client:
                for stream in streams:
                    replies = sent[stream.url]
                    if replies:
                        del replies[stream.check_resumes(client, replies) :]
                    for number in range(len(replies), until):
                        replies.append(stream.send(client, number))
            if until < len(CUTS):
                valkey = service.valkey_pid()
                service.kill()
                if kills_store:
                    os.kill(valkey, signal.SIGKILL)
                service.start(**environment)
                assert f'"runtime":"{runtime}"' in service.log()
                assert (service.valkey_pid() != valkey) == kills_store
