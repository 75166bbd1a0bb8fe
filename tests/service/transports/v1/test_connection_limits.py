"""Limits on connections: idle and slow clients, their number, and buffered bytes.

Time passes by checking the connections with a later time; the sockets are real.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
import uvicorn
from structlog.testing import capture_logs

from service.server import connections as connections_module
from service.server.connections import (
    CHECKED_AT_ONCE,
    EXPIRY_COST,
    LINGER_S,
    MAX_REJECTED,
    Connections,
    Phase,
    client_network,
    limit_connections_to_open_files,
)
from service.server.interface import MAX_FAST_REQUEST_BYTES
from service.server.settings import ConnectionSettings
from tests.service.transports.v1.harness import Harness
from tests.service.transports.v1.raw_http import (
    PREDICT,
    QUERY,
    answer,
    check,
    chunk,
    connections_of,
    port_of,
    request,
    serving,
)
from tests.service.transports.v1.test_connections import Client, connected
from tests.support.servers import becomes

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LIMITS = ConnectionSettings()


@pytest.fixture(autouse=True)
def checked_by_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are checked by the test alone, however long it takes."""
    monkeypatch.setattr(connections_module, "CHECK_INTERVAL_S", 3600.0)


def limit(api: Harness, **limits: Any) -> Connections:
    """The application's connections, under other limits."""
    connections: Connections = api.http_state().connections
    connections.limits = replace(LIMITS, **limits)
    return connections


async def problem_of(client: Client) -> tuple[bytes, str]:
    """The status and the code of the next answer."""
    reply = await answer(client.reader)
    return reply[9:12], orjson.loads(reply.split(b"\r\n\r\n", 1)[1])["code"]


@pytest.mark.parametrize("sent", [b"", b"\r\n" * 9], ids=["nothing", "empty lines"])
async def test_an_idle_connection_is_closed(api: Harness, sent: bytes) -> None:
    async with connected(api) as client:
        client.deliver(sent)
        client.pass_time(LIMITS.keep_alive_s - 1)
        assert not client.connection.transport.is_closing()
        client.pass_time(LIMITS.keep_alive_s + 1)
        await client.is_cut_off()


SLOW_PARTS = {
    "first byte": (b"P", b"O", LIMITS.head_timeout_s),
    "first line": (request(chunk())[:40], request(chunk())[40:41], LIMITS.head_timeout_s),
    "body, fast path": (request(chunk())[:-1], b"", LIMITS.body_timeout_s + 1),
    "body, slow path": (request(chunk(), first=QUERY)[:-1], b"", LIMITS.body_timeout_s + 1),
}


@pytest.mark.parametrize(("part", "more", "timeout_s"), SLOW_PARTS.values(), ids=SLOW_PARTS)
async def test_a_slow_request_is_answered_with_a_timeout(
    api: Harness, part: bytes, more: bytes, timeout_s: float
) -> None:
    """Unread bytes would reset the answer."""
    async with connected(api) as client:
        client.deliver(part)
        client.pass_time(timeout_s - 1)
        assert client.connection.phase is not Phase.LINGER
        client.deliver(more)
        client.pass_time(timeout_s + 1)
        assert await problem_of(client) == (b"408", "request_timeout")
        client.writer.write(b"}" + request(chunk(), stream="after"))
        await client.writer.drain()
        assert not client.connection.transport.is_closing()
        client.pass_time(LINGER_S + 1)
        await client.is_cut_off()
    assert api.position("s") is api.position("after") is None


async def test_received_bytes_extend_the_body_timeout(api: Harness) -> None:
    """A second for every 16 KiB."""
    limit(api, body_timeout_s=1)
    head = request(b"", first=QUERY, length="Content-Length: 19999")
    async with connected(api) as client:
        client.deliver(head + b"x" * 16 * 1024)
        client.pass_time(2)
        assert client.connection.phase is Phase.BODY
        client.pass_time(3)
        assert await problem_of(client) == (b"408", "request_timeout")


