"""Every kind of network over HTTP, with kills of service and store.

ONNX Runtime serves all of them at once: what is stored does not depend on the runtime, and
`tests/service/engine` compares the outputs of every kind. Each model has a scenario, a generator
that yields where the service is killed: the process is replaced, and the scenario continues from
the stored state. Every reply and every state is what the oracle computes for the model; the chunks
of models that see a chunk as a whole stay the same.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import ModelSpec, parse_spec
from tests.support.oracle import contracting_weights, joined, oracle_in_blocks, oracle_step
from tests.support.service import running

KILLS = (False, True)
"""Whether each kill of the service is also one of the store."""
FEATURES = 3
CHUNK_LIMIT = 64
"""Of networks that see a chunk as a whole: the length for which TensorFlow compiles anyway."""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

Floats = NDArray[np.float32]

OUTPUT = {"kind": "sequence", "name": "output"}
NETWORKS: dict[str, dict[str, Any]] = {
    "cells": {
        "layers": [
            {"kind": "lstm", "units": 5, "peepholes": True},
            {"kind": "lstm", "units": 4, "peepholes": True},
            {"kind": "lstm", "units": 5, "layer_normalization": True},
            {"kind": "lstm", "units": 6, "projection": 5},
            {"kind": "add", "inputs": ["lstm_3", "lstm_4"]},
            {"kind": "gru", "units": 3, "reset_after": False},
        ],
        "heads": [OUTPUT],
    },
    "attending": {
        "layers": [
            {"kind": "gru", "units": 4},
            {"kind": "attention", "over": "stream", "units": 3},
            {"kind": "concatenate", "inputs": ["gru_1", "attention_1"]},
            {"kind": "conv1d", "units": 3, "kernel_size": 3, "dilation": 2},
            {"kind": "lstm", "units": 3},
            {"kind": "simple_rnn", "units": 3},
        ],
        "heads": [OUTPUT],
    },
    "whole": {
        "layers": [
            {"kind": "lstm", "units": 4},
            {"kind": "gru", "units": 3},
            {"kind": "lstm", "units": 4, "starts_from": "lstm_1"},
            {"kind": "gru", "name": "handed", "units": 3, "starts_from": "gru_1"},
            {"kind": "gru", "units": 4, "inputs": ["features"]},
            {"kind": "attention", "over": "chunk", "units": 3},
            {"kind": "dense", "units": 2},
        ],
        "heads": [OUTPUT, {"kind": "sequence", "name": "handed", "input": "handed"}],
        "max_chunk_steps": CHUNK_LIMIT,
    },
}
BLOCKS = parse_spec(
    {
        "name": "tagger",
        "features": FEATURES,
        "layers": [
            {"kind": "bidirectional", "units": 3},
            {"kind": "bidirectional", "cell": "gru", "units": 2, "merge": "ave"},
        ],
        "heads": [{"kind": "sequence", "name": "output"}],
        "blocks": {"size": 4, "lookahead": 3},
    }
)


class NetworkStream:
    """One stream of a network, and what it must answer chunk by chunk."""

    CUTS = (4, 1, 7, 3, 9)
    KILLED_AFTER = (2, 4)
    """Chunks sent before each kill."""

    def __init__(self, artifact: Artifact, seed: int):
        self.artifact = artifact
        self.url = f"/v1/models/{artifact.spec.name}/streams/one"
        random = np.random.default_rng(seed)
        rows = random.normal(size=(sum(self.CUTS), FEATURES)).astype(np.float32)
        self.chunks = np.split(rows, np.cumsum(self.CUTS)[:-1])
        self.starts = [0, *np.cumsum(self.CUTS).tolist()]
        self.expected = []
        state = artifact.state.zero().floats
        for chunk in self.chunks:
            outputs, state = oracle_step(artifact.spec, artifact.weights, chunk, state)
            self.expected.append((outputs, state))

    def scenario(self, client: httpx.Client) -> Iterator[None]:
        replies: list[dict[str, Any]] = []
        for until in self.KILLED_AFTER:
            replies += [self.send(client, number) for number in range(len(replies), until)]
            yield
            del replies[self.check_resumes(client, replies) :]
        for number in range(len(replies), len(self.CUTS)):
            self.send(client, number)

    def send(self, client: httpx.Client, number: int) -> dict[str, Any]:
        """One chunk; the reply and the stored state are the oracle's."""
        body = {"position": self.starts[number], "inputs": self.chunks[number].tolist()}
        reply = client.post(f"{self.url}/chunks", json=body).raise_for_status().json()
        outputs, state = self.expected[number]
        heads = self.artifact.outputs.outputs
        assert reply["outputs"].keys() == {head.name for head in heads}
        column = 0
        for head in heads:
            wanted = outputs[:, column : column + head.size]
            wanted = wanted[-1] if head.per == "chunk" else wanted
            np.testing.assert_allclose(reply["outputs"][head.name], wanted, **CLOSE)
            column += head.size
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


