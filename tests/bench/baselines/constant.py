"""The bound of section `peer`: a server of the V2 protocol that answers requests with a constant.

    taskset -c 0 python -m tests.bench.baselines.constant 8391
    make bench ARGS="--only peer --peer 127.0.0.1:8391 --peer-model constant"

It uses the event loop and transports of the service, and writes a reply of the same size, but reads
only the length and the id of a request, computes nothing and has no store. So no server reaches
more with this client.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from functools import lru_cache
from typing import Any

import uvloop

from tests.bench.workloads import FEATURES, STEPS

MODEL, OUTPUTS = "constant", 8
_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
_ID = re.compile(rb'"id": ?"([^"]+)"')
_INPUT, _OUTPUT = {"name": "inputs", "dims": [-1, FEATURES]}, {"name": "y", "dims": [-1, OUTPUTS]}
_METADATA = {
    "name": MODEL,
    "versions": ["1"],
    "platform": "",
    "inputs": [{"name": "inputs", "datatype": "FP32", "shape": [-1, -1, FEATURES]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, -1, OUTPUTS]}],
}
_CONFIG = {
    "name": MODEL,
    "max_batch_size": 64,
    "input": [{**_INPUT, "data_type": "TYPE_FP32"}],
    "output": [{**_OUTPUT, "data_type": "TYPE_FP32"}],
    "sequence_batching": {"oldest": {}},
}


_OUTPUT_OF_REPLY = {
    "name": "y",
    "datatype": "FP32",
    "shape": [1, STEPS, OUTPUTS],
    "parameters": {"binary_data_size": 4 * STEPS * OUTPUTS},
}


def _write_response(document: Any, tensor: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    lines = [b"HTTP/1.1 200 OK", b"content-length: %d" % len(text + tensor)]
    if tensor:
        lines.append(b"inference-header-content-length: %d" % len(text))
    return b"\r\n".join([*lines, b"", text + tensor])


@lru_cache
def _write_reply(id_characters: int) -> tuple[bytes, bytes]:
    """A reply up to its id, which the client expects to be repeated, and what follows it."""
    parameters = {"position": 1000, "epoch": "0" * 16, "tag": "0" * 32, "replayed": False}
    model = {"model_name": MODEL, "model_version": "1", "id": "?" * id_characters}
    document = {**model, "parameters": parameters, "outputs": [_OUTPUT_OF_REPLY]}
    response = _write_response(document, bytes(4 * STEPS * OUTPUTS))
    lead, _, rest = response.partition(b"?" * id_characters)
    return lead, rest


class ConstantProtocol(asyncio.Protocol):
    """One connection."""

    answered = 0

    def connection_made(self, transport: Any) -> None:
        self._transport, self._received = transport, b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n") + 4) >= 4:
            length = _LENGTH.search(self._received, 0, end)
            end += int(length[1]) if length else 0
            if len(self._received) < end:
                return
            request, self._received = self._received[:end], self._received[end:]
            self._transport.write(self._answer(request))

    def _answer(self, request: bytes) -> bytes:
        if request.startswith(b"POST"):
            ConstantProtocol.answered += 1
            [request_id] = _ID.findall(request)
            lead, rest = _write_reply(len(request_id))
            return lead + request_id + rest
        path = request.split(b" ", 2)[1]
        if path.endswith(b"/config"):
            return _write_response(_CONFIG)
        if path.endswith(b"/stats"):
            counts = {"success": {"count": ConstantProtocol.answered, "ns": 0}}
            return _write_response({"model_stats": [{"name": MODEL, "inference_stats": counts}]})
        if path == b"/v2":
            return _write_response({"name": MODEL, "version": "1", "extensions": []})
        return _write_response(_METADATA)


async def serve(port: int) -> None:
    """Serve on a port of loopback until the process ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(ConstantProtocol, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
