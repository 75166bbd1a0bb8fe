"""Live sockets of the harness's application, and frames for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import ormsgpack
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect

from models.artifact.artifact import Artifact
from service.codec.settings import RequestSettings
from service.pipeline.watching import Watches
from service.server.settings import WebSocketSettings
from service.server.websocket_protocol import WebSocketProtocol
from service.transports.live.handshake import add_live_sockets
from service.transports.live.watching import add_watching
from tests.service.transports.v1.harness import LIMITS, Harness, harness
from tests.service.transports.v1.raw_http import HOST, port_of, serving
from tests.support.servers import RealServer, becomes

ORIGINS = "https://app.example.com"
SOCKETS = WebSocketSettings(pipelining_window=8)


@asynccontextmanager
async def live_application(
    server: RealServer,
    models: Mapping[str, Artifact],
    limits: RequestSettings = LIMITS,
    extend: Callable[[FastAPI], None] = lambda app: None,
    **options: Any,
) -> AsyncIterator[Harness]:
    """An application with live sockets and watching, on a server that is emptied first."""

    def extend_all(app: FastAPI) -> None:
        extend(app)
        api = app.state.api = replace(app.state.api, origins=frozenset([ORIGINS]))
        add_live_sockets(app, SOCKETS)
        store = api.pipeline._store
        app.state.watches = Watches(store, store.outputs, api.recorder)
        add_watching(app, app.state.watches)

    async with harness(server, models, limits=limits, extend=extend_all, **options) as running:
        await running.store.outputs.start()
        try:
            yield running
        finally:
            await running.store.outputs.close()


@dataclass
class Sockets:
    """The application on a port."""

    server: uvicorn.Server

    def url(self, path: str) -> str:
        """The address of a live socket."""
        return f"ws://{HOST}:{port_of(self.server)}/v1/models/{path}"

    @asynccontextmanager
    async def open(
        self, path: str = "probe/streams/s/live", **options: Any
    ) -> AsyncIterator[tuple[ClientConnection, dict[str, Any]]]:
        """A client's socket, and the facts of its hello."""
        async with connect(self.url(path), **{"max_size": None, **options}) as client:
            yield client, orjson.loads(await client.recv())["hello"]

    def served(self) -> list[WebSocketProtocol]:
        """The open live sockets of the server."""
        found: list[object] = list(self.server.server_state.connections)
        return [each for each in found if isinstance(each, WebSocketProtocol)]

    async def ended(self) -> None:
        """Wait until the server has no live socket."""
        await becomes(lambda: not self.served(), "the sockets to be closed")


@asynccontextmanager
async def live(api: Harness) -> AsyncIterator[Sockets]:
    """The harness's application on a port."""
    async with serving(api) as server:
        yield Sockets(server)


def text(inputs: NDArray[np.float32], position: int | None = None, **members: Any) -> str:
    """A frame in JSON."""
    return orjson.dumps(_members(inputs.tolist(), position, members)).decode()


def binary(inputs: NDArray[np.float32], position: int | None = None, **members: Any) -> bytes:
    """A frame in MessagePack."""
    return ormsgpack.packb(_members(inputs.tobytes(), position, members))


def _members(inputs: Any, position: int | None, members: dict[str, Any]) -> dict[str, Any]:
    placed = {} if position is None else {"position": position}
    return {**members, **placed, "inputs": inputs}


async def outcome(client: ClientConnection) -> dict[str, Any]:
    """The next outcome, of either media type."""
    frame = await client.recv()
    read = orjson.loads if isinstance(frame, str) else ormsgpack.unpackb
    document: dict[str, Any] = read(frame)
    return document


async def reply(client: ClientConnection) -> dict[str, Any]:
    """The next outcome, which is a reply."""
    document = await outcome(client)
    assert document["status"] == 200, document
    read: dict[str, Any] = document["reply"]
    return read


async def error(client: ClientConnection, code: str) -> dict[str, Any]:
    """The next outcome, which is an error with that code."""
    document = await outcome(client)
    problem: dict[str, Any] = document["error"]
    assert problem["code"] == code, problem
    assert problem["status"] == document["status"]
    assert problem["request_id"]
    return {**problem, "id": document.get("id")}
