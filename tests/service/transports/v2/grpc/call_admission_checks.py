"""Slots, room for messages, time limits and disconnects of calls with and without a key.

`test_messages.py` runs these tests in a process of their own; see `call_checks`.
"""

from __future__ import annotations

import asyncio
import gc
import struct
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from service.access.caller import ANYONE, Caller
from service.core.errors import Conflict, Unauthenticated
from service.server.settings import ConnectionSettings, WorkerSettings
from service.settings import Settings
from service.transports.v2.grpc import admission, public_services
from service.transports.v2.grpc.infer_requests import SERVICE
from service.transports.v2.grpc.server import GrpcServer
from service.transports.v2.replies import InferReply, OutputTensor
from service.transports.v2.settings import V2Settings
from tests.service.transports.v2.grpc.call_checks import request_of
from tests.support.servers import becomes

MAX_CALLS, MANY = 20, 200
SETTINGS = Settings(
    v2=V2Settings(grpc_port=0, grpc_max_calls=MAX_CALLS, grpc_max_message_bytes=2**20),
    connections=ConnectionSettings(max_pending_body_bytes=2**24),
    processes=WorkerSettings(drain_s=0.0),
)
KEY = (("authorization", "Bearer good"),)
WAIT_S = 60.0

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
INFER = f"/{SERVICE}/ModelInfer"
PROBES = (f"/{SERVICE}/ServerLive", f"/{SERVICE}/ServerReady", CHECK)
STREAMS = ((WATCH, b""), (REFLECTION, b"\x3a\x01*"))
"""Methods and the messages that are answered at once: the second asks for the services."""
REQUEST = request_of(4).SerializeToString()
NO_WINDOW = struct.pack(">HI", 4, 0)
"""Settings of HTTP/2 with which the server may send no reply."""


class Access:
    """Access control with one key."""

    open_caller = None
    cached: ClassVar[dict[bytes | None, Caller]] = {}

    def caller(self, authorization: bytes | None) -> Caller:
        if authorization != b"Bearer good":
            raise Unauthenticated("no key")
        return ANYONE

    def notify_end(self, caller: Caller, on_end: Any) -> Any:
        return lambda: None


class Inference:
    """Answers with zeros.

    Attributes:
        size: number of values.
        rejected: the requests that were rejected; None if none are.
    """

    def __init__(self, size: int = 1):
        self.size = size
        self.rejected: list[weakref.ref[Any]] | None = None
        self.api = SimpleNamespace(
            limits=SimpleNamespace(effective_timeout_s=lambda remaining_s: WAIT_S, max_items=1),
            access=Access(),
            recorder=SimpleNamespace(record_error=lambda model, code: None),
            tracer=None,
            pipeline=SimpleNamespace(readiness=self.readiness),
            codecs={},
        )

    def served(self, *names: object, **more: object) -> None:
        raise AssertionError("only requests for inference are sent")

    def on_switch(self, forget: Callable[[], object]) -> None:
        """No version is ever switched."""

    async def readiness(self) -> list[Any]:
        return [SimpleNamespace(ok=True)]

    def read(self, caller: Caller, request: Any, deadline_s: float) -> Any:
        if self.rejected is not None:
            values = np.frombuffer(request.inputs[0].data)
            self.rejected.append(weakref.ref(values))
            try:
                raise ValueError
            except ValueError as cause:
                raise Conflict("why") from cause

    async def answer(self, caller: Caller, call: Any) -> InferReply:
        return InferReply("m", "1", "", {}, [OutputTensor("o", np.zeros(self.size, np.float32))])


@asynccontextmanager
async def serving(inference: Any = None) -> AsyncIterator[tuple[grpc.aio.Channel, int]]:
    """A client of a server whose calls need a key, and the server's port."""
    server = GrpcServer(inference or Inference(), dict, SETTINGS)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel, server.port
    finally:
        await server.stop()


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """A client of a server whose calls need a key."""
    async with serving() as (channel, _):
        yield channel


