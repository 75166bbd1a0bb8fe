"""Requests and responses as bytes, and servers on loopback sockets for them."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import ormsgpack
import uvicorn

from service.server.connections import Connections
from service.server.http_protocol import HttpProtocol
from service.server.interface import HTTP_STATE
from tests.service.transports.v1.harness import Harness, rows

HOST = "127.0.0.1"
PATH = "/v1/models/probe/streams/{}/chunks"
QUERY = f"POST {PATH.format('s')}?return_state=false HTTP/1.1"
"""The request line of a chunk for the slow path."""

PREDICT = "POST /v1/models/probe/predict HTTP/1.1"
INPUTS = rows(4)


def chunk(position: int | None = 0, **more: Any) -> bytes:
    """A chunk's body in JSON."""
    body = {"inputs": INPUTS.tolist(), **more}
    return orjson.dumps(body if position is None else {"position": position, **body})


def packed(position: int) -> bytes:
    """A chunk's body in MessagePack."""
    return ormsgpack.packb({"position": position, "inputs": INPUTS.tobytes()})


def request(
    body: bytes, *lines: str, stream: str = "s", length: str | None = None, first: str = ""
) -> bytes:
    """The bytes of a request for one chunk."""
    first = first or f"POST {PATH.format(stream)} HTTP/1.1"
    size = f"Content-Length: {len(body)}" if length is None else length
    head = "\r\n".join([line for line in (first, "Host: carry", *lines, size) if line])
    return head.encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def serving(
    api: Harness,
    protocol: type[asyncio.Protocol] = HttpProtocol,
    *,
    fast_path: bool = True,
) -> AsyncIterator[uvicorn.Server]:
    """The harness's application behind a protocol."""
    config = uvicorn.Config(
        api.app, http=protocol, ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, date_header=False, proxy_headers=False,
    )  # fmt: skip
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        server = uvicorn.Server(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        server.lifespan.state |= {HTTP_STATE: api.http_state(fast_path=fast_path)}
        await server.startup(sockets=[listener])
        try:
            yield server
        finally:
            # not by its own shutdown, which sleeps
            for each in server.servers:
                each.close()
            state = server.server_state
            for connection in list(state.connections):
                connection.transport.abort()
            for task in state.tasks:
                task.cancel()
            await asyncio.gather(*state.tasks, return_exceptions=True)


def port_of(server: uvicorn.Server) -> int:
    """The port that a server listens on."""
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def connections_of(server: uvicorn.Server) -> list[HttpProtocol]:
    """The open connections of a server."""
    return [c for c in server.server_state.connections if isinstance(c, HttpProtocol)]


def check(connections: Connections, now_s: float) -> None:
    """Check all connections as at this time."""
    for _ in connections.check(now_s):
        pass


async def converse(port: int, *parts: bytes, answers: int = 1) -> list[bytes]:
    """Send the parts one after another on one connection; the responses in order."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        return [await answer(reader) for _ in range(answers)]
    finally:
        writer.close()
        await writer.wait_closed()


async def answer(reader: asyncio.StreamReader) -> bytes:
    """One complete response."""
    async with asyncio.timeout(60):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        return head + (await reader.readexactly(int(length[1])) if length else b"")
