"""Invalid requests to a running service: the problem names the expected value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.pipelines import make_artifact
from tests.support.servers import real_server
from tests.support.service import running

STREAM = "/v1/models/post-lstm/streams/wrong"
JSON = {"content-type": "application/json"}
SHORT = {"carry-timeout": "0.5"}

WRONG: list[tuple[str, bytes, int, str, str]] = [
    ("malformed", b'{"inputs": [[1]', 400, "malformed_body", "JSON"),
    ("not an object", b"[1]", 422, "invalid_input", "object"),
    ("wrong field", b'{"input": [[1]]}', 422, "invalid_input", "input"),
    ("both kinds", b'{"inputs": [[1]], "events": [{}]}', 422, "invalid_input", "events"),
    ("neither kind", b'{"position": 3}', 422, "invalid_input", "inputs"),
    ("wrong type", b'{"inputs": [["1"]]}', 422, "invalid_input", "inputs[0][0]"),
    ("NaN", b'{"inputs": [[NaN]]}', 422, "invalid_input", "inputs[0]"),
    ("infinity", b'{"inputs": [[1], [-Infinity]]}', 422, "invalid_input", "inputs[1]"),
    ("overflow", b'{"inputs": [[1e39]]}', 422, "invalid_input", "inputs[0]"),
    ("F wrong", b'{"inputs": [[1, 2]]}', 422, "invalid_input", "1"),
    ("ragged", b'{"inputs": [[1], []]}', 422, "invalid_input", "inputs[1]"),
    ("empty", b'{"inputs": []}', 422, "invalid_input", "at least one"),
    (
        "too long",
        b'{"inputs": [' + b",".join([b"[1]"] * 10_001) + b"]}",
        413,
        "chunk_too_long",
        "10000",
    ),
    ("position wrong", b'{"position": -1, "inputs": [[1]]}', 422, "invalid_input", "position"),
    ("position a float", b'{"position": 1.5, "inputs": [[1]]}', 422, "invalid_input", "position"),
    ("epoch wrong", b'{"epoch": "zz", "inputs": [[1]]}', 422, "invalid_input", "epoch"),
    ("events unasked", b'{"events": [{"a": 1}]}', 422, "invalid_input", "inputs"),
    ("ahead", b'{"position": 7, "inputs": [[1]]}', 409, "position_ahead", "2"),
    ("behind", b'{"position": 1, "inputs": [[1]]}', 409, "position_behind", "2"),
]


@pytest.fixture(scope="module")
def standing(service: Any) -> dict[str, Any]:
    """The stream that all of it is sent to, at position 2."""
    with httpx.Client(base_url=service.url) as client:
        body = {"position": 0, "inputs": [[0.1], [0.2]]}
        client.post(f"{STREAM}/chunks", json=body).raise_for_status()
        return _stands(client)


def _stands(client: httpx.Client) -> dict[str, Any]:
    found = client.get(STREAM).raise_for_status().json()
    return {name: found[name] for name in ("epoch", "position", "tag")}


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [case[1:] for case in WRONG],
    ids=[case[0] for case in WRONG],
)
def test_an_invalid_chunk_is_rejected(
    client: httpx.Client, standing: dict[str, Any], body: bytes, status: int, code: str, says: str
) -> None:
    response = client.post(f"{STREAM}/chunks", content=body, headers=JSON)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert says in problem["detail"], problem["detail"]
    assert problem["status"] == status
    assert _stands(client) == standing


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/models/none/streams/a/chunks", 404, "model_not_found"),
        ("POST", "/v1/models/post-lstm/streams/a%20b/chunks", 400, "invalid_name"),
        ("POST", f"/v1/models/post-lstm/streams/{'a' * 257}/chunks", 400, "invalid_name"),
        ("GET", "/v1/models/post-lstm/streams/never-sent", 404, "stream_not_found"),
        ("DELETE", "/v1/models/post-lstm/streams/never-sent", 404, "stream_not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_an_invalid_path_is_rejected(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    body = {"json": {"inputs": [[1]]}} if method == "POST" else {}
    response = client.request(method, path, **body)
    assert (response.status_code, response.json()["code"]) == (status, code), response.text


def test_a_body_over_the_limit_is_rejected(client: httpx.Client, standing: dict[str, Any]) -> None:
    body = b" " * (16 * 2**20 + 1)
    response = client.post(f"{STREAM}/chunks", content=body, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    assert _stands(client) == standing


def test_an_unavailable_redis_is_reported(tmp_path: Path) -> None:
    probe = make_artifact(tmp_path)
    body = {"position": 0, "inputs": np.ones((2, 3)).tolist()}
    path = "/v1/models/probe/streams/a"
    with (
        real_server("valkey") as server,
        running(tmp_path, probe.path, redis_url=server.url, CARRY_STORE_WAIT_S="0.5") as service,
        httpx.Client(base_url=service.url, timeout=30) as client,
    ):
        client.post(f"{path}/chunks", json=body).raise_for_status()
        server.kill()
        for response in (
            client.post(f"{path}/chunks", json={**body, "position": 2}, headers=SHORT),
            client.get(path),
        ):
            problem = response.json()
            assert (response.status_code, problem["code"]) == (503, "store_unavailable"), problem
            assert problem["retryable"]
            assert int(response.headers["retry-after"]) >= 1
        ready = client.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json()["failing"] == ["store"]
        assert client.get("/health/live").status_code == 200
        server.start()
        assert client.get(path).json()["position"] == 2
        again = client.post(f"{path}/chunks", json={**body, "position": 2}).json()
        assert again["position"] == 4
        assert client.get("/health/ready").status_code == 200
