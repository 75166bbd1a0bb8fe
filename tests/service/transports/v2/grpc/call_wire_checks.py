"""Messages, metadata and statuses of calls as bytes, and calls that are compressed or cancelled.

`test_messages.py` runs these tests in a process of their own; see `call_checks`.
"""

from __future__ import annotations

import asyncio
import gc
import struct
import zlib
from typing import Any

import grpc
import pytest
from hpack import Decoder
from structlog.testing import capture_logs

from service.core.errors import CarryError, Conflict
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.call import Call, read_head
from service.transports.v2.grpc.infer_requests import SERVICE
from tests.service.transports.v2.grpc.call_admission_checks import (
    CHECK,
    INFER,
    KEY,
    NO_WINDOW,
    PROBES,
    REFLECTION,
    REQUEST,
    WAIT_S,
    WATCH,
    Inference,
    call_bytes,
    frame,
    message,
    serving,
    status,
)
from tests.service.transports.v2.grpc.call_checks import request_of
from tests.support.servers import becomes

STREAM = INFER.replace("ModelInfer", "ModelStreamInfer")
LIMIT = 2**20


class Failing(Inference):
    """Rejects every request with an error."""

    def __init__(self, error: CarryError):
        super().__init__()
        self._error = error

    async def answer(self, *call: object) -> Any:
        raise self._error


class Blocking(Inference):
    """Answers no request.

    Attributes:
        started, cancelled: number of requests.
    """

    started = 0
    cancelled = 0

    async def answer(self, *call: object) -> Any:
        self.started += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def exchange(port: int, data: bytes) -> tuple[list[bytes], dict[bytes, bytes]]:
    """The responses to the bytes of a connection with one call, and its trailers."""
    replies, client = await asyncio.open_connection("127.0.0.1", port)
    client.write(data)
    decoder, received, headers = Decoder(), b"", {}
    async with asyncio.timeout(WAIT_S):
        while True:
            head = await replies.readexactly(9)
            payload = await replies.readexactly(int.from_bytes(head[:3]))
            if head[3] == 0:
                received += payload
            elif head[3] == 1:
                headers |= dict(decoder.decode(payload, raw=True))
                if head[4] & 1:
                    break
    client.close()
    responses = []
    while received:
        size = int.from_bytes(received[1:5])
        responses.append(received[5 : 5 + size])
        received = received[5 + size :]
    return responses, headers


def call_with(path: str, data: bytes, cuts: int, **headers: str) -> bytes:
    """A connection with one call, the bytes of its messages in frames of as many bytes."""
    opening = call_bytes(path, b"", headers={**dict(KEY), **headers})
    opening = opening[: opening.rindex(frame(0, 1, 1, message(b"")))]
    frames = [frame(0, 0, 1, data[at : at + cuts]) for at in range(0, len(data), cuts)]
    return opening + b"".join(frames) + frame(0, 1, 1, b"")


@pytest.mark.parametrize("cuts", [1, 4, 5, 6, 16_384])
async def test_messages_are_received_however_frames_cut_them(cuts: int) -> None:
    requests = []
    for at in range(5):
        request = request_of(4)
        request.id = str(at)
        requests.append(message(request.SerializeToString()))
    async with serving() as (_, port):
        responses, trailers = await exchange(port, call_with(STREAM, b"".join(requests), cuts))
    assert len(responses) == 5
    assert (trailers[b":status"], trailers[b"grpc-status"]) == (b"200", b"0")
    assert all(pb.ModelStreamInferResponse.FromString(each) for each in responses)


@pytest.mark.parametrize("method", [INFER, CHECK])
async def test_call_whose_message_is_truncated_or_absent_is_rejected(method: str) -> None:
    async with serving() as (_, port):
        for data in (b"", message(b"1234")[:-1]):
            _, trailers = await exchange(port, call_with(method, data, 16_384))
            assert trailers[b"grpc-status"] == b"3"
            assert trailers[b"carry-error"] == b"malformed_body"