async def status(
    channel: grpc.aio.Channel, method: str, message: bytes = b"", metadata: Any = None
) -> str:
    """The status of a call with one message."""
    call = channel.unary_unary(method)(message, metadata=metadata, timeout=WAIT_S)
    return (await call.code()).name


async def assert_others_are_served(channel: grpc.aio.Channel) -> None:
    """Probes, health and clients with a key get their answers."""
    for method in PROBES:
        assert await status(channel, method) == "OK"
    for _ in range(2 * MAX_CALLS):
        assert await status(channel, INFER, REQUEST, KEY) == "OK"
    assert await status(channel, INFER, REQUEST) == "UNAUTHENTICATED"


async def ask(call: Any, message: bytes) -> object:
    """The first response of a stream; something else if it was rejected."""
    try:
        await call.write(message)
        return await call.read()
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError) as error:
        return error


@pytest.mark.parametrize(("method", "message"), STREAMS)
async def test_streams_without_a_key_take_no_slots_of_other_calls(
    channel: grpc.aio.Channel, method: str, message: bytes
) -> None:
    calls = [channel.stream_stream(method)() for _ in range(MANY)]
    answers = await asyncio.gather(*[ask(call, message) for call in calls])
    assert all(isinstance(each, bytes) for each in answers)
    await assert_others_are_served(channel)
    for call in calls:
        call.cancel()


