"""One connection: pipelined requests are answered in order, its memory is bounded, and it is closed
when it is idle and only then.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import pytest
import uvicorn

from service.core.values import StreamKey
from service.engine.policy import Admission
from service.server import connections
from service.server.connections import Connections
from service.server.heads import MAX_HEAD_BYTES, PIECE_BYTES
from service.server.http_protocol import HttpProtocol
from service.server.interface import MAX_FAST_REQUEST_BYTES
from service.server.settings import ConnectionSettings
from service.transports.v1.fast_path import (
    FastPath,
    FastRequest,
)
from tests.service.engine.batching import no_room, patch_admission
from tests.service.transports.v1.corpus.requests import FAST, SLOW
from tests.service.transports.v1.harness import Harness
from tests.service.transports.v1.raw_http import (
    QUERY,
    answer,
    check,
    chunk,
    connections_of,
    port_of,
    request,
    serving,
)
from tests.support.servers import becomes

UNREAD = 1500
"""Requests whose responses exceed what a connection buffers for its client."""
FEW = 150
"""Requests that are all read, so that nothing is reset when the connection is closed."""
KEEP_ALIVE_S = ConnectionSettings().keep_alive_s
SEND_TIMEOUT_S = ConnectionSettings().send_timeout_s
GET = request(b"", first="GET /health/live HTTP/1.1", length="")
CHUNKED = request(b"", "Transfer-Encoding: chunked", length="")


class Client(NamedTuple):
    """A client with small socket buffers, and its connection in the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    connection: HttpProtocol
    connections: Connections
    server: uvicorn.Server

    def deliver(self, data: bytes) -> None:
        """Let the server receive these bytes now."""
        self.connection.data_received(data)

    async def statuses(self, count: int) -> list[bytes]:
        """The status codes of the next responses."""
        return [(await answer(self.reader))[9:12] for _ in range(count)]

    def pass_time(self, wait_s: float = 3600.0) -> None:
        """Check all connections now and again after a while."""
        now_s = asyncio.get_running_loop().time()
        check(self.connections, now_s)
        check(self.connections, now_s + wait_s)

    async def is_cut_off(self) -> None:
        """Wait until the server closes the connection."""
        with suppress(ConnectionResetError):
            async with asyncio.timeout(60):
                assert await self.reader.read() == b""
        self.writer.close()
        await becomes(lambda: not self.server.server_state.connections, "no connection")


@asynccontextmanager
async def connected(api: Harness) -> AsyncIterator[Client]:
    """The one client of a server, which checks its connections when the test does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "CHECK_INTERVAL_S", 3600.0)
        async with serving(api) as server:
            own = socket.socket()
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            own.connect(("127.0.0.1", port_of(server)))
            reader, writer = await asyncio.open_connection(sock=own, limit=4096)
            try:
                await becomes(lambda: bool(connections_of(server)), "a connection")
                [connection] = connections_of(server)
                theirs = connection.transport.get_extra_info("socket")
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                yield Client(reader, writer, connection, api.http_state().connections, server)
            finally:
                writer.close()
                await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.fixture
def reject_short(monkeypatch: pytest.MonkeyPatch) -> str:
    """The header of requests that are rejected as overloaded."""

    def rejection(admission: Admission, key: StreamKey, left_s: float, *_: int) -> Any:
        return no_room(admission) if left_s <= 2.5 else None

    patch_admission(monkeypatch, rejection)
    return "Carry-Timeout: 2.5"


@pytest.mark.parametrize("refused", [False, True])
async def test_backpressure_on_a_client_that_does_not_read(
    api: Harness, monkeypatch: pytest.MonkeyPatch, *, refused: bool
) -> None:
    """Its unsent responses stay bounded, and none is lost, however long it pauses."""
    if refused:
        patch_admission(monkeypatch)
    paused: list[bool] = []
    start = FastPath.start

    async with connected(api) as client:

        def watched(fast_path: FastPath, *found: Any) -> Any:
            paused.append(client.connection.flow.write_paused)
            return start(fast_path, *found)

        monkeypatch.setattr(FastPath, "start", watched)
        client.writer.write(request(chunk(None), stream="deaf") * UNREAD)
        await becomes(lambda: client.connection.flow.write_paused, "too much to send")
        await becomes(
            lambda: client.connection.body_bytes > MAX_FAST_REQUEST_BYTES, "much that is buffered"
        )
        client.connection.flow.resume_reading()
        assert not client.connection.transport.is_reading(), "whoever asks for more"
        client.pass_time(SEND_TIMEOUT_S)
        assert set(await client.statuses(UNREAD)) == {b"429" if refused else b"200"}
    assert len(paused) == UNREAD
    assert not any(paused)


async def test_graceful_shutdown_starts_no_request_that_it_would_not_answer(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that did not read gets responses to its processed requests; the rest are dropped."""
    started: list[FastRequest] = []
    start = FastPath.start

    def watched(fast_path: FastPath, request: FastRequest, *rest: Any) -> bytes | None:
        started.append(request)
        return start(fast_path, request, *rest)

    monkeypatch.setattr(FastPath, "start", watched)
    async with connected(api) as client:
        client.connection.transport.set_write_buffer_limits(4096)
        client.writer.write(request(chunk(None), stream="stopped") * FEW)
        await becomes(lambda: client.connection.flow.write_paused, "too much to send")
        client.connection.shutdown()
        owed = len(started)
        assert set(await client.statuses(owed)) == {b"200"}
        await client.is_cut_off()
    assert len(started) == owed < FEW
    assert api.position("stopped") == 4 * owed