async def test_stream_that_ends_in_a_message_answers_those_before_it() -> None:
    async with serving() as (_, port):
        data = message(REQUEST) + message(REQUEST)[:-1]
        responses, trailers = await exchange(port, call_with(STREAM, data, 16_384))
    assert (len(responses), trailers[b"carry-error"]) == (1, b"malformed_body")


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_answered_in_order(compression: Any) -> None:
    async with serving() as (_, port):
        address, options = f"127.0.0.1:{port}", [("grpc.default_compression_level", 3)]
        async with grpc.aio.insecure_channel(address, options, compression=compression) as channel:
            long = request_of(60_000).SerializeToString()
            assert await status(channel, INFER, long, KEY) == "OK"
            call = channel.stream_stream(STREAM)(metadata=KEY, timeout=WAIT_S)
            for _ in range(20):
                await call.write(long)
            await call.done_writing()
            assert len([each async for each in call]) == 20


@pytest.mark.parametrize(
    ("encoding", "data", "code"),
    [
        ("gzip", zlib.compress(bytes(LIMIT + 1), wbits=31), "body_too_large"),
        ("gzip", b"not compressed", "malformed_body"),
        ("identity", REQUEST, "malformed_body"),
        ("snappy", REQUEST, "malformed_body"),
    ],
)
async def test_message_that_cannot_be_decompressed_ends_its_call(
    encoding: str, data: bytes, code: str
) -> None:
    async with serving() as (_, port):
        for method in (INFER, STREAM):
            sent = call_with(method, message(data, 1), 16_384, **{"grpc-encoding": encoding})
            _, trailers = await exchange(port, sent)
            assert trailers[b"carry-error"] == code.encode()


@pytest.mark.parametrize("method", PROBES)
async def test_compressed_message_that_arrives_with_its_call_is_received(method: str) -> None:
    async with serving() as (_, port):
        data = message(zlib.compress(b""), 1)
        _, trailers = await exchange(
            port, call_with(method, data, 16_384, **{"grpc-encoding": "deflate"})
        )
    assert trailers[b"grpc-status"] == b"0"


@pytest.mark.parametrize("method", [*PROBES, REFLECTION, f"/{SERVICE}/ModelMetadata"])
async def test_long_message_to_other_methods_is_rejected_before_it_is_received(method: str) -> None:
    """And before more of it is decompressed: most of them need no key."""
    async with serving() as (_, port):
        bomb = message(zlib.compress(bytes(2**16)), 1)
        for data in (struct.pack(">BI", 0, 2**16), bomb):
            sent = call_with(method, data, 16_384, **{"grpc-encoding": "deflate"})
            _, trailers = await exchange(port, sent)
            assert trailers[b"carry-error"] == b"body_too_large"


async def test_received_bytes_are_dropped_when_a_call_ends_before_its_reply_is_sent() -> None:
    async with serving() as (_, port):
        replies, client = await asyncio.open_connection("127.0.0.1", port)
        opening = call_bytes(PROBES[0], b"", NO_WINDOW)
        cut = opening[: -len(frame(0, 1, 1, message(b"")))]
        client.write(cut + frame(0, 0, 1, message(b"") + bytes(10_000)))
        await replies.readuntil(frame(1, 4, 1, b"")[3:])
        [call] = [each for each in gc.get_objects() if type(each) is Call and each.is_open]
        await becomes(lambda: call.trailers is not None, "the end of the call")
        assert len(call._received) == 0
        client.transport.abort()


async def test_message_above_the_limit_is_not_received() -> None:
    async with serving() as (_, port):
        for method in (INFER, STREAM, CHECK):
            data = struct.pack(">BI", 0, LIMIT + 1)
            _, trailers = await exchange(port, call_with(method, data, 16_384))
            assert trailers[b"grpc-status"] == b"8"


