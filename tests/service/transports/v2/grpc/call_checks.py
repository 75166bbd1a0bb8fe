"""Flow control, memory and disconnects of calls, without models.

`test_messages.py` runs these tests in a process of their own: Triton's client, which other tests
use, registers messages of the same names.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from service.access.caller import ANYONE, Caller
from service.core.errors import BadRequest, CarryError, Conflict, ShuttingDown
from service.server.settings import ConnectionSettings
from service.transports.v2.grpc import incoming
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.call_admission import CallAdmission
from service.transports.v2.grpc.incoming import InferMessage, parse
from service.transports.v2.grpc.infer_stream import WINDOW_BYTES, InferStream
from service.transports.v2.grpc.message_admission import MessageAdmission
from service.transports.v2.grpc.server import GrpcServer
from service.transports.v2.grpc.servicer import SERVICE, InferenceServicer, Model
from service.transports.v2.settings import V2Settings
from service.transports.v2.values import InferReply, InferRequest, OutputTensor
from tests.service.transports.v1.raw_http import becomes

WINDOW = 64
SETTINGS = V2Settings(grpc_port=0, grpc_max_calls=100, grpc_max_message_bytes=2**20)
CONNECTIONS = ConnectionSettings(max_pending_body_bytes=2**24)
UNLIMITED = MessageAdmission(2**40, 2**20, 60.0)


def request_of(size: int) -> pb.ModelInferRequest:
    """A request with as many bytes of values."""
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="inputs", datatype="FP32", shape=[1])
    message.raw_input_contents.append(bytes(size))
    return message


class Call:
    """A call whose requests, of different sequences, are applied once `is_released` is set.

    Attributes:
        requested: number of requests that were read.
        ids: of the responses.
    """

    def __init__(self, count: int, size: int):
        self.requested = 0
        self.ids: list[str] = []
        self.is_released = asyncio.Event()
        self.is_stopping = asyncio.Event()
        self._count, self._size = count, size

    async def run(self) -> None:
        """Answer the requests."""
        stream = InferStream(self._infer, _answer, UNLIMITED, WINDOW, self.is_stopping)
        async for response in stream.responses(self._requests()):
            self.ids.append(response.infer_response.id)

    async def _requests(self) -> AsyncIterator[bytes]:
        for at in range(self._count):
            self.requested += 1
            message = request_of(self._size)
            message.id = str(at)
            message.parameters["sequence_id"].int64_param = at + 1
            yield message.SerializeToString()

    async def _infer(self, message: InferMessage) -> pb.ModelInferResponse:
        await self.is_released.wait()
        return pb.ModelInferResponse(model_name="m", id=message.head.id)


async def _answer(
    model: str, work: Callable[[], Awaitable[pb.ModelInferResponse]]
) -> pb.ModelInferResponse | CarryError:
    return await work()


@pytest.mark.parametrize(("size", "window"), [(1, WINDOW), (WINDOW_BYTES // 4, 4)])
async def test_no_more_is_read_than_a_window_of_requests_and_bytes(size: int, window: int) -> None:
    call = Call(3 * WINDOW, size)
    running = asyncio.create_task(call.run())
    await becomes(lambda: call.requested == window, "a full window")
    for _ in range(100):
        await asyncio.sleep(0)
    assert call.requested == window
    call.is_released.set()
    await running
    assert call.ids == [str(at) for at in range(3 * WINDOW)]


async def test_every_request_of_a_full_window_is_answered_when_the_service_stops() -> None:
    call = Call(3 * WINDOW, 1)
    running = asyncio.create_task(call.run())
    await becomes(lambda: call.requested == WINDOW, "a full window")
    call.is_stopping.set()
    for _ in range(10):
        await asyncio.sleep(0)
    call.is_released.set()
    with pytest.raises(ShuttingDown):
        await running
    assert call.ids == [str(at) for at in range(WINDOW)]


async def test_a_rejected_request_is_freed_without_the_garbage_collector() -> None:
    """Else requests of many MiB accumulate until the next collection, which counts objects."""
    recorder = SimpleNamespace(record_error=lambda model, code: None)
    inference: Any = SimpleNamespace(api=SimpleNamespace(recorder=recorder, tracer=None))
    servicer = InferenceServicer(inference, dict, CallAdmission(1), UNLIMITED, WINDOW)
    freed: list[weakref.ref[Call]] = []

    async def reject() -> pb.ModelInferResponse:
        request = Call(0, 0)
        freed.append(weakref.ref(request))
        try:
            raise ValueError
        except ValueError as cause:
            raise Conflict("why") from cause

    gc.disable()
    try:
        error = await servicer._answer("ModelInfer", Model("m"), reject, {})
        assert isinstance(error, Conflict)
        assert freed[0]() is None
    finally:
        gc.enable()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def call_bytes(
    method: str, message: bytes, settings: bytes = b"", *, service: str = SERVICE
) -> bytes:
    """A connection with one call, whose client never lets the server send over 64 KiB."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{service}/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    # literal fields that no table has
    fields = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(4, 0, 0, settings)
        + frame(1, 4, 1, fields)
        + frame(0, 1, 1, struct.pack(">BI", 0, len(message)) + message)
    )