async def test_a_client_that_does_not_read_is_disconnected(api: Harness) -> None:
    """After the timeout without any read, in every phase."""
    async with connected(api) as client:
        client.writer.write(request(chunk(None), stream="deaf") * 2000)
        await becomes(lambda: client.connection.flow.write_paused, "too much to send")
        client.pass_time(LIMITS.send_timeout_s)
        assert not client.connection.transport.is_closing()
        client.pass_time(LIMITS.send_timeout_s + 1)
        await becomes(lambda: not client.server.server_state.connections, "no connection")
        assert len(client.connections) == 0


async def test_a_closing_connection_whose_reply_is_not_read_is_aborted(api: Harness) -> None:
    """Its transport would wait forever for the client to read."""
    async with connected(api) as client:
        client.connection.transport.set_write_buffer_limits(10 * MAX_FAST_REQUEST_BYTES)
        client.connection.transport.write(b"x" * 8 * MAX_FAST_REQUEST_BYTES)
        client.connection.transport.close()
        client.pass_time(LIMITS.send_timeout_s)
        assert client.server.server_state.connections
        client.pass_time(LIMITS.send_timeout_s + 1)
        await becomes(lambda: not client.server.server_state.connections, "no connection")


@asynccontextmanager
async def several(server: uvicorn.Server) -> AsyncIterator[Callable[[], Awaitable[Streams]]]:
    """Opens connections to a server, which are closed at the end."""
    opened: list[Streams] = []

    async def open_one() -> Streams:
        opened.append(await asyncio.open_connection("127.0.0.1", port_of(server)))
        return opened[-1]

    try:
        yield open_one
    finally:
        for _, writer in opened:
            writer.close()
        closing = [writer.wait_closed() for _, writer in opened]
        await asyncio.gather(*closing, return_exceptions=True)


async def test_the_oldest_incomplete_bodies_are_rejected_over_the_limit(
    api: Harness,
) -> None:
    connections = limit(api, max_pending_body_bytes=70_000)
    part = request(b" " * 19_998, first=PREDICT, length="Content-Length: 19999")
    async with serving(api) as server, several(server) as open_one:
        clients = []
        for count in (1, 2, 3, 3):
            clients.append(await open_one())
            clients[-1][1].write(part)
            await becomes(lambda n=count: connections.body_bytes == n * 19_998, "its part")
        reply = await answer(clients[0][0])
        assert reply.startswith(b"HTTP/1.1 429 ")
        assert orjson.loads(reply.split(b"\r\n\r\n", 1)[1])["code"] == "overloaded"
        for reader, writer in clients[1:]:
            writer.write(b" ")
            assert (await answer(reader)).startswith(b"HTTP/1.1 400 ")
        assert connections.body_bytes == 0


async def test_a_connection_whose_body_was_shed_is_still_read(api: Harness) -> None:
    """Bytes that are not read would reset its reply."""
    limit(api, max_pending_body_bytes=70_000)
    head = request(b"", "Transfer-Encoding: chunked", first=PREDICT, length="")
    async with connected(api) as client:
        client.deliver(head + b"400\r\n%b\r\n" % (b" " * 1024) * 80)
        assert client.connection.phase is Phase.LINGER
        assert client.connection.transport.is_reading()
        assert await problem_of(client) == (b"429", "overloaded")


async def test_a_complete_body_is_not_rejected_for_incomplete_ones(
    api: Harness, held_back: Callable[[], None]
) -> None:
    """The complete one is the oldest, and its request is being processed."""
    connections = limit(api, max_pending_body_bytes=30_000)
    whole = request(chunk() + b" " * 18_000, first=QUERY)
    part = request(b" " * 18_000, first=PREDICT, length="Content-Length: 19999")
    async with serving(api) as server, several(server) as open_one:
        (reader, writer), (late_reader, late_writer) = await open_one(), await open_one()
        writer.write(whole)
        await becomes(lambda: any(c.requests for c in connections_of(server)), "a request")
        late_writer.write(part)
        assert (await answer(late_reader)).startswith(b"HTTP/1.1 429 ")
        held_back()
        assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
        assert connections.body_bytes == 0