async def test_incomplete_messages_of_clients_that_disconnect_take_no_room() -> None:
    """More of them than the room has."""
    async with serving() as (channel, port):
        for _ in range(20):
            replies, client = await asyncio.open_connection("127.0.0.1", port)
            sent = call_with(STREAM, message(bytes(LIMIT))[:-1], 16_384)[
                : -len(frame(0, 1, 1, b""))
            ]
            client.write(sent + frame(6, 0, 0, b"received"))
            async with asyncio.timeout(WAIT_S):
                await replies.readuntil(frame(6, 1, 0, b"received"))
            client.transport.abort()
        # there is room for a message, which is no request
        assert await status(channel, INFER, bytes(LIMIT), KEY) == "INVALID_ARGUMENT"


async def test_unknown_method_and_other_requests_are_unimplemented() -> None:
    async with serving() as (channel, port):
        assert await status(channel, "/no/method") == "UNIMPLEMENTED"
        sent = call_with(INFER, message(REQUEST), 16_384, **{"content-type": "text/html"})
        _, trailers = await exchange(port, sent)
        assert trailers[b"grpc-status"] == b"12"


async def test_details_and_metadata_of_a_status_may_be_any_text() -> None:
    """Also longer than a frame."""
    for detail in ("50 % of \u00e9t\u00e9\n", "x" * 20_000):
        async with serving(Failing(Conflict(detail))) as (_, port):
            address = f"127.0.0.1:{port}"
            options = [("grpc.max_metadata_size", 2**20)]
            async with grpc.aio.insecure_channel(address, options) as channel:
                call = channel.unary_unary(INFER)(REQUEST, metadata=KEY, timeout=WAIT_S)
                assert await call.code() is grpc.StatusCode.ABORTED
                assert await call.details() == f"conflict: {detail}"


@pytest.mark.parametrize("method", [WATCH, STREAM])
async def test_call_ends_with_its_deadline(method: str) -> None:
    async with serving(Blocking()) as (_, port):
        data = b"" if method == WATCH else REQUEST
        sent = call_with(method, message(data), 16_384, **{"grpc-timeout": "50m"})
        _, trailers = await exchange(port, sent)
        assert trailers[b"grpc-status"] == b"4"


@pytest.mark.parametrize(("method", "data"), [(INFER, REQUEST), (INFER, b"?"), (CHECK, b"")])
async def test_call_is_freed_when_it_ends_however_late_its_deadline(
    method: str, data: bytes
) -> None:
    """Without the garbage collector, which is rarely run."""
    gc.collect()
    gc.disable()
    try:
        async with serving() as (_, port):
            for key in ("Bearer good", "Bearer bad"):
                headers = {"grpc-timeout": "99999999H", "authorization": key}
                await exchange(port, call_with(method, message(data), 16_384, **headers))
            await becomes(
                lambda: not any(type(each) is Call for each in gc.get_objects()), "no call"
            )
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [("1H", 3600.0), ("2M", 120.0), ("3S", 3.0), ("50m", 0.05), ("7u", 7e-6), ("9n", 9e-9)],
)
def test_timeout_of_a_call_has_a_unit(timeout: str, seconds: float) -> None:
    assert read_head([(b"grpc-timeout", timeout.encode())]).timeout_s == pytest.approx(seconds)
    for wrong in ("", "S", "1", "-1S", "123456789S", "1s"):
        assert read_head([(b"grpc-timeout", wrong.encode())]).timeout_s is None


@pytest.mark.parametrize("disconnects", [True, False])
@pytest.mark.parametrize("method", [INFER, STREAM])
async def test_requests_of_a_cancelled_call_are_cancelled(method: str, disconnects: bool) -> None:
    inference = Blocking()
    async with serving(inference) as (_, port):
        with capture_logs():
            _, client = await asyncio.open_connection("127.0.0.1", port)
            count = 1 if method == INFER else 3
            sent = call_with(method, message(REQUEST) * count, 16_384)
            client.write(sent[: -len(frame(0, 1, 1, b""))])
            await becomes(lambda: inference.started == count, "the requests")
            if disconnects:
                client.transport.abort()
            else:
                client.write(frame(3, 0, 1, struct.pack(">I", 8)))
            await becomes(lambda: inference.cancelled == count, "the end of the requests")
            client.close()
