"""A receiver of webhooks on a port of its own, whose answers a test decides."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple


class Request(NamedTuple):
    """A request that arrived.

    Attributes:
        head: the request line.
        headers: by their names in lower case.
    """

    head: str
    headers: dict[str, str]
    body: bytes

    @property
    def outputs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.body)["data"]
        return found

    @property
    def topic(self) -> str:
        return str(json.loads(self.body)["topic"])


Answer = bytes | None
"""The bytes of a reply; garbage or `connection: close` ends the connection. None: no reply ever."""


def reply(status: int = 204, body: bytes = b"", **headers: str) -> bytes:
    """A reply of HTTP/1.1."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"HTTP/1.1 {status} Text", *lines, f"content-length: {len(body)}"])
    return head.encode() + b"\r\n\r\n" + body


class Receiver:
    """A receiver in the event loop of the test.

    Attributes:
        requests: what arrived, in order.
        accepted: the requests that were answered by a status of success.
        before: awaited before each reply is decided.
        in_progress, most_in_progress: requests that await this now, and at most so far.
        answer: decides the reply to a request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.accepted: list[Request] = []
        self.answer: Callable[[Request], Answer] = lambda _: reply()
        self.before: Callable[[], Awaitable[Any]] = partial(asyncio.sleep, 0)
        self.in_progress = self.most_in_progress = 0
        self._connections: set[asyncio.Task[None]] = set()

    def outputs(self, *, unique: bool = False) -> dict[str, list[tuple[int, dict[str, Any]]]]:
        """The positions and outputs of each stream, in the order of their arrival.

        Args:
            unique: without those whose stream, epoch and position arrived before.
        """
        found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        seen = set()
        for request in self.accepted:
            for each in request.outputs:
                key = (each["stream"], each["epoch"], each["position"])
                if not unique or key not in seen:
                    found.setdefault(each["stream"], []).append((each["position"], each["outputs"]))
                seen.add(key)
        return found

    def count(self) -> int:
        """How many different outputs were accepted."""
        return sum(map(len, self.outputs(unique=True).values()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.rstrip().split("\r\n")
                pairs = (line.split(": ", 1) for line in lines)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                request = Request(first, headers, body)
                self.requests.append(request)
                self.in_progress += 1
                self.most_in_progress = max(self.most_in_progress, self.in_progress)
                try:
                    await self.before()
                finally:
                    self.in_progress -= 1
                answer = self.answer(request)
                if answer is None:
                    await reader.read()
                    return
                if answer.startswith(b"HTTP/1.1 2"):
                    self.accepted.append(request)
                writer.write(answer)
                if not answer.startswith(b"HTTP/1.1 ") or b"connection: close" in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _track(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._connections.discard(task)


@asynccontextmanager
async def receiving(context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver on a free port of 127.0.0.1; with a context, by TLS."""
    receiver = Receiver()
    server = await asyncio.start_server(receiver._track, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    receiver.url = f"{'https' if context else 'http'}://127.0.0.1:{port}/outputs"
    try:
        yield receiver
    finally:
        server.close()
        connections = [*receiver._connections]
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
