"""Connections whose client has closed its side, or disconnected, or sends more than is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from service.server import http_protocol
from service.server.connections import (
    Phase,
)
from service.server.heads import MAX_DRAIN_BYTES
from service.server.http_protocol import HttpProtocol
from tests.service.transports.v1.harness import Harness
from tests.service.transports.v1.raw_http import (
    PREDICT,
    QUERY,
    answer,
    chunk,
    connections_of,
    port_of,
    request,
    serving,
)
from tests.service.transports.v1.test_connections import connected
from tests.support.servers import becomes


@pytest.fixture
def half_closed(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a client has closed its side; its connection gets no interim responses."""
    monkeypatch.setattr(http_protocol, "PROBE_S", 3600)
    noticed, notice = asyncio.Event(), HttpProtocol.eof_received

    def eof_received(connection: HttpProtocol) -> bool | None:
        noticed.set()
        return notice(connection)

    monkeypatch.setattr(HttpProtocol, "eof_received", eof_received)
    return noticed


@pytest.mark.parametrize("first", ["", QUERY], ids=["fast path", "slow path"])
async def test_a_half_closed_connection_gets_its_reply(
    api: Harness, held_back: Callable[[], None], first: str, half_closed: asyncio.Event
) -> None:
    """For a reply that is ready at once, and for one that takes time."""
    async with connected(api) as client:
        client.writer.write(request(chunk(), first=first) + request(chunk(4), first=first))
        client.writer.write_eof()
        await half_closed.wait()
        held_back()
        assert await client.statuses(2) == [b"200", b"200"]
        await client.is_cut_off()
    assert api.position("s") == 8


async def test_a_half_closed_connection_gets_all_replies_however_late_it_reads(
    api: Harness, half_closed: asyncio.Event
) -> None:
    """Complete requests are buffered while replies wait to be read, and none is answered."""
    count = 150
    async with connected(api) as client:
        connection = client.connection
        connection.transport.set_write_buffer_limits(high=1)
        client.writer.write(request(chunk(None), stream="deaf") * count)
        client.writer.write_eof()
        await half_closed.wait()
        await becomes(
            lambda: connection.phase is Phase.SEND and not connection.requests, "too much to send"
        )
        assert connection.body_bytes > 0, "nothing is buffered"
        assert set(await client.statuses(count)) == {b"200"}
        await client.is_cut_off()


async def test_an_incomplete_request_before_eof_is_not_processed(api: Harness) -> None:
    async with connected(api) as client:
        client.writer.write(request(chunk()) + request(chunk(4))[:-1])
        client.writer.write_eof()
        assert await client.statuses(1) == [b"200"]
        await client.is_cut_off()
    assert api.position("s") == 4


async def test_a_disconnected_client_is_distinguished_from_a_half_closed_one(
    api: Harness, held_back: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By interim responses: a waiting client skips them, a disconnected one sends a reset."""
    monkeypatch.setattr(http_protocol, "PROBE_S", 0.01)
    async with connected(api) as client:
        client.writer.write(request(chunk()))
        client.writer.write_eof()
        assert await answer(client.reader) == http_protocol.CONTINUE
        held_back()
        replies = [await answer(client.reader)]
        while replies[-1] == http_protocol.CONTINUE:
            replies.append(await answer(client.reader))
        assert replies[-1].startswith(b"HTTP/1.1 200 ")
    async with serving(api) as server:
        monkeypatch.undo()
        monkeypatch.setattr(http_protocol, "PROBE_S", 0.01)
        gate = asyncio.Event()
        monkeypatch.setattr(api.pipeline, "process", lambda *_: gate.wait())
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(request(chunk(), first=QUERY))
        await becomes(lambda: any(c.requests for c in connections_of(server)), "a request")
        writer.close()
        await becomes(lambda: not server.server_state.connections, "no connection")


async def test_a_rejected_body_is_drained_up_to_a_limit(api: Harness) -> None:
    head = request(b"", first=PREDICT, length="Content-Length: 100000000")
    async with connected(api) as client:
        client.writer.write(head)
        assert await client.statuses(1) == [b"413"]
        sent = 0
        while client.connection.phase is not Phase.LINGER and sent < 4 * MAX_DRAIN_BYTES:
            client.writer.write(b"x" * 65536)
            await client.writer.drain()
            await asyncio.sleep(0)
            sent += 65536
        assert MAX_DRAIN_BYTES <= sent < 4 * MAX_DRAIN_BYTES
        await client.is_cut_off()


@pytest.mark.parametrize("is_announced", [False, True], ids=["asked for", "announced"])
async def test_bytes_after_the_last_request_do_not_reset_its_reply(
    api: Harness, is_announced: bool
) -> None:
    health = request(b"", "Connection: close", first="GET /health/live HTTP/1.1", length="")
    async with connected(api) as client:
        if is_announced:
            client.connections.announce_close()
        client.writer.write(request(chunk()) if is_announced else health)
        await becomes(lambda: client.connection.phase is Phase.LINGER, "a close")
        for _ in range(3):
            assert not client.connection.transport.is_closing()
            client.writer.write(b"x" * 100_000)
            await client.writer.drain()
        assert await client.statuses(1) == [b"200"]
        assert await client.reader.read() == b""


LONG_BODY = "Content-Length: 100000000"
REJECTED_HEADS = {
    # its body is not read
    "chunked": (("Transfer-Encoding: chunked",), "POST /v2 HTTP/1.1", "", 404),
    "close": (("Connection: close",), "POST /v2 HTTP/1.1", LONG_BODY, 404),
    "HTTP/1.0": ((), "POST /v2 HTTP/1.0", LONG_BODY, 404),
    # the next bytes could be its body or a request
    "expects": (("Expect: 100-continue",), "POST /v2 HTTP/1.1", LONG_BODY, 404),
    "expects, too long": (("Expect: 100-continue",), PREDICT, LONG_BODY, 413),
}


@pytest.mark.parametrize(
    ("lines", "first", "length", "status"), REJECTED_HEADS.values(), ids=REJECTED_HEADS
)
async def test_a_rejected_head_gets_one_reply_which_no_reset_destroys(
    api: Harness, lines: tuple[str, ...], first: str, length: str, status: int
) -> None:
    async with connected(api) as client:
        client.writer.write(request(b"", *lines, first=first, length=length))
        reply = await answer(client.reader)
        assert reply.startswith(b"HTTP/1.1 %d " % status)
        if length:
            assert b"\r\nconnection: close\r\n" in reply or first.endswith("1.0")
            assert client.connection.phase is Phase.LINGER
            assert not client.connection.transport.is_closing()
            client.writer.write(b"x" * 100_000)
        client.writer.write(b"no size\r\n" + request(chunk(), stream="behind"))
        await client.writer.drain()
        await client.is_cut_off()
    assert api.position("behind") is None
