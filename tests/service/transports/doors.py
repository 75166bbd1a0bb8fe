"""Every transport over HTTP in one application, and a chunk to each."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from service.console.page import add_console
from service.server.settings import WebSocketSettings
from service.transports.live.handshake import add_live_sockets
from service.transports.v2.http_routes import add_kserve
from service.transports.v2.inference import Inference
from tests.service.transports.v1.harness import Harness, rows
from tests.service.transports.v2.v2 import binary_body

SOCKETS = WebSocketSettings(pipelining_window=8)


def add_all(app: FastAPI) -> None:
    """Add every transport over HTTP."""
    add_kserve(app, Inference(app.state.api), dict)
    add_live_sockets(app, SOCKETS)
    add_console(app)


async def send_chunk(api: Harness, authorization: str, stream: str, position: int = 0) -> int:
    """Send a well-formed chunk by the HTTP API."""
    body = {"position": position, "inputs": rows(2).tolist()}
    response = await api.chunk(body, stream=stream, headers={"authorization": authorization})
    return response.status_code


async def send_tensor(api: Harness, authorization: str, stream: str, **members: Any) -> int:
    """Send a well-formed chunk by the V2 protocol."""
    parameters = {"sequence_id": stream, "binary_data_output": True}
    body, headers = binary_body(rows(2), parameters, **members)
    response = await api.client.post(
        "/v2/models/probe/infer",
        content=body,
        headers={**headers, "authorization": authorization},
    )
    return response.status_code
