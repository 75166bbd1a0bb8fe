"""V2's fast path answers as the slow path does, and leaves every doubtful request to it.

Each request is sent to two servers of one application, with the fast path and without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from service.transports.v1.fast_path import FastRequest
from service.transports.v2 import http_fast_path
from service.transports.v2.http_body import decode_request
from service.transports.v2.http_fast_path import FastInferPath
from tests.service.engine.batching import patch_admission
from tests.service.transports.v1.harness import EVENT, LATER, Harness, harness
from tests.service.transports.v1.raw_http import (
    HOST,
    answer,
    converse,
    port_of,
    request,
    serving,
)
from tests.service.transports.v1.test_fast_path import steady
from tests.service.transports.v2.conftest import add_v2
from tests.service.transports.v2.v2 import binary_body, json_body
from tests.support.models import random_weights
from tests.support.servers import RealServer

ROWS = np.arange(12, dtype=np.float32).reshape(1, 4, 3) / 7
FIRST = "POST /v2/models/probe/infer HTTP/1.1"
ONE_OUTPUT = "POST /v2/models/single/infer HTTP/1.1"
RESETS = b'{"name":"reset","datatype":"BOOL","shape":[1,4],"data":[false,true,false,false]}'
NO_RESETS = RESETS.replace(b"true", b"false")
SEQUENCE = {"sequence_id": 1000, "binary_data_output": True}
ID = b"1000"


def infer(
    *lines: str,
    first: str = FIRST,
    rows: np.ndarray = ROWS,
    change: Callable[[bytes], bytes] = lambda text: text,
    outputs: Any = (),
    data_bytes: int | None = None,
    **parameters: Any,
) -> bytes:
    """A request with a binary tensor of four rows; `change` edits its JSON, and only the first
    `data_bytes` of the tensor are sent."""
    members = {"outputs": outputs} if outputs else {}
    body, headers = binary_body(rows, SEQUENCE | parameters, **members)
    end = int(headers["inference-header-content-length"])
    text = change(body[:end])
    length = f"Inference-Header-Content-Length: {len(text)}"
    return request(text + body[end:][:data_bytes], length, *lines, first=first)


def infer_json(
    *lines: str,
    first: str = FIRST,
    data: Any = None,
    change: Callable[[bytes], bytes] = lambda text: text,
    outputs: Any = (),
    length: int | None = None,
    **parameters: Any,
) -> bytes:
    """A request with a tensor of four rows in JSON; `change` edits it, and with `length` a header
    says how much longer it is than the body."""
    members = {"outputs": outputs} if outputs else {}
    body = json_body(ROWS, parameters={"sequence_id": 1000} | parameters, **members)
    if data is not None:
        body["inputs"][0]["data"] = data
    text = change(orjson.dumps(body))
    if length is not None:
        lines = (f"Inference-Header-Content-Length: {len(text) + length}", *lines)
    return request(text, *lines, first=first)


def infer_events(
    events: Sequence[Mapping[str, Any]], change: Callable[[bytes], bytes] = lambda text: text
) -> bytes:
    """A request with events in JSON."""
    tensor = {"name": "events", "datatype": "BYTES", "shape": [len(events)]}
    inputs = [{**tensor, "data": [orjson.dumps(event).decode() for event in events]}]
    text = orjson.dumps({"inputs": inputs, "parameters": {"sequence_id": 1000, "position": 0}})
    return request(change(text), first="POST /v2/models/small/infer HTTP/1.1")


FAST: dict[str, bytes] = {
    "created": infer(position=0),
    "started over": infer(sequence_start=True, position=0),
    "appended": infer("Content-Type: application/octet-stream", sequence_end=True),
    "ahead": infer(position=9),
    "other epoch": infer(epoch="0123456789abcdef"),
    "a string as id": infer(sequence_id="a1000"),
    "with a version": infer(first="POST /v2/models/probe/versions/1/infer HTTP/1.1"),
    "own timeouts": infer("Carry-Timeout: 62.5", timeout=60_500_000),
    "own id": infer("X-Request-Id: mine-1"),
    "chosen outputs": infer(
        outputs=[{"name": "steep"}, {"name": "last", "parameters": {"binary_data": False}}]
    ),
    "one of the outputs": infer(outputs=[{"name": "steep"}]),
    "without the leading axis": infer(rows=ROWS[0]),
    "resets": infer(change=lambda text: text.replace(b"}}]", b"}}," + RESETS + b"]", 1)),
    "no resets": infer(change=lambda text: text.replace(b"}}]", b"}}," + NO_RESETS + b"]", 1)),
    "duplicate member": infer(change=lambda text: text.replace(b"{", b'{"id":"a","id":"b",', 1)),
    "long JSON": infer(change=lambda text: text + b" " * 4096),
    "JSON, escaped": infer_json(change=lambda text: text.replace(b'"data"', b'"d\\u0061ta"')),
    "JSON outputs": infer(binary_data_output=False),
    "events": infer_events([EVENT, LATER]),
    "events and JSON around them": infer_events(
        [EVENT, LATER], change=lambda text: text + b" " * 4096
    ),
    "one output in JSON": infer(
        outputs=[{"name": "steep", "parameters": {"binary_data": False}}], position=0
    ),
    "the only output": infer(first=ONE_OUTPUT),
    "the only output in JSON": infer(
        first=ONE_OUTPUT,
        rows=ROWS[0],
        outputs=[{"name": "out", "parameters": {"binary_data": False}}],
    ),
    "JSON": infer_json(position=0),
    "JSON and the only output": infer_json(first=ONE_OUTPUT, position=0),
    "JSON with an id and the only output": infer_json(
        first=ONE_OUTPUT, change=lambda text: text.replace(b"{", b'{"id":"a",', 1)
    ),
    "JSON with an id": infer_json(change=lambda text: text.replace(b"{", b'{"id":"a%b",', 1)),
    "JSON by its length": infer_json("Content-Type: application/json", length=0),
    "nested JSON": infer_json(data=ROWS.tolist(), sequence_start=True),
    "whole numbers in JSON": infer_json(data=[*range(12)]),
    "JSON and binary outputs": infer_json(binary_data_output=True),
    "JSON with chosen outputs": infer_json(
        outputs=[{"name": "steep"}, {"name": "last", "parameters": {"binary_data": True}}]
    ),
    "JSON with one output": infer_json(outputs=[{"name": "out"}]),
    "JSON with spaces": infer_json(change=lambda text: text.replace(b",", b" ,\r\n\t")),
    "JSON ahead": infer_json(position=9),
    "JSON with resets": infer_json(
        change=lambda text: text.replace(b"}]", b"}," + RESETS + b"]", 1)
    ),
}
SLOW: dict[str, bytes] = {
    "stateless": infer(sequence_id=0),
    "dry run": infer(dry_run=True),
    "stateless in JSON": infer_json(sequence_id=0),
    "JSON of less than its header says": infer_json(length=3),
    "JSON of more than its header says": infer_json(length=-3),
    "JSON, not finite": infer_json(data=[*range(11), 1e39]),
    "JSON, too large": infer_json(change=lambda text: text.replace(b"1.0,", b"1e400,", 1)),
    "JSON, too few": infer_json(data=[*range(11)]),
    "JSON, ragged": infer_json(data=[[*range(5)], [*range(7)]]),
    "JSON, a string": infer_json(data=["1", *range(11)]),
    "no event": infer_events([{}]),
    "other parameters of the same name": infer_json(
        change=lambda text: text.replace(b"}}", b'},"parameters":{"sequence_id":"a1000"}}', 1)
    ),
    "JSON, rate of alarms": infer_json(false_alarms_per_day=0.5),
    "no model": infer(first="POST /v2/models/none/infer HTTP/1.1"),
    "other version": infer(first="POST /v2/models/probe/versions/2/infer HTTP/1.1"),
    "a query": infer(first="POST /v2/models/probe/infer?a=1 HTTP/1.1"),
    "HTTP/1.0": infer(first="POST /v2/models/probe/infer HTTP/1.0"),
    "close": infer("Connection: close"),
    "unknown parameter": infer(postion=4),
    "not JSON": infer(change=lambda text: text[:-1] + b"]"),
    "wrong width": infer(rows=ROWS.reshape(1, 6, 2)),
    "not finite": infer(rows=np.full((1, 1, 3), np.nan, np.float32)),
    "too few bytes": infer(data_bytes=36),
    "rate of alarms": infer(false_alarms_per_day=0.5),
    "no timeout": infer("Carry-Timeout: 0"),
    "bad length": infer().replace(b"Inference-Header-Content-Length: ", b"\\0x"),
    "compressed": infer("Content-Encoding: gzip"),
}


@dataclass
class Ports:
    """An application, two servers of it, and the requests that the fast path parsed."""

    api: Harness
    fast: int
    slow: int
    parsed: list[FastRequest] = field(default_factory=list)


@pytest.fixture(scope="session")
def models(
    models: Mapping[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Artifact]:
    """`single` has one output."""
    heads = [{"kind": "dense", "name": "out", "units": 2}]
    layers = [{"kind": "lstm", "units": 4}]
    spec = parse_spec({"name": "single", "features": 3, "layers": layers, "heads": heads})
    folder = tmp_path_factory.mktemp("single") / "single"
    return {**models, "single": write_artifact(folder, spec, random_weights(spec))}


@pytest.fixture
async def ports(
    pipeline_server: RealServer, models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Ports]:
    parsed: list[FastRequest] = []
    parse = FastInferPath.parse

    def watched(path: FastInferPath, data: bytes) -> Any:
        found = parse(path, data)
        if isinstance(found, FastRequest):
            parsed.append(found)
        return found

    monkeypatch.setattr(FastInferPath, "parse", watched)
    async with (
        harness(pipeline_server, models, fast_path=True, extend=add_v2) as api,
        serving(api) as fast,
        serving(api, fast_path=False) as slow,
    ):
        yield Ports(api, port_of(fast), port_of(slow), parsed)


async def test_both_paths_send_the_same_responses(ports: Ports) -> None:
    """Each request has its own stream, one for each path, so that the sequences are new."""
    for number, (name, sent) in enumerate((FAST | SLOW).items()):
        identities = b"%d" % (2000 + number), b"%d" % (3000 + number)
        ports.parsed.clear()
        replies = []
        for port, identity in zip((ports.fast, ports.slow), identities, strict=True):
            [reply] = await converse(port, sent.replace(ID, identity))
            replies.append(steady(reply.replace(identity, ID)))
        assert replies[0] == replies[1], name
        assert len(ports.parsed) == (name in FAST), name
    errors = ports.api.counts.seen
    assert (errors["position_ahead"], errors["epoch_mismatch"]) == (4, 2)


INVALID_REPETITIONS = {
    "not finite": infer(rows=ROWS[:, :1]),
    "other version": infer(),
    "unknown parameter": infer(),
    "stateless": infer(),
    "dry run": infer(),
    "too few bytes": infer(),
    "rate of alarms": infer(),
    "JSON of less than its header says": infer_json(length=0),
    "JSON of more than its header says": infer_json(length=0),
    "JSON, not finite": infer_json(),
    "JSON, too few": infer_json(),
    "JSON, ragged": infer_json(),
    "JSON, a string": infer_json(),
    "JSON, rate of alarms": infer_json(),
}
"""Requests of SLOW, each with a valid one before it."""


async def test_repeated_requests_are_cut_and_get_the_responses_of_the_slow_path(
    ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request follows another one of its shape, of another stream."""
    decoded: list[bytes] = []

    def watched(body: bytes, *arguments: Any) -> Any:
        decoded.append(body)
        return decode_request(body, *arguments)

    monkeypatch.setattr(http_fast_path, "decode_request", watched)
    whole = set()
    for number, (name, first) in enumerate((FAST | INVALID_REPETITIONS).items()):
        sent = FAST.get(name) or SLOW[name]
        await converse(ports.fast, first.replace(ID, b"%d" % (4000 + number)))
        decoded.clear()
        replies = []
        for port, thousands in ((ports.fast, 5000), (ports.slow, 6000)):
            identity = b"%d" % (thousands + number)
            [reply] = await converse(port, sent.replace(ID, identity))
            replies.append(steady(reply.replace(identity, ID)))
        assert replies[0] == replies[1], name
        if decoded:
            whole.add(name)
    assert whole == {
        "duplicate member",
        "resets",
        "long JSON",
        "events",
        "events and JSON around them",
        "JSON with resets",
        "JSON, escaped",
        "JSON, a string",
        "other version",
        "JSON of less than its header says",
    }