@pytest.mark.parametrize("method", [*PROBES, WATCH, REFLECTION])
async def test_calls_that_send_no_message_do_not_block_other_calls(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PUBLIC_RECEIVE_S", 600.0)
    monkeypatch.setattr(admission, "MAX_PUBLIC", MAX_CALLS)
    async with serving() as (channel, _), asyncio.timeout(WAIT_S):
        calls = [channel.stream_stream(method)() for _ in range(MANY)]
        await becomes(
            lambda: sum(not each.done() for each in calls) <= MAX_CALLS, "the others' end"
        )
        await assert_others_are_served(channel)
        for call in calls:
            call.cancel()


async def test_probes_are_answered_while_messages_of_clients_fill_their_buffer(
    channel: grpc.aio.Channel,
) -> None:
    calls = [channel.stream_unary(INFER)(metadata=KEY) for _ in range(2 * MAX_CALLS)]
    await becomes(lambda: sum(each.done() for each in calls) >= MAX_CALLS, "no free slot")
    for method in PROBES:
        assert await status(channel, method) == "OK"
    for call in calls:
        call.cancel()


async def test_further_call_without_a_key_resets_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also a stream; calls with a key are not affected."""
    monkeypatch.setattr(admission, "MAX_PUBLIC", 2)
    async with serving() as (channel, _), asyncio.timeout(WAIT_S):
        watches = []
        for _ in range(2):
            # one after the other: the client may send calls that begin together in any order
            watches.append(channel.stream_stream(WATCH)())
            assert await ask(watches[-1], b"") == b"\x08\x01"
        assert await accepts(channel, INFER, REQUEST, KEY)
        assert not any(each.done() for each in watches)
        assert await accepts(channel, CHECK)
        assert await watches[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not watches[1].done()
        watches[1].cancel()


async def test_client_with_many_calls_without_a_key_resets_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it could make others' health checks fail for ever, and with them their connections."""
    monkeypatch.setattr(admission, "MAX_PUBLIC", MAX_CALLS)
    async with serving() as (channel, port), asyncio.timeout(WAIT_S):
        watch = channel.stream_stream(WATCH)()
        assert await ask(watch, b"") == b"\x08\x01"
        # pools are not shared, so that it is another connection
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as other:
            calls = [other.stream_stream(WATCH)() for _ in range(MANY)]
            await asyncio.gather(*[ask(call, b"") for call in calls])
            await becomes(
                lambda: sum(not each.done() for each in calls) < MAX_CALLS, "the others' end"
            )
            assert not watch.done()
            assert await accepts(other, CHECK)
        assert not watch.done()
        watch.cancel()


async def accepts(channel: grpc.aio.Channel, *call: Any) -> bool:
    """Whether a call succeeds."""
    return await status(channel, *call) == "OK"


@pytest.mark.parametrize("method", [*PROBES, WATCH, REFLECTION])
async def test_call_without_a_key_that_sends_no_message_ends(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PUBLIC_RECEIVE_S", 0.05)
    async with serving() as (channel, _):
        silent = channel.stream_stream(method)()
        assert await silent.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_probe_resets_the_oldest_whose_reply_cannot_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else clients without a key that give the server no room to send kept out those of others."""
    monkeypatch.setattr(admission, "MAX_PUBLIC", 2)
    async with serving() as (channel, port):
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for replies, client in clients:
            client.write(call_bytes(PROBES[0], b"", NO_WINDOW))
            await replies.readuntil(frame(1, 4, 1, b"")[3:])
        for _ in range(2):
            assert await accepts(channel, CHECK)
        async with asyncio.timeout(WAIT_S):
            await clients[0][0].readuntil(frame(3, 0, 1, struct.pack(">I", 11)))
        for _, client in clients:
            client.transport.abort()


async def test_reflection_answers_no_more_than_its_client_receives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request is shorter than its response by far."""
    answered: list[Any] = []
    answer = public_services._reflection
    monkeypatch.setattr(
        public_services, "_reflection", lambda each: (answered.append(each), answer(each))[1]
    )
    async with serving() as (_, port), asyncio.timeout(WAIT_S):
        replies, client = await asyncio.open_connection("127.0.0.1", port)
        request = STREAMS[1][1]
        opening = call_bytes(REFLECTION, request, NO_WINDOW)
        end = frame(0, 1, 1, message(request))
        client.write(opening[: -len(end)] + frame(0, 0, 1, message(request) * 100))
        client.write(frame(6, 0, 0, bytes(8)))
        await replies.readuntil(frame(6, 1, 0, bytes(8)))
        await becomes(lambda: answered, "the first response")
        client.write(frame(6, 0, 0, b"settled!"))
        await replies.readuntil(frame(6, 1, 0, b"settled!"))
        assert len(answered) == 1
        client.write(frame(8, 0, 1, struct.pack(">I", 2**20)))
        await becomes(lambda: len(answered) == 100, "all responses")
        client.transport.abort()


def message(data: bytes, flag: int = 0) -> bytes:
    """A message of gRPC."""
    return struct.pack(">BI", flag, len(data)) + data


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def call_bytes(
    path: str, message: bytes, settings: bytes = b"", headers: dict[str, str] | None = None
) -> bytes:
    """A connection with one call, whose client never lets the server send over 64 KiB."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        **(headers or {}),
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


async def test_client_that_disconnects_before_its_reply_is_logged_as_such() -> None:
    async with serving(Inference(2**18)) as (_, port):
        with capture_logs() as events:
            replies, client = await asyncio.open_connection("127.0.0.1", port)
            client.write(call_bytes(INFER, REQUEST, headers=dict(KEY)))
            await replies.readexactly(2**16 - 1)
            client.transport.abort()
            disconnect = {"event": "client_disconnected", "method": "GRPC", "log_level": "info"}
            await becomes(lambda: disconnect in events, "the event")


async def test_a_rejected_request_is_freed_without_the_garbage_collector() -> None:
    """Else requests of many MiB accumulate until the next collection, which counts objects."""
    inference = Inference()
    inference.rejected = rejected = []
    gc.disable()
    try:
        async with serving(inference) as (channel, _):
            message = request_of(8).SerializeToString()
            assert await status(channel, INFER, message, KEY) == "ABORTED"
            await becomes(lambda: rejected[0]() is None, "the freed request")
    finally:
        gc.enable()
