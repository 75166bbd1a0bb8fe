"""Wrong frames, slow readers, silent clients and the end of the service."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, CloseCode, Frame, Opcode

from service.codec.request_reader import RequestReader
from service.core.errors import StoreUnavailable, Unauthenticated
from service.pipeline.pipeline import Pipeline
from service.server import connections as connections_module
from service.server import websocket_protocol
from service.server.connections import LINGER_S, Phase
from service.server.settings import ConnectionSettings
from service.server.websocket_protocol import WebSocketProtocol
from tests.service.transports.live.sockets import (
    Sockets,
    binary,
    error,
    live,
    outcome,
    reply,
    text,
)
from tests.service.transports.live.test_handshakes import SECURITY, UPGRADE, handshake
from tests.service.transports.v1.harness import Harness, rows
from tests.service.transports.v1.raw_http import HOST, check, port_of
from tests.support.servers import becomes

UNREAD = 300
"""Chunks whose outcomes exceed what is buffered for a client."""


async def closed(client: ClientConnection, code: int) -> str:
    """Wait until the socket is closed with that code; the reason."""
    with suppress(ConnectionClosed):
        async with asyncio.timeout(60):
            async for _ in client:
                pass
    assert client.close_code == code
    return client.close_reason or ""


def expire(api: Harness, sockets: Sockets, phase: Phase) -> None:
    """Let the timeout of the one socket's phase pass."""
    [served] = sockets.served()
    assert served.phase is phase
    served.expire(phase)


@asynccontextmanager
async def unread(sockets: Sockets) -> AsyncIterator[tuple[ClientConnection, WebSocketProtocol]]:
    """A client that sends chunks and reads nothing, behind small buffers, once that is noticed."""
    with socket.socket() as unconnected:
        unconnected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unconnected.connect((HOST, port_of(sockets.server)))
        async with sockets.open(max_queue=1, sock=unconnected) as (client, _):
            client.transport.pause_reading()
            [served] = sockets.served()
            of_server = served.transport.get_extra_info("socket")
            of_server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            served.transport.set_write_buffer_limits(high=16 * 1024)

            async def feed() -> None:
                with suppress(ConnectionClosed):
                    for at in range(UNREAD):
                        await client.send(text(rows(20), 20 * at))

            feeding = asyncio.create_task(feed())
            await becomes(lambda: served.phase is Phase.SEND, "an unread socket")
            yield client, served
            await feeding


@asynccontextmanager
async def raw(sockets: Sockets) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """The bytes of a socket, after its handshake."""
    reader, writer = await asyncio.open_connection(HOST, port_of(sockets.server))
    writer.write(handshake(*UPGRADE, *SECURITY))
    assert b" 101 " in await reader.readline()
    try:
        async with asyncio.timeout(60):
            yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()
        await sockets.ended()


async def half_close(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *frames: str
) -> None:
    """Send frames, and then nothing more; returns once the server probes the connection."""
    for frame in frames:
        writer.write(Frame(Opcode.TEXT, frame.encode()).serialize(mask=True))
    writer.write_eof()
    await reader.readuntil(Frame(Opcode.PING, b"carry").serialize(mask=False))


