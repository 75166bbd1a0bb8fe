"""V2's fast path answers as the slow path does, and leaves every doubtful request to it.

Each request is sent to two servers of one application, with the fast path and without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact
from service.transports.v1.fast_path import FastRequest
from service.transports.v2.http_fast_path import FastInferPath
from tests.service.engine.batching import patch_admission
from tests.service.transports.v1.harness import Harness, harness
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
from tests.support.servers import RealServer

ROWS = np.arange(12, dtype=np.float32).reshape(1, 4, 3) / 7
FIRST = "POST /v2/models/probe/infer HTTP/1.1"
SEQUENCE = {"sequence_id": 1000, "binary_data_output": True}
ID = b"1000"


def infer(
    *lines: str,
    first: str = FIRST,
    rows: np.ndarray = ROWS,
    change: Callable[[bytes], bytes] = lambda text: text,
    outputs: Any = (),
    **parameters: Any,
) -> bytes:
    """A request with a binary tensor of four rows; `change` edits its JSON."""
    members = {"outputs": outputs} if outputs else {}
    body, headers = binary_body(rows, SEQUENCE | parameters, **members)
    end = int(headers["inference-header-content-length"])
    text = change(body[:end])
    length = f"Inference-Header-Content-Length: {len(text)}"
    return request(text + body[end:], length, *lines, first=first)


FAST: dict[str, bytes] = {
    "created": infer(position=0),
    "started over": infer(sequence_start=True, position=0),
    "appended": infer("Content-Type: application/octet-stream", sequence_end=True),
    "ahead": infer(position=9),
    "other epoch": infer(epoch="0123456789abcdef"),
    "a string as id": infer(sequence_id="a1000"),
    "with a version": infer(first="POST /v2/models/probe/versions/1/infer HTTP/1.1"),
    "own timeouts": infer("Carry-Timeout: 2.5", timeout=500_000),
    "own id": infer("X-Request-Id: mine-1"),
    "chosen outputs": infer(
        outputs=[{"name": "steep"}, {"name": "last", "parameters": {"binary_data": False}}]
    ),
    "one of the outputs": infer(outputs=[{"name": "steep"}]),
    "without the leading axis": infer(rows=ROWS[0]),
    "long JSON": infer(change=lambda text: text + b" " * 4096),
    "duplicate member": infer(change=lambda text: text.replace(b"{", b'{"id":"a","id":"b",', 1)),
}
SLOW: dict[str, bytes] = {
    "stateless": infer(sequence_id=0),
    "JSON outputs": infer(binary_data_output=False),
    "JSON input": request(orjson.dumps(json_body(ROWS, parameters=SEQUENCE)), first=FIRST),
    "no model": infer(first="POST /v2/models/none/infer HTTP/1.1"),
    "other version": infer(first="POST /v2/models/probe/versions/2/infer HTTP/1.1"),
    "a query": infer(first="POST /v2/models/probe/infer?a=1 HTTP/1.1"),
    "HTTP/1.0": infer(first="POST /v2/models/probe/infer HTTP/1.0"),
    "close": infer("Connection: close"),
    "unknown parameter": infer(postion=4),
    "not JSON": infer(change=lambda text: text[:-1] + b"]"),
    "wrong width": infer(rows=ROWS.reshape(1, 6, 2)),
    "not finite": infer(rows=np.full((1, 1, 3), np.nan, np.float32)),
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
    assert errors["position_ahead"] == errors["epoch_mismatch"] == 2


async def test_overload_responses_are_those_of_the_slow_path(
    ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_admission(monkeypatch)
    [slow] = await converse(ports.slow, infer())
    [fast] = await converse(ports.fast, infer())
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
