"""A bidirectional network on streams: service and store are killed while rows are pending."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.artifact.artifact import write_artifact
from models.spec.model import parse_spec
from service.engine.runtimes.loading import RUNTIMES
from tests.support.oracle import contracting_weights, oracle_in_blocks
from tests.support.service import running, runtime_environment

SPEC = parse_spec(
    {
        "name": "tagger",
        "features": 3,
        "layers": [
            {"kind": "bidirectional", "units": 3},
            {"kind": "bidirectional", "cell": "gru", "units": 2, "merge": "ave"},
        ],
        "heads": [{"kind": "sequence", "name": "output"}],
        "blocks": {"size": 4, "lookahead": 3},
    }
)
ROWS = np.random.default_rng(3).normal(size=(23, 3)).astype(np.float32)
CUTS = [2, 1, 6, 1, 5, 8]
"""Before the first kill nothing was emitted; before the second, rows of two blocks are pending."""
KILLS = {1: False, 3: True}
"""Index of a chunk after which the service is killed: whether the store is killed too."""
URL = "/v1/models/tagger/streams/one"


def send(client: httpx.Client, start: int, count: int, **more: Any) -> Any:
    body = {"position": start, "inputs": ROWS[start : start + count].tolist(), **more}
    return client.post(f"{URL}/chunks", json=body).raise_for_status().json()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_pending_rows_survive_kills(tmp_path: Path, runtime: str) -> None:
    weights = contracting_weights(SPEC, 5)
    artifact = write_artifact(tmp_path / "models" / "tagger", SPEC, weights)
    outputs: list[Any] = []
    position = 0
    environment = runtime_environment(runtime, tmp_path)
    with running(tmp_path, artifact.path, **environment) as service:
        for number, count in enumerate(CUTS):
            with httpx.Client(base_url=service.url, timeout=60) as client:
                reply = send(client, position, count)
                assert reply["output_position"] == len(outputs)
                outputs += reply["outputs"]["output"]
            if number in KILLS:
                valkey = service.valkey_pid()
                service.kill()
                if KILLS[number]:
                    os.kill(valkey, signal.SIGKILL)
                service.start(**environment)
                with httpx.Client(base_url=service.url, timeout=60) as client:
                    retry = send(client, position, count)
                    assert retry == {**reply, "replayed": True}
            position += count
        with httpx.Client(base_url=service.url, timeout=60) as client:
            last = send(client, position, 0, final=True)
        service.kill()
        service.start(**environment)
        with httpx.Client(base_url=service.url, timeout=60) as client:
            assert send(client, position, 0, final=True) == {**last, "replayed": True}
            body = {"position": position, "inputs": [[0, 0, 0]]}
            refused = client.post(f"{URL}/chunks", json=body)
            assert (refused.status_code, refused.json()["code"]) == (409, "stream_final")
    outputs += last["outputs"]["output"]
    expected = oracle_in_blocks(SPEC, weights, ROWS)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