LONG = "x" * 70_000
WRONG_FRAMES = {
    "nothing": ("", "malformed_body", None),
    "a list": ("[]", "invalid_input", None),
    "wrong width": (text(rows(2, features=2), 0, id=1), "invalid_input", 1),
    "long id": (text(rows(1), id="x" * 129), "invalid_input", None),
    "large id": ('{"id": 9223372036854775808, "inputs": [[0, 0, 0]]}', "invalid_input", None),
    "another stream": (text(rows(2), 0, stream="other"), "invalid_input", None),
    "if_match of another type": (text(rows(2), 0, if_match=3), "invalid_input", None),
    "garbage": (bytes(range(256)), "malformed_body", None),
    "bytes after the document": (binary(rows(2), 0, id=1) + b"\x00", "malformed_body", None),
    "packed string in place of bytes": (b"\x82\xa2id\x01\xa6inputs\xa3abc", "invalid_input", 1),
    "deep": (b'{"id":' + b"[" * 5000, "malformed_body", None),
    "deep text": ('{"id":' + "[" * 5000, "malformed_body", None),
    "too many steps": (text(rows(11_000), 0, id=1), "chunk_too_long", 1),
    "long, id last": ('{"inputs": [[0, 0, "' + LONG + '"]], "id": 3}', "invalid_input", 3),
    "long, id twice": ('{"id": 4, "x": "' + LONG + '", "id": 5}', "invalid_input", 5),
    "long, no JSON": ('{"id": 6, "inputs": [[' + LONG, "malformed_body", None),
    "long, a list": ("[" + " " * 70_000 + "]", "invalid_input", None),
    "packed": (binary(rows(70_000), 0, id=7), "chunk_too_long", 7),
    "packed garbage": (b"\x83\xa2id\x08\xc1" + bytes(70_000), "malformed_body", None),
    "no map": (bytes(70_000), "malformed_body", None),
    "cut": (b"\x85" + b"\xa1a\xda\xff\xff" + bytes(65_535), "malformed_body", None),
}  # fmt: skip


async def test_a_wrong_frame_is_answered_and_leaves_the_socket_usable(large_api: Harness) -> None:
    async with live(large_api) as sockets, sockets.open() as (client, _):
        for position, (name, (frame, code, frame_id)) in enumerate(WRONG_FRAMES.items()):
            await client.send(frame)
            problem = await error(client, code)
            assert (problem["id"], problem["stream"]) == (frame_id, "s"), name
            await client.send(text(rows(1), position))
            assert (await reply(client))["position"] == position + 1


