"""Access keys of live sockets: at the handshake, for each chunk, and while they are open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.server import ServerProtocol

from models.artifact.artifact import Artifact
from service.access.caller import Verb
from service.access.limits import KeyLimits
from service.telemetry.access_log import RequestLine, access_log
from service.transports.live.session import UNAUTHENTICATED
from tests.service.transports.live.sockets import (
    Sockets,
    error,
    live,
    live_application,
    reply,
    text,
)
from tests.service.transports.v1.harness import Harness, rows
from tests.service.transports.v1.raw_http import converse, port_of
from tests.support.access import revoke
from tests.support.servers import RealServer, becomes

STREAM, MANY = "probe/streams/acme:1/live", "probe/live"


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    """An application that requires keys."""
    async with live_application(pipeline_server, models, requires_keys=True) as running:
        yield running


def with_key(authorization: str) -> dict[str, Any]:
    """Options of a client that sends the header."""
    return {"additional_headers": {"authorization": authorization}}


async def rejected(sockets: Sockets, path: str, **options: Any) -> int:
    """The status with which a handshake is rejected."""
    with pytest.raises(InvalidStatus) as caught:
        async with sockets.open(path, **options):
            pass
    response = caught.value.response
    challenges = response.headers.get("www-authenticate") is not None
    assert challenges == (response.status_code == 401)
    return response.status_code


async def test_handshake_needs_a_key_for_model_and_stream(api: Harness) -> None:
    key = await api.key(verbs=(Verb.PREDICT,), prefix="acme:")
    others = [
        await api.key(verbs=tuple(set(Verb) - {Verb.PREDICT})),
        await api.key(models=("small",)),
    ]
    async with live(api) as sockets:
        for path in (STREAM, MANY):
            assert await rejected(sockets, path) == 401
            assert await rejected(sockets, path, **with_key(key[:-1])) == 401
            for other in others:
                assert await rejected(sockets, path, **with_key(other)) == 403
            async with sockets.open(path, **with_key(key)):
                pass
            state = f"{path}?return_state=true"
            assert await rejected(sockets, state, **with_key(key)) == 403
            both = await api.key(verbs=(Verb.PREDICT, Verb.READ_STATE))
            async with sockets.open(state, **with_key(both)):
                pass
        assert await rejected(sockets, "probe/streams/b:1/live", **with_key(key)) == 403


async def test_long_lists_of_a_handshake_are_rejected_before_they_are_parsed(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing takes longer for longer lists; who has no key could block a worker with them."""
    monkeypatch.setattr(ServerProtocol, "accept", None)
    lists = {"Connection": "a," * 2000 + "Upgrade", "Sec-WebSocket-Protocol": "a," * 4000}
    async with live(api) as sockets:
        for name, items in lists.items():
            sent = f"GET /v1/models/{STREAM} HTTP/1.1\r\nHost: carry\r\nUpgrade: websocket\r\n"
            sent += f"Connection: Upgrade\r\n{name}: {items}\r\n\r\n"
            [answer] = await converse(port_of(sockets.server), sent.encode())
            assert answer.startswith(b"HTTP/1.1 400 ")


async def test_browser_sends_its_key_as_a_subprotocol(api: Harness) -> None:
    secret = (await api.key()).removeprefix("Bearer ")
    async with live(api) as sockets:
        offered = ["carry", f"carry.bearer.{secret}"]
        async with sockets.open(STREAM, subprotocols=offered) as (client, _):
            assert client.subprotocol == "carry"
            await client.send(text(rows(1), 0))
            await reply(client)
        wrong = ["carry", f"carry.bearer.{secret[:-1]}"]
        assert await rejected(sockets, STREAM, subprotocols=wrong) == 401
        assert await rejected(sockets, STREAM, subprotocols=["carry"]) == 401
        two = [*offered, f"carry.bearer.{secret[:-1]}0"]
        assert await rejected(sockets, STREAM, subprotocols=two) == 400
        also = with_key(await api.key())
        assert await rejected(sockets, STREAM, subprotocols=offered, **also) == 400


async def test_each_chunk_of_a_socket_for_many_streams_is_limited_to_the_prefix(
    api: Harness,
) -> None:
    key = await api.key(prefix="acme:")
    async with live(api) as sockets, sockets.open(MANY, **with_key(key)) as (client, _):
        await client.send(text(rows(1), 0, stream="acme:1"))
        await reply(client)
        await client.send(text(rows(1), 0, stream="b:1"))
        assert (await error(client, "forbidden"))["stream"] == "b:1"
        await client.send(text(rows(1), 1, stream="acme:1"))
        await reply(client)
    assert api.position("b:1") is None
    assert api.position("acme:1") == 2


