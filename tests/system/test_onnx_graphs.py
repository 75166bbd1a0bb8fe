"""Imported ONNX graphs over HTTP, with a kill of service and store between the chunks.

Each graph is served with the others in one process, and its stream is sent in chunks of random
lengths, as JSON and as MessagePack. All replies together are the outputs of the whole sequence, and
the state is the last one: of an example by ONNX Runtime in one call (or step by step, for a graph
of one step), of a variant by NumPy in float64.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from carry_client import Carry
from tests.support.onnx_graphs import EXAMPLE_GRAPHS, Example, import_here
from tests.support.onnx_variants import ENDLESS_STEPS, VARIANTS, F, Variant, write_endless
from tests.support.service import Service, running

STEPS = 40
HALF = {"rtol": 1e-2, "atol": 1e-2}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SEED = 20261127


class CutStream:
    """One stream of one graph, sent as JSON and as MessagePack."""

    def __init__(self, name: str, graph: Example | Variant, random: np.random.Generator):
        self.name, self.graph, self.random = name, graph, random
        self.close = HALF if name == "half" else CLOSE
        self.rows = random.standard_normal((STEPS, graph.features)).astype(np.float32)
        if isinstance(graph, Variant) and graph.integers:
            self.rows = random.integers(0, 4, (STEPS, graph.features)).astype(np.float32)
        self.outputs: list[Any] = []
        self.position = 0

    def send(self, url: str, until: int) -> None:
        """Send the next steps, in chunks of random lengths."""
        with Carry(url, encoding="json") as one, Carry(url) as other:
            streams = [each.model(self.name).stream("one") for each in (one, other)]
            assert streams[0].refresh().position == self.position
            while self.position < until:
                count = int(self.random.integers(1, 8))
                chunk = self.rows[self.position : self.position + count]
                streams[count % 2].refresh()
                reply = streams[count % 2].send(chunk)
                parts = [each.reshape(len(chunk), -1) for each in reply.outputs.values()]
                self.outputs.append(np.concatenate(parts, axis=1))
                self.position += len(chunk)

    def check(self, url: str) -> None:
        """Outputs and state are those of the whole sequence."""
        if isinstance(self.graph, Example):
            outputs, states = self.graph.whole(self.rows)
        else:
            outputs, states = self.graph.reference(self.rows.astype(np.float64))
        np.testing.assert_allclose(np.concatenate(self.outputs), outputs, **self.close)
        with Carry(url) as carry:
            stored = carry.model(self.name).stream("one").state()
        assert stored.head.position == STEPS
        assert set(stored.values) == set(states)
        for name, expected in states.items():
            exact = {"rtol": 1e-12} if self.name == "double" else self.close
            np.testing.assert_allclose(stored.values[name].ravel(), expected.ravel(), **exact)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of all graphs."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, variant in VARIANTS.items():
        path = folder / f"{name}.onnx"
        import_here(path, folder / "models" / name, name, **variant.arguments(path))
    for name, example in EXAMPLE_GRAPHS.items():
        import_here(example.path, folder / "models" / name, name, **example.options)
    with running(folder, folder / "models", CARRY_DURABILITY="fsync") as up:
        yield up


def test_chunks_and_kills_do_not_change_outputs(service: Service) -> None:
    random = np.random.default_rng(SEED)
    every = {**EXAMPLE_GRAPHS, **VARIANTS}
    streams = [CutStream(name, graph, random) for name, graph in every.items()]
    for stream in streams:
        stream.send(service.url, STEPS // 2)
    valkey = service.valkey_pid()
    service.kill()
    os.kill(valkey, signal.SIGKILL)
    service.start(CARRY_DURABILITY="fsync")
    for stream in streams:
        stream.send(service.url, STEPS)
        stream.check(service.url)


def test_a_restored_state_continues_bit_by_bit(service: Service) -> None:
    random = np.random.default_rng(SEED + 1)
    with Carry(service.url) as carry:
        for name, graph in {**EXAMPLE_GRAPHS, **VARIANTS}.items():
            pair = [carry.model(name).stream(each) for each in ("original", "copy")]
            first, second = random.integers(0, 4, (2, 3, graph.features)).astype(np.float32)
            pair[0].send(first)
            pair[1].restore(pair[0].state())
            np.testing.assert_equal(*(stream.send(second).outputs for stream in pair))
            states = [stream.state().values for stream in pair]
            np.testing.assert_equal(*states)
            if name == "double":
                assert {values.dtype for values in states[0].values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("name", ["learned", "started"])
def test_a_reset_returns_to_the_initial_values(service: Service, name: str) -> None:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        url = f"/v1/models/{name}/streams/sessions/chunks"
        rows = [[0.1, 0.2, 0.3]]
        first = client.post(url, json={"inputs": rows}).json()["outputs"]
        client.post(url, json={"inputs": rows}).raise_for_status()
        body = {"inputs": rows, "resets": [0]}
        assert client.post(url, json=body).raise_for_status().json()["outputs"] == first


def test_a_row_that_the_graph_fails_on_fails_alone(service: Service) -> None:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        chunks = [
            {"stream": f"item-{at}", "position": 0, "inputs": [[code]]}
            for at, code in enumerate((1, 99, 2))
        ]
        reply = client.post("/v1/models/codes/chunks", json={"chunks": chunks}).json()
        assert [item["status"] for item in reply["results"]] == [200, 500, 200]
        assert reply["results"][1]["error"]["code"] == "output_not_finite"


def test_triton_requests_continue_a_sequence(service: Service) -> None:
    example = EXAMPLE_GRAPHS["counting-gru"]
    rows = np.random.default_rng(SEED).standard_normal((3, 4)).astype(np.float32)
    outputs = []
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for at, row in enumerate(rows):
            tensor = {"name": "inputs", "shape": [1, 4], "datatype": "FP32", "data": row.tolist()}
            parameters = {"sequence_id": 7, "sequence_start": at == 0, "sequence_end": False}
            body = {"inputs": [tensor], "parameters": parameters}
            reply = client.post("/v2/models/counting-gru/infer", json=body).raise_for_status()
            (output,) = reply.json()["outputs"]
            assert output["name"] == "OUTPUT"
            outputs += output["data"]
    expected, _ = example.whole(rows)
    np.testing.assert_allclose(outputs, expected.ravel(), **CLOSE)


def test_an_endless_call_blocks_no_health_check_deadline_other_model_or_sigterm(
    tmp_path: Path,
) -> None:
    """The graph is endless for one shape, after calls that were short enough to run on the event
    loop."""
    write_endless(tmp_path / "endless.onnx")
    import_here(tmp_path / "endless.onnx", tmp_path / "models/endless", "endless")
    import_here(EXAMPLE_GRAPHS["min-gru"].path, tmp_path / "models/other", "other")
    short, long = ({"inputs": [[0.5] * F] * (ENDLESS_STEPS + more)} for more in (0, 1))
    with (
        running(tmp_path, tmp_path / "models", CARRY_INFERENCE_TIMEOUT_S="1") as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
        ThreadPoolExecutor(1) as thread,
    ):

        def send(body: dict[str, Any], model: str = "endless", **headers: str) -> httpx.Response:
            return client.post(f"/v1/models/{model}/streams/one/chunks", json=body, headers=headers)

        def send_long() -> Future[httpx.Response]:
            """Send the long chunk; returns its reply to come, once it is computed."""
            while True:
                sent = thread.submit(send, long)
                while not sent.done():
                    reply = send(short, **{"Carry-Timeout": "0.1"})
                    if reply.status_code == 504:
                        assert reply.json()["code"] == "deadline_exceeded"
                        return sent

        def is_ended(reply: httpx.Response) -> bool:
            problem = reply.json()
            return (reply.status_code, problem["code"], problem["retryable"]) == (
                *(504, "inference_timeout"),
                True,
            )

        for _ in range(3):
            send(short).raise_for_status()
        first = thread.submit(send, long)
        while not first.done():
            assert service.is_live()
        assert is_ended(first.result())
        assert [line["model"] for line in service.lines("inference_terminated")] == ["endless"]

        second = send_long()
        send({"inputs": [[0.5] * 4]}, "other").raise_for_status()
        assert is_ended(second.result())
        third = send_long()
        assert service.stop() == 0
        assert is_ended(third.result())
