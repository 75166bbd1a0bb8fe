"""One keep-alive connection of a client: a request, its reply, and nothing tried twice."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson
import ormsgpack

from tests.faults.network import MODEL, Rows

_HOST: Final = "127.0.0.1"
_LARGEST_BYTES: Final = 1 << 24
JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"


class NoReply(Exception):
    """The connection failed, broke, or was silent for too long; the request may be applied."""


class Line:
    """A connection to one worker, opened when it is needed and dropped on any failure."""

    def __init__(self, port: int):
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(
        self,
        method: str,
        stream: str,
        *,
        body: bytes = b"",
        media: str = JSON,
        etag: str | None = None,
        deadline_s: float | None = None,
        timeout_s: float,
    ) -> tuple[int, Any]:
        """A request about a stream: the status, and the document of the reply.

        Args:
            deadline_s: how long the service may take, as Carry-Timeout tells it.
            timeout_s: how long the reply is waited for.

        Raises:
            NoReply
        """
        ending = "/chunks" if method == "POST" else ""
        head = f"{method} /v1/models/{MODEL}/streams/{stream}{ending} HTTP/1.1\r\nhost: carry\r\n"
        if etag is not None:
            head += f'if-match: "{etag}"\r\n'
        if deadline_s is not None:
            head += f"carry-timeout: {deadline_s:.3f}\r\n"
        if body:
            head += f"content-type: {media}\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        try:
            async with asyncio.timeout(timeout_s):
                if self._writer is None:
                    opened = await asyncio.open_connection(_HOST, self._port, limit=_LARGEST_BYTES)
                    self._reader, self._writer = opened
                self._writer.write(head.encode() + body)
                return await _reply(self._reader)
        except (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError) as error:
            self.drop()
            raise NoReply(f"{type(error).__name__}: {error}") from error
        except asyncio.CancelledError:
            self.drop()
            raise

    def drop(self) -> None:
        """End the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


async def _reply(reader: asyncio.StreamReader) -> tuple[int, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status_line, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    if not body:
        return int(status_line.split()[1]), None
    load = orjson.loads if "json" in headers["content-type"] else ormsgpack.unpackb
    return int(status_line.split()[1]), load(body)


def chunk_body(
    rows: Rows, position: int | None, media: str = JSON, epoch: str | None = None
) -> bytes:
    """The body of a chunk."""
    document: dict[str, Any] = {}
    if position is not None:
        document["position"] = position
    if epoch is not None:
        document["epoch"] = epoch
    if media == JSON:
        return orjson.dumps({**document, "inputs": rows.tolist()})
    return ormsgpack.packb({**document, "inputs": rows.astype("<f4").tobytes()})
