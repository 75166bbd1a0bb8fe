"""Handshakes: which requests open a socket, and how all others are answered."""

from __future__ import annotations

import asyncio
import json

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from service.core.errors import StoreUnavailable
from tests.service.transports.live.sockets import ORIGINS, Sockets, live
from tests.service.transports.v1.harness import Harness, problem
from tests.service.transports.v1.raw_http import HOST, answer, converse, port_of
from tests.support.servers import becomes

PATH = "/v1/models/probe/streams/s/live"
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket")
SECURITY = ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")


def handshake(*lines: str, first: str = f"GET {PATH} HTTP/1.1") -> bytes:
    """The bytes of a handshake."""
    return "\r\n".join([first, "Host: carry", *lines, "", ""]).encode()


async def exchange(sockets: Sockets, *parts: bytes, answers: int = 1) -> list[tuple[int, bytes]]:
    """Status and bytes of the responses to the parts."""
    responses = await converse(port_of(sockets.server), *parts, answers=answers)
    return [(int(each.split(b" ")[1]), each) for each in responses]


def code_of(response: bytes) -> str:
    """The code of a problem document."""
    code: str = json.loads(response.partition(b"\r\n\r\n")[2])["code"]
    return code


async def test_a_valid_handshake_switches_the_protocol(api: Harness) -> None:
    async with live(api) as sockets:
        [(status, head)] = await exchange(sockets, handshake(*UPGRADE, *SECURITY))
        async with sockets.open("probe/streams/a%3Ab/live") as (_, hello):
            assert hello["stream"] == "a:b"
    assert status == 101
    # RFC 6455, section 1.3
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
    assert b"Sec-WebSocket-Extensions" not in head


async def test_a_client_that_half_closes_after_its_handshake_is_answered(api: Harness) -> None:
    async with live(api) as sockets:
        reader, writer = await asyncio.open_connection(HOST, port_of(sockets.server))
        api.store.held = asyncio.Event()
        writer.write(handshake(*UPGRADE, *SECURITY))
        await becomes(lambda: api.store.holds > 0, "a read of the stream")
        writer.write_eof()
        # read after it, if it is read
        await exchange(sockets, handshake(first="GET /health/live HTTP/1.1"))
        api.store.held.set()
        response = await reader.read()
        writer.close()
    assert response.startswith(b"HTTP/1.1 101 ")