async def test_lines_of_rejected_handshakes_and_frames_name_key_and_reason(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[RequestLine] = []
    monkeypatch.setattr(access_log, "level", logging.WARNING)
    monkeypatch.setattr(access_log, "render", lambda line: line)
    monkeypatch.setattr(access_log, "write", lines.append)
    key = await api.key(prefix="acme:", limits=KeyLimits(requests_per_s=0.001))
    key_id = key.split("_")[1]
    async with live(api) as sockets:
        assert await rejected(sockets, MANY, **with_key(f"{key[:-64]}{'0' * 64}")) == 401
        assert await rejected(sockets, "probe/streams/b/live", **with_key(key)) == 403
        async with sockets.open(MANY, **with_key(key)) as (client, _):
            await client.send(text(rows(1), 0, stream="b"))
            await error(client, "forbidden")
            await client.send(text(rows(1), 0, stream="acme:1"))
            await client.send(text(rows(1), 1, stream="acme:1"))
            await reply(client)
            await error(client, "limit_exceeded")
        await sockets.ended()
    reasons = ["wrong_secret", "stream", "stream", "requests_per_s"]
    assert [(line.key, line.reason) for line in lines] == [(key_id, each) for each in reasons]
    assert api.counts.rejected == [(key_id, each) for each in reasons]


async def test_socket_is_closed_when_its_key_is_revoked(api: Harness) -> None:
    key, other = await api.key(), await api.key()
    async with live(api) as sockets:
        async with (
            sockets.open(STREAM, **with_key(key)) as (client, _),
            sockets.open(MANY, **with_key(other)) as (stays, _),
        ):
            await revoke(api.store.keys, key)
            await api.refresh_keys()
            with pytest.raises(ConnectionClosed) as caught:
                async with asyncio.timeout(60):
                    await client.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == UNAUTHENTICATED
            await stays.send(text(rows(1), 0, stream="s"))
            await reply(stays)
        await sockets.ended()


async def test_queued_chunks_are_dropped_when_the_key_is_revoked(
    api: Harness, held_back: Callable[[], None]
) -> None:
    """Those in the window, those behind it, and also if the client does not answer the close."""
    key = await api.key()
    async with live(api) as sockets:
        async with sockets.open(STREAM, **with_key(key)) as (client, hello):
            for _ in range(2 * hello["window"]):
                await client.send(text(rows(1)))
            [socket] = sockets.served()
            await becomes(lambda: socket.session.unanswered == hello["window"], "its chunks")
            client.transport.pause_reading()
            await revoke(api.store.keys, key)
            await api.refresh_keys()
            for _ in range(50):
                await asyncio.sleep(0)
            held_back()
            # what is still queued is applied
            await api.pipeline.stop()
            client.transport.abort()
        await sockets.ended()
    assert (api.position("acme:1") or 0) <= 1


async def test_socket_that_was_opened_without_a_key_is_closed_once_there_is_one(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    async with (
        live_application(pipeline_server, models, requires_keys=False) as api,
        live(api) as sockets,
        sockets.open(STREAM) as (client, _),
    ):
        await client.send(text(rows(1), 0))
        await reply(client)
        await api.key()
        with pytest.raises(ConnectionClosed) as caught:
            async with asyncio.timeout(60):
                await client.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == UNAUTHENTICATED


async def test_limits_and_quota_of_a_key_hold_for_each_chunk_of_a_socket(api: Harness) -> None:
    few = await api.key(limits=KeyLimits(requests_per_s=0.001))
    one = await api.key(limits=KeyLimits(streams=1))
    async with live(api) as sockets:
        async with sockets.open(MANY, **with_key(few)) as (client, _):
            await client.send(text(rows(1), 0, stream="f"))
            await client.send(text(rows(1), 1, stream="f"))
            await reply(client)
            assert (await error(client, "limit_exceeded"))["limit"] == "requests_per_s"
        async with sockets.open(MANY, **with_key(one)) as (client, _):
            # pipelined: the first chunks of the stream wait for its registration
            for position in range(4):
                await client.send(text(rows(1), position, stream="q"))
            assert [(await reply(client))["position"] for _ in range(4)] == [1, 2, 3, 4]
            # not before: outcomes of two streams come in any order
            await client.send(text(rows(1), 0, stream="r"))
            rejected_chunk = await error(client, "limit_exceeded")
            assert (rejected_chunk["limit"], rejected_chunk["stream"]) == ("streams", "r")
    assert api.position("r") is None