async def test_chunk_in_json_has_the_same_digest_on_both_paths(ports: Ports) -> None:
    """What one path applied, the other one replays."""
    values = [0.1, 1, -0.0, 0, 1e-45, 2.5e-3, 16777217, 9007199254740993, 1e-400, -7, 3, 0.3]
    await converse(ports.fast, infer_json(position=0, sequence_id=77))
    for number, (first, second) in enumerate([(ports.fast, ports.slow), (ports.slow, ports.fast)]):
        sent = infer_json(position=0, data=values, sequence_id=8000 + number)
        [applied] = await converse(first, sent)
        [replayed] = await converse(second, sent)
        assert b'"replayed":false,"created":true' in applied
        assert b'"replayed":true' in replayed
        assert replayed.partition(b'"outputs"')[2] == applied.partition(b'"outputs"')[2]
    assert len(ports.parsed) == 3


async def test_repeated_start_starts_its_stream_over(ports: Ports) -> None:
    reader, writer = await asyncio.open_connection(HOST, ports.fast)
    for starts, position in ((False, 4), (False, 8), (True, 4), (True, 4), (False, 8)):
        writer.write(infer(sequence_start=starts))
        assert b'"position":%d,' % position in await answer(reader)
    writer.close()
    await writer.wait_closed()


