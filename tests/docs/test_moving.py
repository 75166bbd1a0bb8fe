"""Guides to moving from another server: states, repeated and concurrent requests."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http

from carry_client import Carry
from models.onnx.library import onnxruntime
from tests.support.needs import needs_tools
from tests.support.pages import DEFAULT_URL, ROOT, blocks
from tests.support.servers import RealServer, real_server
from tests.support.service import Service, running

EXAMPLES = ROOT / "examples" / "onnx"
DEFAULT_ADDRESS = DEFAULT_URL.removeprefix("http://")
STORE_URL = "redis://localhost:6379"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SEED = 20261130
RACING = 8


@pytest.fixture
def store() -> Iterator[RealServer]:
    with real_server("valkey") as server:
        yield server


class Page:
    """One page: its blocks, by language, with the addresses of the test's servers."""

    def __init__(self, path: str, folder: Path, store_url: str):
        self.folder, self.addresses = folder, {STORE_URL: store_url}
        self._blocks = blocks(path)

    def block(self, language: str, index: int) -> str:
        """A block, with the addresses of the test's servers."""
        text = [text for each, text in self._blocks if each == language][index]
        for written, used in self.addresses.items():
            text = text.replace(written, used)
        return text

    def run(self, *command: str) -> str:
        """Run a command in the folder, and return what it prints."""
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "PATH": programs},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def shell(self, index: int) -> str:
        """Run a block of the shell."""
        return self.run("sh", "-euc", self.block("sh", index))

    def python(self, index: int) -> str:
        """Run a block of Python."""
        return self.run(sys.executable, "-c", self.block("python", index))

    def options(self, index: int) -> tuple[Path, list[str]]:
        """The models and further options of a block that is `carry serve`."""
        carry, serve, models, folder, *others = shlex.split(self.block("sh", index))
        assert [carry, serve, models] == ["carry", "serve", "--models"]
        return self.folder / folder, others


def address_of(service: Service) -> str:
    """Host and port of a service."""
    return service.url.removeprefix("http://")


@needs_tools("sh", "curl")
def test_pickled_states_of_a_fastapi_service_continue(
    tmp_path: Path, store: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page("docs/how-to/move-from-fastapi.md", tmp_path, store.url)
    (tmp_path / "lstm.onnx").write_bytes((EXAMPLES / "torch_lstm.onnx").read_bytes())
    page.shell(1)
    monkeypatch.chdir(tmp_path)
    app: dict[str, Any] = {"__name__": "app"}
    exec(compile(page.block("python", 0), "app.py", "exec"), app)
    predict = app["predict"]
    events = np.random.default_rng(SEED).uniform(-1, 1, (3, 9, 4)).round(3).tolist()
    users = dict(zip(("ann", "bob@example.org", "user:7"), events, strict=True))
    for user, rows in users.items():
        predict(user, rows[:3])
    models, options = page.options(2)
    with running(tmp_path, models, *options) as service, Carry(service.url) as carry:
        page.addresses[DEFAULT_ADDRESS], model = address_of(service), carry.model("lstm")
        (tmp_path / "move.py").write_text(page.block("python", 2), encoding="utf-8")
        assert page.shell(3) == "moved 3, kept 0\n"
        position, outputs = page.python(3).split(" ", 1)
        chunk = [[0.5, -1.0, 0.25, 2.0], [1.0, 0.0, -0.5, 0.75]]
        assert position == "5"
        np.testing.assert_allclose(json.loads(outputs), predict("ann", chunk), **CLOSE)
        for user in ("bob@example.org", "user:7"):
            reply = model.stream(user).send(np.array(users[user][3:]))
            whole = predict(f"{user}:whole", users[user])
            assert reply.position == 9
            np.testing.assert_allclose(reply.outputs["y"], whole[3:], **CLOSE)
        assert page.shell(3) == "moved 2, kept 3\n"

        first, second = json.loads(page.shell(4)), json.loads(page.shell(4))
        assert (first["position"], first["replayed"], second["replayed"]) == (6, False, True)
        assert first["outputs"] == second["outputs"]
        once, twice = (predict("ann", [[0.25, 0.5, 0.0, -1.0]]) for _ in range(2))
        np.testing.assert_allclose(first["outputs"]["y"], once, **CLOSE)
        assert once != twice

        chunks = f"{service.url}/v1/models/lstm/streams/ann/chunks"
        body = {"inputs": chunk[:1]}
        with httpx.Client(timeout=60) as client, ThreadPoolExecutor(RACING) as pool:
            sent = [pool.submit(client.post, chunks, json=body) for _ in range(RACING)]
        assert {each.result().status_code for each in sent} == {200}
        assert model.stream("ann").refresh().position == 6 + RACING


class CountingGru:
    """The graph of the example, whose states a caller carries as Triton does."""

    def __init__(self) -> None:
        path = EXAMPLES / "triton" / "counting_gru"
        self._session = onnxruntime.InferenceSession(path / "1" / "model.onnx")
        memory = np.fromfile(path / "initial_state" / "memory.bin", "<f4")
        self.states = [memory[None], np.zeros((1, 1), np.int64)]

    def step(self, row: Any) -> float:
        """The output of the next event."""
        feed = dict(zip(("STATE", "SEEN"), self.states, strict=True))
        feed["INPUT"] = np.array([row], np.float32)
        output, *self.states = self._session.run(["OUTPUT", "MEMORY", "COUNT"], feed)
        return float(output.item())


@needs_tools("sh")
def test_sequences_of_triton_continue(tmp_path: Path, store: RealServer) -> None:
    page = Page("docs/how-to/move-from-triton.md", tmp_path, store.url)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert page.block("text", 0) in page.shell(0)
    gru, events = CountingGru(), np.random.default_rng(SEED).uniform(-1, 1, (6, 4))
    models, options = page.options(1)
    with running(tmp_path, models, *options) as service:
        page.addresses[DEFAULT_ADDRESS] = address_of(service)
        outputs = list(map(float, page.python(0).split()))
        rows = [[0.5, -1.0, 0.25, 2.0], [1.0, 0.0, -0.5, 0.75], [0.25, 0.5, 0.0, -1.0]]
        np.testing.assert_allclose(outputs, [gru.step(row) for row in rows], **CLOSE)
        triton = list(map(float, page.block("text", 1).split()))
        np.testing.assert_allclose(outputs, triton, **CLOSE)

        service.kill()
        service.start()
        page.addresses[DEFAULT_ADDRESS] = address_of(service)
        memory, count = gru.states
        scope: dict[str, Any] = {}
        exec(page.block("python", 1), scope)
        scope["restore"](43, 3, memory, count)
        expected = [gru.step(row) for row in events]
        for sequence in (42, 43):
            for position in (3, 3, *range(4, 9)):
                output, replayed = infer(service, sequence, position, events[position - 3])
                np.testing.assert_allclose(output, expected[position - 3], **CLOSE)
            assert not replayed


def infer(service: Service, sequence: int, position: int, row: Any) -> tuple[float, bool]:
    """Send one event of a sequence as the page's client does."""
    address = address_of(service)
    with tritonclient.http.InferenceServerClient(address, network_timeout=60) as client:
        tensor = tritonclient.http.InferInput("inputs", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.array([row], np.float32))
        parameters = {"position": position}
        result = client.infer("counting-gru", [tensor], sequence_id=sequence, parameters=parameters)
        return result.as_numpy("OUTPUT").item(), result.get_response()["parameters"]["replayed"]