def varint(value: int) -> bytes:
    """A number in the wire format of messages."""
    low, value = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(value) if value else bytes([low])


def field(number: int, value: bytes) -> bytes:
    """A field in the wire format of messages."""
    return varint(number << 3 | 2) + varint(len(value)) + value


LONG = 2**16
MANY: dict[str, tuple[bytes, str]] = {
    "tensors": (field(5, b"") * LONG, "at most 1000 fields"),
    "parameters": (field(4, bytes(LONG)), "less than 65536 bytes besides the tensors"),
    "a truncated field": (field(7, bytes(LONG))[:-1], "cannot be parsed"),
    "a group": (field(7, bytes(LONG)) + b"\x0b", "cannot be parsed"),
}


@pytest.mark.parametrize("name", MANY)
def test_long_message_is_rejected_before_objects_are_made_of_its_fields(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, expected = MANY[name]
    parsed: list[int] = []

    def record(kind: type[Any], message: bytes) -> Any:
        parsed.append(len(message))
        return parse(kind, message)

    monkeypatch.setattr(incoming, "parse", record)
    with pytest.raises(BadRequest, match=expected):
        InferMessage(data)
    assert sum(parsed) < LONG


def test_head_of_a_long_message_has_all_but_its_tensors() -> None:
    message = request_of(LONG)
    message.id = "first"
    message.parameters["sequence_id"].int64_param = 7
    message.outputs.add(name="o")
    long = InferMessage(message.SerializeToString())
    assert long.sequence() == "m/7"
    del message.inputs[:], message.raw_input_contents[:]
    assert long.head == message


async def test_client_that_disconnects_before_its_reply_is_logged_as_such(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The library's other errors are still logged."""

    async def infer(caller: Caller, request: InferRequest, deadline_s: float) -> InferReply:
        return InferReply("m", "1", "", {}, [OutputTensor("o", np.zeros(2**18, np.float32))])

    limits = SimpleNamespace(effective_timeout_s=lambda remaining_s: 1.0)
    access = SimpleNamespace(open_caller=ANYONE)
    pipeline = SimpleNamespace(model=lambda *_: None)
    api = SimpleNamespace(limits=limits, access=access, tracer=None, pipeline=pipeline)
    inference: Any = SimpleNamespace(api=api, infer=infer)
    server = GrpcServer(
        inference,
        dict,
        SETTINGS,
        CONNECTIONS,
        stream_window=WINDOW,
        drain_s=0.0,
        host="127.0.0.1",
    )
    await server.start()
    try:
        with capture_logs() as events:
            replies, client = await asyncio.open_connection("127.0.0.1", server.port)
            client.write(call_bytes("ModelInfer", request_of(4).SerializeToString()))
            await replies.readexactly(2**16 - 1)
            client.transport.abort()
            disconnect = {"event": "client_disconnected", "method": "GRPC", "log_level": "info"}
            await becomes(lambda: disconnect in events, "the event")
        assert not caplog.records
        logging.getLogger("grpc._cython.cygrpc").error("another", exc_info=ValueError())
        assert [each.message for each in caplog.records] == ["another"]
    finally:
        await server.stop()