async def test_an_announced_close_follows_the_last_pipelined_request(api: Harness) -> None:
    async with connected(api) as client:
        client.connections.announce_close()
        client.deliver(request(chunk(None)) * 3)
        replies = [(await answer(client.reader)).lower() for _ in range(3)]
        assert [b"connection: close" in each for each in replies] == [False, False, True]
        await client.is_cut_off()


async def test_a_request_that_is_queued_in_uvicorn_is_answered_in_order(
    api: Harness, held_back: Callable[[], None], reject_short: str
) -> None:
    """The one behind it is for the fast path, and would be rejected at once if it did not wait."""
    async with connected(api) as client:
        client.writer.write(GET + request(chunk(), first=QUERY))
        assert await client.statuses(1) == [b"200"]
        client.deliver(request(chunk(4), reject_short))
        held_back()
        assert await client.statuses(2) == [b"200", b"429"]


async def test_lost_connection_cancels_a_request_with_another_queued_behind_it(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = asyncio.Event()

    async def process(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    monkeypatch.setattr(api.pipeline, "process", process)
    async with connected(api) as client:
        client.deliver(2 * request(chunk(), first=QUERY))
        client.writer.transport.abort()
        async with asyncio.timeout(60):
            await given_up.wait()


async def test_uvicorn_parses_a_few_pipelined_requests_at_a_time(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps an object for each parsed request until that is answered."""
    waiting: list[int] = []
    begins = HttpProtocol.on_headers_complete

    def watched(connection: HttpProtocol) -> None:
        begins(connection)
        waiting.append(len(connection.pipeline))

    monkeypatch.setattr(HttpProtocol, "on_headers_complete", watched)
    count = 4 * PIECE_BYTES // len(GET)
    async with connected(api) as client:
        client.writer.write(GET * count)
        assert set(await client.statuses(count)) == {b"200"}
    assert len(waiting) == count
    assert max(waiting) <= PIECE_BYTES / len(GET) + 1


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /health/live HTTP/1.1\r\n", b"x: %b\r\n" % (b"v" * 1000)),
        (b"GET /health/live HTTP/1.1\r\nx: ", b"v" * 1000),
        (b"GET /", b"a" * 1000),
        (b"\r\n", b"\r\n" * 500),
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"x: %b\r\n" % (b"v" * 1000)),
        (CHUNKED + b"1;x=", b"v" * 1000),
    ],
    ids=["lines", "one line", "an address", "empty lines", "trailers", "an extension"],
)
async def test_a_head_without_an_end_is_rejected(api: Harness, begin: bytes, more: bytes) -> None:
    async with connected(api) as client:
        client.writer.write(begin)
        pieces = 0
        while client.server.server_state.connections and pieces < 2 * MAX_HEAD_BYTES // len(more):
            client.writer.write(more)
            await asyncio.sleep(0)
            pieces += 1
        assert pieces > MAX_HEAD_BYTES // len(more)
        assert await client.statuses(1) == [b"431"]
        await client.is_cut_off()


async def test_the_limit_of_heads_does_not_apply_to_bodies(api: Harness) -> None:
    """Its length is rejected at once, its bytes are drained, and the next request is answered."""
    piece = b"400\r\n%b\r\n" % (b"x" * 0x400)
    async with connected(api) as client:
        client.writer.write(CHUNKED + piece * 400 + b"0\r\n\r\n" + request(chunk()))
        assert await client.statuses(2) == [b"413", b"200"]


@pytest.mark.parametrize(
    "last", [FAST["ahead"], SLOW["wrong body"]], ids=["fast path", "slow path"]
)
async def test_idle_connections_are_closed_and_busy_ones_are_not(api: Harness, last: bytes) -> None:
    async with connected(api) as client:
        connection = client.connection
        for sent in (request(chunk()), last):
            client.writer.write(sent)
            await answer(client.reader)
        client.pass_time(KEEP_ALIVE_S)
        assert not connection.transport.is_closing(), "it has just been used"
        client.deliver(request(chunk(4))[:-1])
        client.pass_time(2 * KEEP_ALIVE_S)
        assert not connection.transport.is_closing(), "a request is on its way"
        client.writer.write(request(chunk(4))[-1:])
        assert await client.statuses(1) == [b"200"]
        client.pass_time(KEEP_ALIVE_S + 1)
        await client.is_cut_off()


async def test_a_connection_is_not_idle_while_a_request_is_processed(
    api: Harness, held_back: Callable[[], None], reject_short: str
) -> None:
    """Also if a rejected request arrived together with it."""
    async with connected(api) as client:
        client.deliver(request(chunk(), reject_short) + request(chunk()))
        assert await client.statuses(1) == [b"429"]
        client.pass_time()
        held_back()
        assert await client.statuses(1) == [b"200"]


@pytest.mark.parametrize(
    ("head", "status"),
    [(b"Host: x\r\nExpect: 1", b"417"), (b"X: 1", b"400"), (b"Host: x\r\nX : 1", b"400")],
    ids=["expectation", "no host", "syntax"],
)
async def test_a_rejected_head_is_not_answered_with_the_error_of_the_request_before_it(
    api: Harness, head: bytes, status: bytes
) -> None:
    """The second head is parsed while the first request is being answered."""
    missing = request(b"", first="DELETE /v1/models/probe/streams/missing HTTP/1.1", length="X: 1")
    missing = missing[:-2] + b"X: %b\r\n\r\n" % (b"1" * (PIECE_BYTES - len(missing) - 5))
    async with connected(api) as client:
        client.writer.write(missing + b"GET /health/live HTTP/1.1\r\n%b\r\n\r\n" % head)
        assert await client.statuses(2) == [b"404", status]
        await client.is_cut_off()


@pytest.mark.parametrize("before", [b"", GET], ids=["first", "second"])
async def test_an_address_without_a_path_is_answered(api: Harness, before: bytes) -> None:
    """uvicorn by itself fails on it."""
    async with connected(api) as client:
        client.writer.write(before + b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n")
        expected = [b"200", b"400"] if before else [b"400"]
        assert await client.statuses(len(expected)) == expected
        await client.is_cut_off()


async def test_a_rejected_body_that_does_not_arrive_expires(
    api: Harness,
) -> None:
    """It was rejected by its length."""
    async with connected(api) as client:
        client.writer.write(request(b"", length="Content-Length: 1000000"))
        assert await client.statuses(1) == [b"413"]
        client.pass_time()
        await client.is_cut_off()