async def test_overload_responses_are_those_of_the_slow_path(
    ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast path decodes nothing for them, even of a request of a new shape."""
    decoded: list[bytes] = []
    monkeypatch.setattr(http_fast_path, "decode_request", decoded.append)
    patch_admission(monkeypatch)
    [slow] = await converse(ports.slow, infer())
    [fast] = await converse(ports.fast, infer())
    assert not decoded
    assert slow.startswith(b"HTTP/1.1 429 ")
    assert b"carry-error: overloaded\r\n" in slow
    assert steady(fast) == steady(slow)
    assert ports.api.counts.seen["overloaded"] == 2


async def test_requests_of_both_protocols_share_a_connection_and_a_stream(ports: Ports) -> None:
    chunk = request(orjson.dumps({"inputs": ROWS[0].tolist()}), stream="1000")
    probe = request(b"", first="GET /v2/health/live HTTP/1.1", length="")
    reader, writer = await asyncio.open_connection(HOST, ports.fast)
    for sent, expected in (
        (infer(position=0), b'"position":4'),
        (chunk, b'"position":8'),
        (probe, b'"live":true'),
        (infer(position=8), b'"position":12'),
    ):
        writer.write(sent)
        assert expected in await answer(reader)
    writer.close()
    await writer.wait_closed()
    assert len(ports.parsed) == 2