WRONG_HANDSHAKES = [
    ((*UPGRADE, SECURITY[0], "Sec-WebSocket-Version: 8"), 426, "upgrade_required"),
    ((*UPGRADE, SECURITY[0]), 400, "malformed_request"),
    ((*UPGRADE, SECURITY[1]), 400, "malformed_request"),
    ((*UPGRADE, "Sec-WebSocket-Key: c2hvcnQ=", SECURITY[1]), 400, "malformed_request"),
    ((*UPGRADE, *SECURITY, SECURITY[0]), 400, "malformed_request"),
    ((*UPGRADE, *SECURITY, SECURITY[1]), 400, "malformed_request"),
    (
        (*UPGRADE, *SECURITY, "Sec-WebSocket-Protocol: carry.bearer.secret/"),
        400,
        "malformed_request",
    ),
    (("Connection: Upgrade", "Upgrade: h2c", *SECURITY), 426, "upgrade_required"),
    *[
        ((*lines, *SECURITY, "Sec-WebSocket-Protocol: carry"), status, code)
        for items, status, code in (
            ("a," * 64, 400, "malformed_request"),
            ("a," * 30_000, 431, "head_too_large"),
        )
        for lines in (
            (f"Connection: Upgrade,{items}", UPGRADE[1]),
            (UPGRADE[0], f"Upgrade: websocket,{items}"),
            (*UPGRADE, f"Sec-WebSocket-Protocol: {items}"),
            (*UPGRADE, *[f"Sec-WebSocket-Protocol: {items[:1000]}"] * (len(items) // 1000 + 1)),
        )
    ],
    ((*UPGRADE, *SECURITY, "Sec-WebSocket-Extensions: " + "a," * 30_000), 431, "head_too_large"),
]


async def test_a_wrong_handshake_is_rejected_and_the_connection_closed(api: Harness) -> None:
    async with live(api) as sockets:
        for lines, status, code in WRONG_HANDSHAKES:
            [(got, response)] = await exchange(sockets, handshake(*lines))
            await sockets.ended()
            assert (got, code_of(response)) == (status, code), lines
            assert b"connection: close" in response
            assert b"secret" not in response
            assert (b"sec-websocket-version: 13" in response) == (status == 426)


async def test_a_request_without_an_upgrade_is_rejected_with_426(api: Harness) -> None:
    problem(await api.client.get(PATH), 426, "upgrade_required")
    problem(await api.client.get("/v1/models/probe/live"), 426, "upgrade_required")
    problem(await api.client.post(PATH), 405, "method_not_allowed")


NOT_PLAIN = {
    "length": handshake(*UPGRADE, *SECURITY, "Content-Length: 0"),
    "chunked": handshake(*UPGRADE, *SECURITY, "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "HTTP/1.0": handshake(*UPGRADE, *SECURITY, first=f"GET {PATH} HTTP/1.0"),
    "absolute": handshake(*UPGRADE, *SECURITY, first=f"GET http://carry{PATH} HTTP/1.1"),
    "no upgrade": handshake(*SECURITY),
    "POST": handshake(*UPGRADE, *SECURITY, first=f"POST {PATH} HTTP/1.1"),
    "another address": handshake(*UPGRADE, *SECURITY, first="GET /v1/models HTTP/1.1"),
}
OTHERWISE = {"POST": 405, "another address": 200}


async def test_an_upgrade_that_is_not_plain_is_ignored(api: Harness) -> None:
    async with live(api) as sockets:
        for name, request in NOT_PLAIN.items():
            [(status, response)] = await exchange(sockets, request)
            assert status == OTHERWISE.get(name, 426), name
            assert status != 426 or code_of(response) == "upgrade_required"
            assert not sockets.served()
        # behind a request that is not answered yet
        first = handshake(first="GET /v1/models HTTP/1.1")
        answers = await exchange(sockets, first + handshake(*UPGRADE, *SECURITY), answers=2)
        assert [status for status, _ in answers] == [200, 426]


async def test_bytes_after_a_handshake_are_not_read(api: Harness) -> None:
    smuggled = b"DELETE /v1/models/probe/streams/s HTTP/1.1\r\nHost: carry\r\n\r\n"
    await api.chunk({"inputs": [[0.0, 0.0, 0.0]]})
    async with live(api) as sockets:
        [(status, response)] = await exchange(sockets, handshake(*UPGRADE, *SECURITY) + smuggled)
    assert (status, code_of(response)) == (400, "malformed_request")
    assert api.position() == 1


async def test_a_handshake_may_follow_an_answered_request(api: Harness) -> None:
    async with live(api) as sockets:
        reader, writer = await asyncio.open_connection(HOST, port_of(sockets.server))
        writer.write(handshake(first="GET /health/live HTTP/1.1"))
        assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
        writer.write(handshake(*UPGRADE, *SECURITY))
        assert (await answer(reader)).startswith(b"HTTP/1.1 101 ")
        writer.close()
        await writer.wait_closed()


WRONG_ADDRESSES = {
    "nobody/streams/s/live": 404,
    "nobody/live": 404,
    "probe/streams/a%2Fb/live": 400,
    "probe/streams/s/live?return_state=perhaps": 422,
    "probe/streams/s/live?timeout_s=-1": 422,
    "probe/streams/s/live?unknown=1": 422,
    "probe/streams/s/live?return_state=1&return_state=1": 400,
}


async def test_a_wrong_address_is_a_problem_before_the_switch(api: Harness) -> None:
    async with live(api) as sockets:
        for path, status in WRONG_ADDRESSES.items():
            with pytest.raises(InvalidStatus) as raised:
                async with connect(sockets.url(path)):
                    pass
            response = raised.value.response
            assert response.status_code == status, path
            assert response.headers["content-type"] == "application/problem+json"
            assert json.loads(response.body)["status"] == status


OPENS = {
    "http://{host}": True,
    "https://{host}": True,
    ORIGINS: True,
    "http://{host}#evil": False,
    "http://{host}/": False,
    "http://evil@{host}": False,
    "https://evil.example.com": False,
    "http://{host}.evil.example.com": False,
    "http://127.0.0.1:1": False,
    "http://[": False,
    "null": False,
    "": False,
}


async def test_pages_of_other_origins_may_not_open_a_socket(api: Harness) -> None:
    async with live(api) as sockets:
        host = f"{HOST}:{port_of(sockets.server)}"
        for origin, opens in OPENS.items():
            lines = (*UPGRADE, *SECURITY, f"Origin: {origin.format(host=host)}")
            request = handshake(*lines).replace(b"Host: carry", f"Host: {host}".encode())
            [(status, response)] = await exchange(sockets, request)
            assert status == (101 if opens else 403), origin
            assert opens or code_of(response) == "origin_not_allowed"
        # which a page cannot set, and which a proxy does not change
        marked = ("Origin: https://public.example", "Sec-Fetch-Site: same-origin")
        assert (await exchange(sockets, handshake(*UPGRADE, *SECURITY, *marked)))[0][0] == 101


async def test_a_socket_of_an_unavailable_store_is_a_problem(api: Harness) -> None:
    api.store.away = StoreUnavailable("no answer")
    async with live(api) as sockets:
        with pytest.raises(InvalidStatus) as raised:
            async with connect(sockets.url("probe/streams/s/live")):
                pass
    assert raised.value.response.status_code == 503
