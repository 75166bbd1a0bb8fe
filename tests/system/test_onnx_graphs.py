"""Imported ONNX graphs over HTTP, with a kill of service and store between the chunks.

Each example graph is served with the others in one process, its stream is sent in chunks of random
lengths, as JSON and as MessagePack. All replies together are what ONNX Runtime gives for the whole
sequence in one call (or step by step, for a graph of one step), and so is the state.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import ormsgpack
import pytest

from tests.support.onnx_graphs import EXAMPLE_GRAPHS, Example, import_here
from tests.support.service import Service, running

STEPS = 40
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SEED = 20261127


class Stream:
    """One stream of one example."""

    def __init__(self, name: str, example: Example, random: np.random.Generator):
        self.name, self.example = name, example
        self.url = f"/v1/models/{name}/streams/one"
        self.rows = random.standard_normal((STEPS, example.features)).astype(np.float32)
        self.outputs: list[Any] = []
        self.position = 0

    def send(self, client: httpx.Client, length: int) -> dict[str, Any]:
        """Send the next steps."""
        chunk = self.rows[self.position : self.position + length]
        body = {"position": self.position, "inputs": chunk.tolist()}
        if length % 2:
            reply = client.post(f"{self.url}/chunks", json=body).raise_for_status().json()
        else:
            kind = {"content-type": "application/msgpack", "accept": "application/msgpack"}
            answer = client.post(
                f"{self.url}/chunks",
                content=ormsgpack.packb({**body, "inputs": chunk.tobytes()}),
                headers=kind,
            )
            assert answer.is_success, ormsgpack.unpackb(answer.content)
            reply = ormsgpack.unpackb(answer.raise_for_status().content)
        (outputs,) = reply["outputs"].values()
        self.outputs.append(np.asarray(outputs).reshape(len(chunk), -1))
        self.position += len(chunk)
        return {**reply, "body": body}

    def check(self, client: httpx.Client) -> None:
        """Outputs and state are those of the whole sequence."""
        outputs, states = self.example.whole(self.rows)
        np.testing.assert_allclose(np.concatenate(self.outputs), outputs, **CLOSE)
        stored = client.get(f"{self.url}/state").raise_for_status().json()
        assert stored["position"] == STEPS
        assert set(stored["state"]) == set(states)
        for name, expected in states.items():
            actual = np.asarray(stored["state"][name]).ravel()
            np.testing.assert_allclose(actual, expected.ravel(), **CLOSE)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of all examples."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, example in EXAMPLE_GRAPHS.items():
        import_here(example.path, folder / "models" / name, name, **example.options)
    with running(folder, folder / "models") as up:
        yield up


def test_chunks_and_kills_give_what_the_whole_sequence_gives(service: Service) -> None:
    random = np.random.default_rng(SEED)
    streams = [Stream(name, example, random) for name, example in EXAMPLE_GRAPHS.items()]
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for stream in streams:
            while stream.position < STEPS // 2:
                last = stream.send(client, int(random.integers(1, 8)))
            again = client.post(f"{stream.url}/chunks", json=last["body"]).json()
            assert again["replayed"]
    valkey = service.valkey_pid()
    service.kill()
    os.kill(valkey, signal.SIGKILL)
    service.start()
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for stream in streams:
            assert client.get(stream.url).json()["position"] == stream.position
            while stream.position < STEPS:
                stream.send(client, int(random.integers(1, 8)))
            stream.check(client)
