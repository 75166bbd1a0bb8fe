"""A client of HTTP/2 that sends raw frames, and a server of streams that echo."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from service.server.connections import Connections
from service.server.http2_headers import (
    encode_headers,
)
from service.server.http2_protocol import (
    PREFACE,
    Http2Connection,
)
from service.server.http2_stream import (
    ACK,
    END_HEADERS,
    MAX_FRAME_BYTES,
    FrameType,
    Http2Stream,
)
from service.server.settings import ConnectionSettings
from tests.support.servers import becomes

WAIT_S = 20.0
REQUEST = encode_headers([(b":method", b"POST"), (b":path", b"/echo")])
RESPONSE = encode_headers([(b":status", b"200")])
TRAILERS = encode_headers([(b"status", b"0")])
INITIAL_WINDOW = 4
LONGEST = bytes(MAX_FRAME_BYTES)
"""The payload of the longest frame."""

LARGE_WINDOWS = struct.pack(">HI", INITIAL_WINDOW, 2**31 - 1)


class Echo(Http2Stream):
    """Sends back what it receives; after its end, the trailers.

    Attributes:
        opened: all streams.
    """

    opened: list[Echo]

    def __init__(self, connection: Http2Connection, stream_id: int, head: Any):
        super().__init__(connection, stream_id)
        self.head = head
        self.received = bytearray()
        self.is_cancelled = False
        self.releases = 0
        self.opened.append(self)
        self.write_headers(RESPONSE)

    def receive(self, data: bytes) -> None:
        self.received += data
        self.write(data)

    def receive_end(self) -> None:
        self.finish(TRAILERS)

    def cancel(self) -> None:
        self.is_cancelled = True

    def release(self) -> None:
        self.releases += 1

    def resume(self) -> None:
        pass


class Client:
    """A client that sends and receives frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self.writer = writer

    def send(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
        self.writer.write(head + payload)

    def open(self, stream: int, block: bytes = REQUEST, flags: int = END_HEADERS) -> None:
        self.send(FrameType.HEADERS, flags, stream, block)

    async def receive(self) -> tuple[int, int, int, bytes]:
        """The next frame: its kind, flags, stream and payload."""
        async with asyncio.timeout(WAIT_S):
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3]))
        return head[3], head[4], int.from_bytes(head[5:]), payload

    async def receive_until(
        self, kind: FrameType, *, is_found: Callable[[int, int, bytes], bool] = lambda *_: True
    ) -> list[tuple[int, int, int, bytes]]:
        """The frames up to the first of this kind that has what is sought."""
        frames = [await self.receive()]
        while not (frames[-1][0] == kind and is_found(*frames[-1][1:])):
            frames.append(await self.receive())
        return frames

    async def receive_data(self, size: int) -> bytes:
        """As many bytes of the response, of whatever stream."""
        data = b""
        while len(data) < size:
            data += (await self.receive_until(FrameType.DATA))[-1][3]
        return data

    async def expect_end(self) -> int:
        """The code of the last frame, GOAWAY, after which the server closes the connection."""
        code = int.from_bytes((await self.receive_until(FrameType.GOAWAY))[-1][3][4:8])
        async with asyncio.timeout(WAIT_S):
            assert await self._reader.read() == b""
        return code

    async def settle(self) -> list[tuple[int, int, int, bytes]]:
        """The frames up to the answer to a ping: all that came before was processed."""
        self.send(FrameType.PING, 0, 0, b"settled!")
        return await self.receive_until(FrameType.PING, is_found=lambda flags, *_: flags == ACK)


@asynccontextmanager
async def connected(
    settings: bytes = b"", *, limits: ConnectionSettings | None = None
) -> AsyncIterator[tuple[Client, Connections]]:
    """A client, and the connections of its server."""
    Echo.opened = []
    connections = Connections(limits)
    make = partial(Http2Connection, connections, tuple, Echo)
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        writer.write(PREFACE)
        client = Client(reader, writer)
        client.send(FrameType.SETTINGS, 0, 0, settings)
        yield client, connections
    finally:
        writer.transport.abort()
        server.close()
        await becomes(lambda: len(connections) == 0, "the end of all connections")