def unchecked(*frames: Frame, mask: bool = True) -> bytes:
    """The bytes of these frames, which may be invalid."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Frame, "check", lambda _: None)
        return b"".join(frame.serialize(mask=mask) for frame in frames)


NOT_UTF_8 = b'{"id": "\xff"}'
CLOSES = {
    "reserved bit": (unchecked(Frame(Opcode.TEXT, b"{}", rsv1=True)), 1002, ""),
    "continuation of nothing": (unchecked(Frame(Opcode.CONT, b"{}")), 1002, ""),
    "long ping": (unchecked(Frame(Opcode.PING, b"x" * 126)), 1002, ""),
    "fragmented ping": (unchecked(Frame(Opcode.PING, b"x", fin=False)), 1002, ""),
    "unmasked": (unchecked(Frame(Opcode.TEXT, b"{}"), mask=False), 1002, "mask"),
    "not UTF-8": (unchecked(Frame(Opcode.TEXT, NOT_UTF_8)), 1007, "UTF-8"),
    "not UTF-8, in fragments": (
        unchecked(Frame(Opcode.TEXT, NOT_UTF_8[:9], fin=False), Frame(Opcode.CONT, NOT_UTF_8[9:])),
        1007,
        "UTF-8",
    ),
    "too long": (unchecked(Frame(Opcode.TEXT, b"x" * 20_001)), 1009, "20000"),
    "too long, in fragments": (
        unchecked(
            Frame(Opcode.TEXT, b"x" * 7_000, fin=False),
            *[Frame(Opcode.CONT, b"x" * 7_000, fin=False)] * 2,
        ),
        1009,
        "20000",
    ),
}


@pytest.mark.parametrize(("sent", "code", "reason"), CLOSES.values(), ids=CLOSES)
async def test_invalid_frames_close_the_socket_and_nothing_is_lost(
    api: Harness, sent: bytes, code: int, reason: str
) -> None:
    async with live(api) as sockets:
        async with sockets.open() as (client, _):
            await client.send(text(rows(2), 0))
            assert (await reply(client))["position"] == 2
            client.transport.write(sent)
            assert reason in await closed(client, code)
        await sockets.ended()


async def test_a_client_that_keeps_a_closed_socket_is_disconnected(api: Harness) -> None:
    connections = api.http_state().connections
    async with live(api) as sockets, raw(sockets) as (reader, writer):
        writer.write(CLOSES["unmasked"][0])
        assert (await reader.read()).count(b"mask") == 1
        assert sockets.served()[0].phase is Phase.LINGER
        now_s = asyncio.get_running_loop().time()
        check(connections, now_s)
        check(connections, now_s + LINGER_S + 1)
        await sockets.ended()


async def test_a_fragmented_message_is_one_frame(api: Harness) -> None:
    """Even a character may be split."""
    message = '{"id": "\u00e9", "position": 0, "inputs": [[0, 0, 0]]}'.encode()
    parts = [message[at : at + 1] for at in range(len(message))]
    frames = [Frame(Opcode.CONT, part, fin=False) for part in parts]
    frames[0].opcode, frames[-1].fin = Opcode.TEXT, True
    async with live(api) as sockets, sockets.open() as (client, _):
        client.transport.write(unchecked(*frames))
        assert (await outcome(client))["id"] == "\u00e9"
        assert sockets.served()[0].body_bytes == 0


async def test_an_incomplete_message_expires_or_is_shed(api: Harness) -> None:
    connections = api.http_state().connections
    part = Frame(Opcode.TEXT, b"x" * 5000).serialize(mask=True)[:4000]
    async with live(api) as sockets:
        async with sockets.open() as (client, _):
            client.transport.write(part)
            await becomes(lambda: sockets.served()[0].phase is Phase.BODY, "a part of a message")
            assert sockets.served()[0].body_bytes > 0
            expire(api, sockets, Phase.BODY)
            assert "in time" in await closed(client, 1008)
        await sockets.ended()
        connections.limits = ConnectionSettings(max_pending_body_bytes=1000)
        async with sockets.open() as (client, _):
            client.transport.write(part)
            await closed(client, 1013)


async def test_message_that_arrives_byte_by_byte_expires(api: Harness) -> None:
    connections = api.http_state().connections
    part = Frame(Opcode.TEXT, b"x" * 5000).serialize(mask=True)[:4000]
    async with live(api) as sockets, sockets.open() as (client, _):
        client.transport.write(part[:-1])
        await becomes(lambda: sockets.served()[0].phase is Phase.BODY, "a part of a message")
        [served] = sockets.served()
        now_s = asyncio.get_running_loop().time()
        check(connections, now_s)
        received = served.received_bytes
        client.transport.write(part[-1:])
        await becomes(lambda: served.received_bytes > received, "another byte")
        check(connections, now_s + 3600)
        assert "in time" in await closed(client, 1008)


async def test_tiny_frames_are_bounded_by_one_piece(
    api: Harness, held_back: Callable[[], None]
) -> None:
    async with live(api) as sockets, sockets.open() as (client, hello):
        await client.send(text(rows(1), 0))
        await becomes(lambda: sockets.served()[0].session.unanswered == 1, "a chunk")
        client.transport.write(Frame(Opcode.TEXT, b"").serialize(mask=True) * 100_000)
        [served] = sockets.served()
        await becomes(lambda: served.session.unanswered >= hello["window"], "a full window")
        assert served.read_paused
        assert served.session.unanswered == hello["window"]
        assert len(served._received) <= websocket_protocol.PIECE_BYTES // 6
        client.transport.abort()
        held_back()
        await sockets.ended()


async def test_a_client_that_does_not_read_is_not_read_either_and_loses_nothing(
    api: Harness,
) -> None:
    async with live(api) as sockets, unread(sockets) as (client, served):
        await becomes(lambda: not served.session.unanswered, "the outcomes of what was read")
        received = served.session.chunks
        for _ in range(200):
            await asyncio.sleep(0)
        assert served.session.chunks == received
        assert served.read_paused
        assert served.unsent_bytes < 64 * 1024
        client.transport.resume_reading()
        for at in range(UNREAD):
            assert (await reply(client))["position"] == 20 * (at + 1)
    assert api.position() == 20 * UNREAD


async def test_a_client_that_never_reads_is_disconnected(api: Harness) -> None:
    async with live(api) as sockets, unread(sockets) as (client, _):
        expire(api, sockets, Phase.SEND)
        await sockets.ended()
        client.transport.abort()


async def test_a_socket_is_closed_once_a_ping_is_not_answered(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections_module, "CHECK_INTERVAL_S", 3600.0)
    connections = api.http_state().connections
    connections.limits = ConnectionSettings(websocket_ping_s=0.001)
    async with live(api) as sockets, sockets.open() as (client, _):
        [served] = sockets.served()
        times = itertools.count(asyncio.get_running_loop().time())
        check(connections, next(times))
        for _ in range(3):
            received = served.received_bytes
            check(connections, next(times))
            await becomes(lambda seen=received: served.received_bytes > seen, "the pong")
            check(connections, next(times))
        client.transport.pause_reading()
        for _ in range(3):
            check(connections, next(times))
        client.transport.resume_reading()
        assert "ping" in await closed(client, 1011)


async def test_a_socket_without_chunks_is_closed(api: Harness) -> None:
    """Even if the client sends pings."""
    state = api.http_state()
    api.app.state.http = state._replace(websockets=state.websockets._replace(idle_s=3600.0))
    async with live(api) as sockets, sockets.open() as (client, _):
        [served] = sockets.served()
        served._last_message_s -= 3601
        await (await client.ping())
        expire(api, sockets, Phase.LIVE)
        assert "no chunk for 3600 s" in await closed(client, 1001)


async def test_a_drain_answers_what_was_started_and_sends_clients_elsewhere(
    api: Harness, held_back: Callable[[], None]
) -> None:
    async with live(api) as sockets:
        async with sockets.open() as (client, _), sockets.open("probe/live") as (idle, _):
            await client.send(text(rows(2), 0))
            await becomes(lambda: any(s.session.unanswered for s in sockets.served()), "a chunk")
            for each in sockets.served():
                each.shutdown()
            await client.send(text(rows(2), 2))
            assert "connect again" in await closed(idle, 1012)
            held_back()
            assert (await reply(client))["position"] == 2
            await closed(client, 1012)
        await sockets.ended()
    assert api.position() == 2


async def test_a_client_that_half_closes_gets_its_outcomes(
    api: Harness, held_back: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pings before them, which detect a client that disconnected."""
    monkeypatch.setattr(websocket_protocol, "PROBE_S", 0.001)
    async with live(api) as sockets, raw(sockets) as (reader, writer):
        await half_close(reader, writer, *[text(rows(1), at, id=f"n{at}") for at in range(3)])
        held_back()
        received = await reader.read()
        outcomes = [received.index(b'"id":"n%d"' % at) for at in range(3)]
        assert outcomes == sorted(outcomes)
        assert received.endswith(Close(CloseCode.NORMAL_CLOSURE, "").serialize())
        assert api.position() == 3


