"""HTTP/2 clients that break the protocol, or make the server work for nothing."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest

from service.server import http2_protocol
from service.server.http2_headers import (
    MAX_HEADERS_BYTES,
)
from service.server.http2_protocol import (
    MAX_CONTROL_FRAMES,
)
from service.server.http2_stream import (
    END_HEADERS,
    END_STREAM,
    MAX_FRAME_BYTES,
    PADDED,
    PRIORITY,
    ErrorCode,
    FrameType,
    encode_frame,
)
from tests.support.http2 import (
    INITIAL_WINDOW,
    LARGE_WINDOWS,
    LONGEST,
    REQUEST,
    WAIT_S,
    Echo,
    connected,
)
from tests.support.servers import becomes


def frames_of(count: int, *frame: Any) -> bytes:
    return encode_frame(*frame) * count


OPEN = encode_frame(FrameType.HEADERS, END_HEADERS, 1, REQUEST)
MANY = MAX_CONTROL_FRAMES + 2  # one more for the response
HOSTILE: dict[str, tuple[bytes, ErrorCode]] = {
    "a long frame": (
        encode_frame(FrameType.DATA, 0, 1, bytes(MAX_FRAME_BYTES + 1)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "data of no stream": (encode_frame(FrameType.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data of a stream that was not opened": (
        encode_frame(FrameType.DATA, 0, 5),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a reset of a stream that was not opened": (
        encode_frame(FrameType.RST_STREAM, 0, 1, bytes(4)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a stream of a server": (
        encode_frame(FrameType.HEADERS, END_HEADERS, 2, REQUEST),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "headers twice": (OPEN + OPEN, ErrorCode.PROTOCOL_ERROR),
    "padding longer than its frame": (
        OPEN + encode_frame(FrameType.DATA, PADDED, 1, b"\4abc"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a block that is not continued": (
        encode_frame(FrameType.HEADERS, 0, 1, REQUEST)
        + encode_frame(FrameType.PING, 0, 0, bytes(8)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (
        encode_frame(FrameType.CONTINUATION, 4, 1, b""),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a continuation of another stream": (
        encode_frame(FrameType.HEADERS, 0, 1, REQUEST)
        + encode_frame(FrameType.CONTINUATION, 4, 3, b""),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a block that cannot be decoded": (
        encode_frame(FrameType.HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff"),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "settings of another length": (
        encode_frame(FrameType.SETTINGS, 0, 0, bytes(5)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a ping of another length": (
        encode_frame(FrameType.PING, 0, 0, bytes(7)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a window that is widened by nothing": (
        encode_frame(FrameType.WINDOW_UPDATE, 0, 0, bytes(4)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a priority of another length": (
        encode_frame(FrameType.HEADERS, END_HEADERS | PRIORITY, 1, bytes(4)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "too large an initial window": (
        encode_frame(FrameType.SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 2**31)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "too large a window": (
        encode_frame(FrameType.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "too large a window of a stream": (
        OPEN + encode_frame(FrameType.WINDOW_UPDATE, 0, 1, struct.pack(">I", 2**31 - 1)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "more than the window of a stream": (
        OPEN + frames_of(17, FrameType.DATA, 0, 1, LONGEST),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "endless continuations": (
        encode_frame(FrameType.HEADERS, 0, 1, REQUEST)
        + frames_of(2, FrameType.CONTINUATION, 0, 1, bytes(MAX_HEADERS_BYTES)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "empty continuations": (
        encode_frame(FrameType.HEADERS, 0, 1, REQUEST)
        + frames_of(MANY, FrameType.CONTINUATION, 0, 1),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "a block that inflates": (
        encode_frame(
            FrameType.HEADERS, END_HEADERS, 1, b"\x40\x01k\x7f\x81\x1f" + bytes(4096) + b"\xbe" * 10
        ),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "pings": (frames_of(MANY, FrameType.PING, 0, 0, bytes(8)), ErrorCode.ENHANCE_YOUR_CALM),
    "settings": (frames_of(MANY, FrameType.SETTINGS, 0, 0), ErrorCode.ENHANCE_YOUR_CALM),
    "priorities": (
        frames_of(MANY, FrameType.PRIORITY, 0, 1, bytes(5)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "unknown frames": (frames_of(MANY, 99, 0, 1), ErrorCode.ENHANCE_YOUR_CALM),
    "empty data": (OPEN + frames_of(MANY, FrameType.DATA, 0, 1), ErrorCode.ENHANCE_YOUR_CALM),
    "data of a stream that has ended": (
        OPEN + frames_of(MANY, FrameType.DATA, END_STREAM, 1),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "rapid resets": (
        b"".join(
            encode_frame(FrameType.HEADERS, END_HEADERS, stream, REQUEST)
            + encode_frame(FrameType.RST_STREAM, 0, stream, bytes(4))
            for stream in range(1, 2 * MANY, 2)
        ),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_client_gets_goaway_and_its_streams_are_cancelled(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a stream that does not read."""
    monkeypatch.setattr(http2_protocol, "CONTROL_INTERVAL_S", 600.0)
    data, code = HOSTILE[name]
    monkeypatch.setattr(Echo, "reads", False)
    async with connected(LARGE_WINDOWS) as (client, _):
        client.writer.write(data)
        assert await client.expect_end() == code
        assert all(each.is_cancelled or not each.is_open for each in Echo.opened)
        assert all(each.releases == 1 for each in Echo.opened)


async def test_client_of_another_protocol_is_disconnected() -> None:
    async with connected() as (client, connections):
        host, port = client.writer.get_extra_info("peername")
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(2**20)
        writer.close()
        await becomes(lambda: len(connections) == 1, "the end of the connection")


async def test_control_frames_are_limited_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that pings for years is not closed."""
    monkeypatch.setattr(http2_protocol, "CONTROL_INTERVAL_S", 0.0)
    async with connected() as (client, _):
        client.writer.write(frames_of(3 * MANY, FrameType.PING, 0, 0, bytes(8)))
        await client.settle()


async def test_client_may_ping_for_each_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """As clients do that measure the bandwidth, those in Go among them."""
    monkeypatch.setattr(http2_protocol, "CONTROL_INTERVAL_S", 600.0)
    async with connected(LARGE_WINDOWS) as (client, _):
        client.open(1)
        for _ in range(3 * MANY):
            client.send(FrameType.DATA, 0, 1, b"x")
            client.send(FrameType.PING, 0, 0, bytes(8))
        await client.receive_data(3 * MANY)
        client.writer.write(frames_of(2 * MANY, FrameType.PING, 0, 0, bytes(8)))
        assert await client.expect_end() == ErrorCode.ENHANCE_YOUR_CALM
