"""Pipelined connection: matching of replies, and closed connections."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import pytest

from service.core.errors import OutcomeUnknown
from service.store.redis.commands import PendingCommand, Script
from service.store.redis.connections import (
    ConnectionFactory,
    drop_unsent_on_close,
    transport_of,
)
from service.store.redis.outcomes import ReplyLost, ServerReply
from service.store.redis.pipelined_connection import PipelinedConnection, ReplyReader
from service.store.settings import StoreSettings
from tests.support.servers import (
    KINDS,
    RealServer,
    free_port,
    opened,
    real_server,
    until,
)
from tests.support.streams import Streams, columns, committed, key, load


@asynccontextmanager
async def connected_to(server: RealServer) -> AsyncIterator[PipelinedConnection]:
    connection = PipelinedConnection(ConnectionFactory(StoreSettings(server.url)))
    try:
        yield connection
    finally:
        await connection.close()


async def test_resending_an_abandoned_request_keeps_replies_matched(
    server: RealServer,
) -> None:
    """The server replies NOSCRIPT after the caller has cancelled the request."""
    script = Script(b"return ARGV[1]", "0" * 40)
    async with connected_to(server) as connection:
        for round_ in range(20):
            abandoned = PendingCommand.for_script(script, [], [f"abandoned {round_}"])
            connection.send([abandoned])
            if round_ == 0:
                await _connected(server)
            abandoned.future.cancel()
            others = [PendingCommand.of("ECHO", f"{round_}.{number}") for number in range(5)]
            for other in others:
                connection.send([other])
                # The first follows the error, the last follows the fallback.
                await asyncio.wait({other.future}, timeout=60)
            for number, other in enumerate(others):
                assert other.future.result() == ServerReply(f"{round_}.{number}".encode(), False)
        assert connection.is_idle


@pytest.mark.parametrize("step", [1, 100])
async def test_a_push_message_is_no_reply(step: int) -> None:
    """A proxy may pass on what no request asked for."""
    replies: list[Any] = []
    reader = ReplyReader(Mock(), replies.append)
    received = b":1\r\n>2\r\n+invalidate\r\n*1\r\n+key\r\n:2\r\n"
    for at in range(0, len(received), step):
        reader.data_received(received[at : at + step])
    assert replies == [1, 2]
    assert not reader.ended.done()


async def test_requests_taken_over_keep_their_attempts(own_server: RealServer) -> None:
    """Sent requests become retries; a WAIT has no meaning on another connection."""
    async with connected_to(own_server) as connection:
        known = PendingCommand.of("PING")
        connection.send([known])
        await known.future
        own_server.signal(signal.SIGSTOP)
        sent, bound, asking, abandoned = (PendingCommand.of("ECHO", word) for word in "abcd")
        bound.is_connection_bound = asking.needs_asking = True
        connection.send([sent, bound, asking, abandoned])
        abandoned.future.cancel()
        assert connection.is_responsive
        assert connection.take_pending() == [sent, asking]
        assert [request.is_retry for request in (sent, asking)] == [True, True]
        assert isinstance(bound.future.result(), ReplyLost)
        assert connection.is_idle
        assert not connection.is_responsive
        own_server.signal(signal.SIGCONT)
        # The connection is not used again: late replies are ignored.
        later = PendingCommand.of("ECHO", "later")
        connection.send([later])
        assert await later.future == ServerReply(b"later", False)
        assert not any(request.future.done() for request in (sent, asking))


async def test_unsent_requests_taken_over_are_no_retries(server: RealServer) -> None:
    async with connected_to(server) as connection:
        unsent = PendingCommand.of("ECHO", "a")
        connection.send([unsent])
        assert connection.take_pending() == [unsent]
        assert not unsent.is_retry


async def _connected(server: RealServer) -> None:
    def script_asked() -> bool:
        with server.client() as client:
            return "cmdstat_evalsha" in client.info("commandstats")

    await asyncio.to_thread(until, script_asked, "the script's request")


def on_stock_asyncio(work: Callable[[list[dict[str, Any]]], Coroutine[Any, Any, None]]) -> None:
    """Run work on the standard library's event loop and check that no callback fails."""
    failures: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(context)
        )
        await work(failures)

    loop = asyncio.SelectorEventLoop
    with asyncio.Runner(loop_factory=loop) as runner:  # noqa: TID251 - the loop under test
        runner.run(watched())
    assert failures == []


def test_writes_to_a_closed_transport_do_not_break_the_next_connection(
    server: RealServer, streams: Streams
) -> None:
    """On stock asyncio a second write registered the socket of a closed transport."""

    async def cut_before_two_requests(failures: list[dict[str, Any]]) -> None:
        async with opened(server.url, store_wait_s=60) as store:
            assert await load(store, [key("a")]) == [None]
            with server.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
            reads = asyncio.gather(*(load(store, [key(name)]) for name in "abc"))
            done, _ = await asyncio.wait({reads}, timeout=60)
            assert done, failures
            assert await reads == [[None]] * 3

    on_stock_asyncio(cut_before_two_requests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("over_tcp", "floats"), [(False, 1_000_000), (True, 100_000)])
async def test_unsent_bytes_of_an_aborted_connection_are_discarded(
    kind: str, over_tcp: bool, floats: int, streams: Streams
) -> None:
    """More bytes than a stopped server accepts: the process or the kernel buffers the rest."""
    port = free_port()
    with real_server(kind, "--bind", "127.0.0.1", "--port", str(port)) as server:
        url = f"redis://127.0.0.1:{port}" if over_tcp else server.url
        async with opened(url) as store:
            await committed(store, streams.creation(key("known")))
            server.signal(signal.SIGSTOP)
            large = columns(streams.creation(key("a"), floats=floats))
            (result,) = await store.commit(large, time.monotonic() + 0.1)
            assert isinstance(result, OutcomeUnknown)
        server.signal(signal.SIGCONT)

        def left_alone() -> bool:
            with server.client() as client:
                return len(client.client_list()) == 1

        # Otherwise this loop, or the kernel, would now send the rest.
        await asyncio.to_thread(until, left_alone, "the end of the store's connections")
        with server.client() as client:
            assert client.keys("*:s:*:a") == []


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
async def test_tcp_user_timeout_is_shorter_than_a_tombstones_lifetime() -> None:
    port = free_port()
    with real_server("valkey", "--bind", "127.0.0.1", "--port", str(port)):
        for wait_s, tombstone_ttl_s, expected_ms in ((3.0, 600, 3_000), (30.0, 9, 9_000)):
            url = f"redis://127.0.0.1:{port}"
            settings = StoreSettings(url, store_wait_s=wait_s, tombstone_ttl_s=tombstone_ttl_s)
            connection = ConnectionFactory(settings).create_connection()
            await connection.connect()
            drop_unsent_on_close(connection)
            given = transport_of(connection).get_extra_info("socket")
            assert given.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            linger = given.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
            assert linger == struct.pack("ii", 1, 0)
            limit_ms = given.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert limit_ms == expected_ms
            await connection.disconnect()