@pytest.mark.parametrize("reason", ["revoked", "too many bytes"])
async def test_connection_whose_client_half_closed_ends_with_its_socket(
    api: Harness, held_back: Callable[[], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client cannot answer the close frame."""
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, each: failures.append(each))
    monkeypatch.setattr(websocket_protocol, "PROBE_S", 0.001)
    async with live(api) as sockets, raw(sockets) as (reader, writer):
        await half_close(reader, writer, text(rows(1), 0))
        [served] = sockets.served()
        if reason == "revoked":
            served.session.revoke(Unauthenticated("revoked"))
        else:
            served.shed_body()
        assert reason.encode() in await reader.read()
    held_back()
    assert not failures


async def test_frames_that_are_not_parsed_at_a_half_close_are_answered(api: Harness) -> None:
    async with live(api) as sockets, sockets.open() as (client, _):
        [served] = sockets.served()
        served.data_received(Frame(Opcode.TEXT, text(rows(1), 0).encode()).serialize(mask=True))
        assert served.eof_received(), "the connection is closed"
        assert (await reply(client))["position"] == 1


async def test_a_socket_whose_key_cannot_be_checked_may_be_opened_later(api: Harness) -> None:
    async with live(api) as sockets, sockets.open() as (client, _):
        [served] = sockets.served()
        served.session.revoke(StoreUnavailable("no answer"))
        assert await closed(client, CloseCode.TRY_AGAIN_LATER) == "no answer"


@pytest.mark.parametrize("how", ["write_eof", "abort"])
async def test_disconnect_without_a_chunk_ends_the_socket(
    api: Harness, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async with live(api) as sockets, sockets.open() as (client, _):
        getattr(client.transport, how)()
        await sockets.ended()
    assert "a WebSocket failed" not in caplog.text


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_chunks_of_a_client_that_disconnected_are_dropped(
    api: Harness,
    held_back: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """The end of its sending side looks like that of a client that waits for outcomes."""
    monkeypatch.setattr(websocket_protocol, "PROBE_S", 0.001)
    async with live(api) as sockets:
        async with sockets.open() as (client, _):
            for at in range(5):
                await client.send(text(rows(1), at))
            await becomes(lambda: sockets.served()[0].session.unanswered == 5, "its chunks")
            getattr(client.transport, how)()
            await sockets.ended()
        held_back()
        async with sockets.open("probe/streams/other/live") as (client, _):
            await client.send(text(rows(1), 0))
            await reply(client)
            client.transport.abort()
        await sockets.ended()
    assert (api.position() or 0) < 5
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


@pytest.mark.parametrize("broken", [(RequestReader, "frame"), (Pipeline, "enqueue")])
async def test_an_unexpected_failure_is_a_frame(
    api: Harness, monkeypatch: pytest.MonkeyPatch, broken: tuple[type, str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    async with live(api) as sockets, sockets.open() as (client, _):
        with monkeypatch.context() as patch:
            patch.setattr(*broken, fail)
            await client.send(text(rows(1), 0, id=4))
            problem = await error(client, "internal_error")
        assert problem["id"] == 4
        assert "a defect" not in json.dumps(problem)
        await client.send(orjson.dumps({"inputs": rows(1).tolist(), "position": 0}).decode())
        await reply(client)


async def test_a_flood_of_control_frames_takes_turns_with_other_work(api: Harness) -> None:
    flood = Frame(Opcode.PONG, b"").serialize(mask=True) * 10_000
    async with live(api) as sockets, sockets.open() as (client, _):
        [served] = sockets.served()
        served.data_received(flood)
        turns = 0
        while turns == 0 or served.read_paused:
            turns += 1
            await asyncio.sleep(0)
        assert turns >= len(flood) // websocket_protocol.PIECE_BYTES
        await client.send(text(rows(1), 0))
        assert (await reply(client))["position"] == 1


async def test_pings_are_answered_as_fast_as_their_pongs_are_read(api: Harness) -> None:
    flood = Frame(Opcode.PING, b"x" * 125).serialize(mask=True) * 1000
    async with live(api) as sockets, sockets.open() as (client, _):
        [served] = sockets.served()
        client.transport.pause_reading()
        for _ in range(100):
            client.transport.write(flood)
        await becomes(lambda: served._is_write_paused and served.read_paused, "a full buffer")
        received, unsent = served.received_bytes, served.unsent_bytes
        for _ in range(1000):
            await asyncio.sleep(0)
        assert (served.received_bytes, served.unsent_bytes) == (received, unsent)
        assert served.phase is Phase.SEND
        client.transport.resume_reading()
        await becomes(lambda: served.received_bytes == 100 * len(flood), "every ping")
        await client.send(text(rows(1), 0))
        assert (await reply(client))["position"] == 1