class BlockStream:
    """A stream of a bidirectional network, killed after some of its chunks or when it is final."""

    ROWS: Floats = np.random.default_rng(3).normal(size=(23, FEATURES)).astype(np.float32)
    CUTS = (2, 1, 6, 1, 5, 8)
    PENDING = (1, 3)
    """Indices of chunks: before the end of the first one nothing is emitted, and after the second
    one rows of two blocks are pending."""

    def __init__(self, artifact: Artifact, name: str):
        self.artifact = artifact
        self.url = f"/v1/models/tagger/streams/{name}/chunks"

    def scenario(
        self, client: httpx.Client, killed_after: tuple[int, ...], *, killed_final: bool
    ) -> Iterator[None]:
        outputs: list[Any] = []
        position = 0
        for number, count in enumerate(self.CUTS):
            reply = self.send(client, position, count)
            assert reply["output_position"] == len(outputs)
            outputs += reply["outputs"]["output"]
            if number in killed_after:
                yield
                retry = self.send(client, position, count)
                assert retry == {**reply, "replayed": True}
            position += count
        last = self.send(client, position, 0, final=True)
        if killed_final:
            yield
        assert self.send(client, position, 0, final=True) == {**last, "replayed": True}
        body = {"position": position, "inputs": [[0, 0, 0]]}
        refused = client.post(self.url, json=body)
        assert (refused.status_code, refused.json()["code"]) == (409, "stream_final")
        outputs += last["outputs"]["output"]
        expected = oracle_in_blocks(BLOCKS, self.artifact.weights, self.ROWS)
        np.testing.assert_allclose(outputs, expected, **CLOSE)

    def send(self, client: httpx.Client, start: int, count: int, **more: Any) -> Any:
        body = {"position": start, "inputs": self.ROWS[start : start + count].tolist(), **more}
        return client.post(self.url, json=body).raise_for_status().json()


def network_spec(name: str) -> ModelSpec:
    return parse_spec({"name": name, "features": FEATURES, **NETWORKS[name]})


def test_every_model_continues_after_kills(tmp_path: Path) -> None:
    def write(spec: ModelSpec, seed: int) -> Artifact:
        """A served artifact of random weights."""
        weights = contracting_weights(spec, seed)
        return write_artifact(tmp_path / "models" / spec.name, spec, weights)

    client = httpx.Client(timeout=60)
    stream = partial(BlockStream, write(BLOCKS, 5))
    scenarios = [
        stream("pending").scenario(client, BlockStream.PENDING, killed_final=False),
        stream("final").scenario(client, (), killed_final=True),
    ]
    for seed, name in enumerate(NETWORKS):
        artifact = write(network_spec(name), seed)
        scenarios.append(NetworkStream(artifact, seed).scenario(client))

    with client, running(tmp_path, tmp_path / "models", CARRY_DURABILITY="fsync") as service:
        for kills_store in KILLS:
            client.base_url = service.url
            for scenario in scenarios:
                next(scenario, None)
            valkey = service.valkey_pid()
            service.kill()
            if kills_store:
                os.kill(valkey, signal.SIGKILL)
            service.start(CARRY_DURABILITY="fsync")
            assert service.valkey_pid() != valkey
        client.base_url = service.url
        for scenario in scenarios:
            assert next(scenario, "ended") == "ended"