async def test_small_incomplete_bodies_count_towards_the_limit(api: Harness) -> None:
    connections = limit(api, max_pending_body_bytes=10_000)
    part = request(chunk())[:-1]
    async with serving(api) as server, several(server) as open_one:
        clients = [await open_one() for _ in range(10_000 // len(part) + 1)]
        for _, writer in clients:
            writer.write(part)
        answered = [asyncio.create_task(answer(reader)) for reader, _ in clients]
        done, rest = await asyncio.wait(answered, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result()[9:12] for task in done] == [b"429"]
        assert connections.body_bytes <= 10_000
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


@pytest.mark.parametrize("first", ["", QUERY], ids=["fast path", "slow path"])
async def test_an_answered_request_buffers_nothing(api: Harness, first: str) -> None:
    sent = request(chunk(None), first=first)
    async with connected(api) as client:
        for _ in range(3):
            client.deliver(sent[:-1])
            assert client.connection.body_bytes > 0
            client.deliver(sent[-1:])
            assert await client.statuses(1) == [b"200"]
            assert client.connections.body_bytes == client.connection.body_bytes == 0


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        (("192.0.2.7", 4711), "192.0.2.7"),
        (("2001:db8:0:1:a::7", 4711, 0, 0), "2001:db8:0:1::/64"),
        (("2001:db8:0:1:b::8", 4711, 0, 0), "2001:db8:0:1::/64"),
        (("fe80::1%eth0", 4711, 0, 2), "fe80::/64"),
        (("::ffff:192.0.2.7", 4711, 0, 0), "192.0.2.7"),
        ("", ""),
        (None, ""),
    ],
)
def test_a_client_is_limited_by_its_address_or_network(peer: object, network: str) -> None:
    assert client_network(peer) == network


async def test_connections_of_one_address_over_its_limit_are_rejected(api: Harness) -> None:
    connections = limit(api, max_connections_per_address=2)
    async with serving(api) as server, several(server) as open_one:
        first, _, third = [await open_one() for _ in range(3)]
        reply = await third[0].read()
        assert reply.startswith(b"HTTP/1.1 503 ")
        assert b"at most 2 connections of a worker from 127.0.0.1" in reply
        third[1].close()
        first[1].close()
        await becomes(lambda: len(connections) == 1, "closed connections")
        reader, writer = await open_one()
        writer.write(request(chunk(None)))
        assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
        with capture_logs() as logs:
            check(connections, asyncio.get_running_loop().time())
        (line,) = logs
        assert (line["rejected_by_address"], line["addresses"]) == (1, {"127.0.0.1": 1})


async def test_connections_over_the_limit_are_rejected(api: Harness) -> None:
    connections = limit(api, max_connections=2)
    async with serving(api) as server, several(server) as open_one:
        clients = [await open_one() for _ in range(2)]
        await becomes(lambda: len(connections) == 2, "connections")
        clients += [await open_one() for _ in range(MAX_REJECTED + 3)]
        for reader, writer in clients[:2]:
            writer.write(request(chunk(None)))
            assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
        reply = await clients[2][0].read()
        assert reply.startswith(b"HTTP/1.1 503 ")
        assert orjson.loads(reply.split(b"\r\n\r\n", 1)[1])["code"] == "too_many_connections"
        assert await clients[-1][0].read() == b""
        now_s = asyncio.get_running_loop().time()
        with capture_logs() as logs:
            check(connections, now_s)
            check(connections, now_s + 1)
        assert [(line["event"], line["rejected"]) for line in logs] == [
            ("connections_closed", MAX_REJECTED + 3)
        ]


