"""Random frames of clients raise nothing; slots, room and requests are released.

`test_messages.py` runs these tests in a process of their own; see `call_checks`.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.server.http2_headers import encode_headers
from service.server.http2_protocol import PREFACE, Http2Connection
from service.transports.v2.grpc.call import read_head
from service.transports.v2.grpc.server import GrpcServer
from tests.service.transports.v2.grpc.call_admission_checks import (
    CHECK,
    INFER,
    REFLECTION,
    REQUEST,
    SETTINGS,
    WATCH,
    Inference,
)
from tests.support.servers import becomes

CONNECTIONS, FRAMES = 400, 30
PATHS = (INFER, INFER.replace("ModelInfer", "ModelStreamInfer"), WATCH, CHECK, REFLECTION, "/no")
LENGTHS = (0, 1, 99, 2**20 + 1)
VALUES = (0, 1, 100, 65_535, 2**31 - 1, 2**31)
HEADERS = (
    (b"grpc-timeout", b"1m"),
    (b"grpc-timeout", b"10S"),
    (b"grpc-timeout", b"x"),
    (b"grpc-encoding", b"gzip"),
    (b"grpc-encoding", b"x"),
    (b"authorization", b"Bearer bad"),
)


class Slow(Inference):
    """Answers after some turns of the event loop."""

    async def answer(self, *call: Any) -> Any:
        for _ in range(20):
            await asyncio.sleep(0)
        return await super().answer(*call)


class Transport:
    """Accepts everything; fails if something is written after its end."""

    has_ended = False

    def write(self, data: bytes) -> None:
        assert not self.has_ended

    def write_eof(self) -> None:
        self.has_ended = True

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.has_ended

    def get_extra_info(self, name: str) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading
    abort = close = write_eof


def random_frame(source: random.Random, stream: int) -> bytes:
    """A frame, often a valid one; `stream` is the number of the next stream."""
    is_valid = source.random() < 0.97
    kind = source.choice([0] * 14 + [1] * 6 + [2, 3, 4, 6, 8, 8, 11] if is_valid else range(12))
    flags = source.choice((0, 0, 0, 1) if is_valid else (4, 8, 12, 32, 36, 255))
    if kind == 1:
        flags = source.choice((4, 4, 5)) if is_valid else flags
    elif is_valid and kind in (0, 3, 8):
        stream = source.randrange(1, max(stream, 2), 2)
    else:
        stream = source.choice((0, 1, stream))
    payloads: dict[int, Callable[[], bytes]] = {
        0: lambda: random_messages(source),
        1: lambda: random_block(source),
        4: lambda: struct.pack(">HI", source.choice((1, 4, 4, 5, 9)), source.choice(VALUES[:5])),
        6: lambda: bytes(8),
        9: lambda: random_block(source)[: source.randrange(40)],
    }
    default = struct.pack(">I", source.choice(VALUES[1:3] if is_valid else VALUES))
    payload = payloads.get(kind, lambda: default)()
    if not is_valid and payload:
        payload = payload[:-1]
    head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
    return head + payload


def random_messages(source: random.Random) -> bytes:
    request = struct.pack(">BI", source.choice((0, 0, 1)), len(REQUEST)) + REQUEST
    head = struct.pack(">BI", 0, source.choice(LENGTHS))
    empty = bytes(5) * source.randrange(50)
    return source.choice((b"", b"\0", request, request, request * 3, request[:-2], head, empty))


def random_block(source: random.Random) -> bytes:
    if source.random() < 0.01:
        return source.randbytes(source.randrange(20))
    headers = [(b":method", b"POST"), (b":path", source.choice(PATHS).encode())]
    headers.append((b"content-type", b"application/grpc"))
    if source.random() < 0.8:
        headers.append((b"authorization", b"Bearer good"))
    if source.random() < 0.3:
        headers.append(source.choice(HEADERS))
    return encode_headers(headers)


async def converse(source: random.Random, connection: Http2Connection) -> None:
    """Send random frames, in random parts, over a transport that pauses."""
    connection.connection_made(Transport())  # type: ignore[arg-type]
    stream, data = 1, bytearray(PREFACE)
    for _ in range(source.randrange(1, FRAMES)):
        frame = random_frame(source, stream)
        stream += 2 * (frame[3] == 1)
        data += frame
    while data:
        size = source.choice((len(data), source.randrange(1, 200)))
        connection.data_received(bytes(data[:size]))
        del data[:size]
        for _ in range(source.randrange(3)):
            await asyncio.sleep(0)
        if source.random() < 0.1:
            connection.pause_writing()
        if connection.is_write_paused and source.random() < 0.2:
            connection.resume_writing()
        if source.random() < 0.02:
            connection.retire()
        assert connection.phase
        assert connection.unsent_bytes >= 0
    connection.connection_lost(None)


@pytest.mark.parametrize("seed", range(3))
async def test_random_frames_raise_nothing_and_leave_nothing_held(seed: int) -> None:
    server, source = GrpcServer(Slow(), dict, SETTINGS), random.Random(seed)
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, failure: failures.append(failure))
    admission, connections = server._servicer._admission, server._connections
    rooms = (admission.messages, admission.public_messages)
    slots = (admission.calls, admission.public)
    with capture_logs() as events:
        for _ in range(CONNECTIONS):
            connection = Http2Connection(connections, read_head, server._servicer.accept)
            await converse(source, connection)
        await becomes(lambda: server.load().requests == 0, "the end of all requests")
        await becomes(
            lambda: not any(each._used_bytes or each._receiving for each in rooms), "no messages"
        )
        await becomes(lambda: not any(each._calls for each in slots), "free slots")
    assert (len(connections), failures) == (0, [])
    assert not [each for each in events if each["log_level"] == "error"]
    statuses = {each.get("code") for each in events}
    assert len(statuses) > 3, "the frames reach little of the protocol"
