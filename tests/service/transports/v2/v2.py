"""Requests of the V2 protocol over HTTP, and their replies as values."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray

from tests.service.transports.v1.harness import Harness

HEADER = "inference-header-content-length"


class V2Reply(NamedTuple):
    """A reply: its outputs as arrays, its parameters, and its whole JSON."""

    outputs: dict[str, NDArray[np.float32]]
    parameters: dict[str, Any]
    document: dict[str, Any]


@dataclass
class V2:
    """An application and requests to it."""

    api: Harness

    async def post(
        self, body: Any, headers: Any = None, *, model: str = "probe", version: str = ""
    ) -> httpx.Response:
        """Post a body to a model: bytes as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        in_version = f"/versions/{version}" if version else ""
        address = f"/v2/models/{model}{in_version}/infer"
        return await self.api.client.post(address, content=content, headers=headers)

    async def infer(
        self, rows: NDArray[np.float32], *, binary: bool = False, **parameters: Any
    ) -> V2Reply:
        """The reply to rows for the probe model."""
        if binary:
            parameters["binary_data_output"] = True
        body, headers = binary_body(rows, parameters) if binary else (json_body(rows), {})
        if not binary:
            body["parameters"] = parameters
        return reply_of(await self.post(body, headers))


def json_body(rows: NDArray[np.float32], **members: Any) -> dict[str, Any]:
    """A request with rows in JSON."""
    tensor = {"name": "inputs", "datatype": "FP32", "shape": list(rows.shape)}
    return {"inputs": [{**tensor, "data": rows.ravel().tolist()}], **members}


def binary_body(
    rows: NDArray[np.float32], parameters: dict[str, Any], **members: Any
) -> tuple[bytes, dict[str, str]]:
    """A request with rows in the binary format: its body and its headers."""
    data = rows.astype("<f4").tobytes()
    tensor = {
        "name": "inputs",
        "datatype": "FP32",
        "shape": list(rows.shape),
        "parameters": {"binary_data_size": len(data)},
    }
    text = orjson.dumps({"inputs": [tensor], "parameters": parameters, **members})
    return text + data, {HEADER: str(len(text))}


def binary_texts(*texts: bytes) -> bytes:
    """Elements of a BYTES tensor in the binary format."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def reply_of(response: httpx.Response) -> V2Reply:
    """The reply in a response of status 200."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEADER)
    text = response.content if length is None else response.content[: int(length)]
    rest = b"" if length is None else response.content[int(length) :]
    document = orjson.loads(text)
    outputs: dict[str, NDArray[np.float32]] = {}
    for output in document["outputs"]:
        assert output["datatype"] == "FP32"
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.array(output["data"], np.float32)
        else:
            assert "data" not in output
            values, rest = np.frombuffer(rest[:size], "<f4"), rest[size:]
        outputs[output["name"]] = values.reshape(output["shape"])
    assert not rest
    return V2Reply(outputs, document.get("parameters", {}), document)


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error in a response, checked to be in V2's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["carry-error"] == code
    document: dict[str, Any] = response.json()
    assert document["error"] == f"{code}: {document['detail']}"
    assert document["code"] == code
    return document