async def test_connection_is_active_unless_nobody_used_it_between_two_checks(api: Harness) -> None:
    connections = limit(api, max_connections=3, keep_alive_s=3600)
    async with serving(api) as server, several(server) as open_one:
        used, _ = [await open_one() for _ in range(2)]
        await becomes(lambda: len(connections) == 2, "connections")
        now_s = asyncio.get_running_loop().time()
        assert (connections.count_active(), connections.is_full) == (2, False)
        check(connections, now_s + 1)
        assert connections.count_active() == 0
        used[1].write(request(chunk(None)))
        await answer(used[0])
        check(connections, now_s + 2)
        assert connections.count_active() == 1
        _, writer = await open_one()
        await becomes(lambda: connections.is_full, "a full worker")
        assert connections.count_active() == 2
        check(connections, now_s + 3)
        check(connections, now_s + 4)
        assert connections.count_active() == 0
        writer.close()
        await becomes(lambda: not connections.is_full, "a closed connection")
        assert connections.count_active() == 0


async def test_unread_replies_are_shed_over_the_limit(
    api: Harness,
) -> None:
    """The connection that has waited longest for its client is closed first."""
    async with connected(api) as client:
        connections = limit(api, max_pending_reply_bytes=LIMITS.max_pending_reply_bytes)
        client.writer.write(request(chunk(None), stream="deaf") * 2000)
        await becomes(lambda: client.connection.flow.write_paused, "too much to send")
        now_s = asyncio.get_running_loop().time()
        check(connections, now_s)
        assert not client.connection.transport.is_closing()
        limit(api, max_pending_reply_bytes=1000)
        check(connections, now_s)
        await becomes(lambda: not client.server.server_state.connections, "no connection")


def test_connections_are_limited_by_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, expected in ((1024, 768), (100, 75), (resource.RLIM_INFINITY, 10_000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        with capture_logs() as logs:
            assert limit_connections_to_open_files(10_000) == expected
        assert bool(logs) == (expected < 10_000)
        assert limit_connections_to_open_files(50) == 50


def test_the_limit_on_open_files_is_raised() -> None:
    code = (
        "import resource\n"
        "from service.server.connections import raise_open_files_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))\n"
        "raise_open_files_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "(300, 300)\n"


class IdleConnection:
    """A connection on which nothing happens."""

    phase, progress, unsent_bytes, body_bytes, body_began_s = Phase.IDLE, 0, 0, 0, 0.0
    transport_name, requests = "http", 1

    def __init__(self) -> None:
        self.loop, self.transport = asyncio.get_running_loop(), Mock()
        self.expired = 0
        self.then: Callable[[], object] = int

    def expire(self, phase: Phase) -> None:
        self.expired += 1
        self.then()


async def test_many_connections_are_checked_in_several_turns_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections_module, "CHECK_INTERVAL_S", 0.05)
    connections = Connections(ConnectionSettings(keep_alive_s=0.001))
    loop = asyncio.get_running_loop()
    many = [IdleConnection() for _ in range(3 * CHECKED_AT_ONCE + 1)]
    for each in many:
        connections.add(each)
    between: list[int] = []

    def see_last() -> None:
        between.append(many[-1].expired)
        between.append(sum(each.expired for each in many))
        connections.remove(many[-2])

    many[0].then = lambda: loop.call_soon(see_last)
    await becomes(lambda: many[-1].expired > 0, "the last part")
    assert between[0] == 0
    # closing takes longer than checking, so that fewer are closed in a turn
    assert between[1] <= CHECKED_AT_ONCE // (1 + EXPIRY_COST)
    assert many[-2].expired == 0
    assert all(each.expired for each in many[:-2])
    for each in many:
        connections.remove(each)


async def test_connections_are_checked_again_after_a_check_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections_module, "CHECK_INTERVAL_S", 0.01)
    connections = Connections(ConnectionSettings(keep_alive_s=0.001))
    failing, other = IdleConnection(), IdleConnection()
    failing.then = lambda: connections.remove(failing) or 1 / 0
    for each in (failing, other):
        connections.add(each)
    with capture_logs() as logs:
        await becomes(lambda: other.expired > 0, "the next check")
    assert [line["event"] for line in logs] == ["connection_check_failed"]
    connections.remove(other)
