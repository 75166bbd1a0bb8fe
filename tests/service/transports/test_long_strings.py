"""A long string in any place of a body costs little more than the body, and no reply repeats it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from models.artifact.artifact import load_artifact
from service.codec.settings import RequestSettings
from tests.service.transports.doors import add_all
from tests.service.transports.v1.harness import Harness, harness
from tests.support.models import PRETRAINED
from tests.support.responsiveness import Memory
from tests.support.servers import RealServer

LONG = "x" * 1_500_000
MOST_MEMORY, MOST_REPLY = 40 * 2**20, 10_000
FLIGHTS = load_artifact(PRETRAINED / "flights")
ROW = [0.0] * FLIGHTS.spec.input_features
STATE = {
    name: values.tolist() for name, values in FLIGHTS.state.by_name(FLIGHTS.state.zero()).items()
}
TENSOR = {"name": "inputs", "datatype": "FP32", "shape": [1, 1, len(ROW)], "data": ROW}
OF_STREAM = {"position": 0, "epoch": "0" * 16}
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/models/flights/streams/s/chunks": {
        "inputs": [ROW],
        "resets": [0],
        "false_alarms_per_day": 1.0,
        **OF_STREAM,
        "final": False,
        "dry_run": False,
    },
    "POST /v1/models/flights/chunks": {
        "chunks": [{"stream": "a", "inputs": [ROW], "if_match": "*", **OF_STREAM}]
    },
    "POST /v1/models/flights/predict": {"sequences": [{"inputs": [ROW], "state_token": "abc"}]},
    "POST /v1/models/flights/streams/s/fork": {"to": "b"},
    "PUT /v1/models/flights/streams/s/state": {
        "fingerprint": FLIGHTS.fingerprint.hex(),
        "feed": "inputs",
        "position": 0,
        "state": STATE,
    },
    "POST /v2/models/flights/infer": {
        "id": "i",
        "inputs": [{**TENSOR, "parameters": {"p": 1}}],
        "outputs": [{"name": "out", "parameters": {"binary_data": False}}],
        "parameters": {"sequence_id": "s", "sequence_start": True, **OF_STREAM},
    },
    "POST /v2/repository/index": {"ready": True},
}


@pytest.fixture
async def api(pipeline_server: RealServer) -> AsyncIterator[Harness]:
    """An application without keys, under the default limits."""
    async with harness(
        pipeline_server, {"flights": FLIGHTS}, limits=RequestSettings(), extend=add_all
    ) as running:
        yield running


def with_long_strings(body: Any) -> Iterator[Any]:
    """The body with a long string for each of its values and names, alone and in a list; of a
    list, for the first element."""
    for at in list(body) if isinstance(body, dict) else range(min(1, len(body))):
        for value in (LONG, [LONG], {LONG: 1}):
            yield replaced(body, at, value)
        if isinstance(body, dict):
            yield {LONG if name == at else name: value for name, value in body.items()}
        if isinstance(body[at], dict | list):
            yield from (replaced(body, at, inner) for inner in with_long_strings(body[at]))


def replaced(body: Any, at: Any, value: Any) -> Any:
    changed = body.copy()
    changed[at] = value
    return changed


@pytest.mark.parametrize("route", BODIES)
async def test_long_strings_are_neither_multiplied_nor_repeated(api: Harness, route: str) -> None:
    method, path = route.split()
    await api.client.request(method, path, json=BODIES[route])
    for body in with_long_strings(BODIES[route]):
        memory = Memory(os.getpid())
        reply = await api.client.request(method, path, json=body)
        assert memory.growth < MOST_MEMORY, reply.text[:300]
        assert len(reply.content) < MOST_REPLY
        assert reply.status_code < 500, reply.text
