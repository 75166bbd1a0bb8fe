"""The fast path answers as the slow path does, and leaves every doubtful request to it.

Each request is sent to real servers: one with the fast path, one without it, and one with uvicorn's
own protocol. The responses are compared byte for byte, except for ids, tags and durations.
"""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httptools
import orjson
import pytest
import uvicorn
from structlog.testing import capture_logs
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from models.artifact.artifact import Artifact
from service import app
from service.access.caller import ANYONE
from service.core.errors import Overloaded
from service.server.heads import MAX_HEADERS, check_head
from service.server.http_protocol import HttpProtocol
from service.server.interface import HttpState
from service.transports.v1.fast_path import FastPath, FastRequest
from tests.service.engine.batching import patch_admission
from tests.service.transports.v1.corpus.heads import LISTED
from tests.service.transports.v1.corpus.requests import FAST, REJECTED, SLOW
from tests.service.transports.v1.harness import Harness
from tests.service.transports.v1.raw_http import (
    HOST,
    INPUTS,
    answer,
    chunk,
    connections_of,
    converse,
    port_of,
    request,
    serving,
)
from tests.support.pipelines import chunk_of
from tests.support.servers import becomes

_NEW = (
    (re.compile(rb"[0-9a-f]{16}-[0-9a-f]{32}"), b"ETAG"),
    (re.compile(rb'"(epoch|tag|request_id)":"[0-9a-f]+"'), b'"NEW"'),
    (re.compile(rb"(?<=epoch\xb0)[0-9a-f]{16}"), b"NEW"),
    (re.compile(rb"(?<=tag\xd9 )[0-9a-f]{32}"), b"NEW"),
    (re.compile(rb"(?<=request_id\xb0)[0-9a-f]{16}"), b"NEW"),
    (re.compile(rb"dur=[0-9.]+"), b"dur"),
    (re.compile(rb"x-request-id: [0-9a-f]{16}\r"), b"x-request-id: NEW\r"),
)


@dataclass
class Ports:
    """Three servers of one application, and the requests that the fast path parsed."""

    fast: int
    slow: int
    uvicorn: int
    parsed: list[FastRequest] = field(default_factory=list)


@pytest.fixture
async def ports(api: Harness, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ports]:
    parsed: list[FastRequest] = []
    parse = FastPath.parse

    def watched(fast_path: FastPath, data: bytes) -> Any:
        request = parse(fast_path, data)
        if isinstance(request, FastRequest):
            parsed.append(request)
        return request

    monkeypatch.setattr(FastPath, "parse", watched)
    async with (
        serving(api) as fast,
        serving(api, fast_path=False) as slow,
        serving(api, HttpToolsProtocol) as plain,
    ):
        yield Ports(port_of(fast), port_of(slow), port_of(plain), parsed)


def steady(reply: bytes) -> bytes:
    """A response without ids, tags and durations."""
    for pattern, stand_in in _NEW:
        reply = pattern.sub(stand_in, reply)
    return reply


@pytest.mark.parametrize("name", [*FAST, *SLOW])
async def test_all_servers_send_the_same_response(ports: Ports, name: str) -> None:
    sent = (FAST | SLOW)[name]
    replies = set()
    for port, stream in ((ports.fast, "x1"), (ports.slow, "x2"), (ports.uvicorn, "x3")):
        own = sent.replace(b"/streams/s", b"/streams/" + stream.encode())
        [reply] = await converse(port, own)
        replies.add(steady(reply.replace(stream.encode(), b"s")))
    assert len(replies) == 1
    assert len(ports.parsed) == (name in FAST)


@pytest.mark.parametrize("name", REJECTED)
async def test_an_ambiguous_head_is_rejected_and_the_connection_closed(
    ports: Ports, name: str
) -> None:
    reader, writer = await asyncio.open_connection(HOST, ports.fast)
    writer.write(REJECTED[name])
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\nconnection: close" in head
    document = orjson.loads(body)
    assert document["code"] == ("duplicate_field" if name == "two hosts" else "malformed_request")
    assert f"x-request-id: {document['request_id']}".encode() in head
    assert not ports.parsed


async def test_the_limit_on_header_lines_holds_on_both_paths(ports: Ports) -> None:
    # Host, Content-Length and
    sent = request(chunk(), *(f"X-{at}: 1" for at in range(1, MAX_HEADERS)))
    assert sent.partition(b"\r\n\r\n")[0].count(b"\r\n") == MAX_HEADERS + 1
    for port in (ports.fast, ports.slow):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(sent)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        assert head.startswith(b"HTTP/1.1 431 ")
        assert orjson.loads(body)["code"] == "head_too_large"
        [reply] = await converse(port, sent.replace(b"X-1: 1\r\n", b""))
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
    assert len(ports.parsed) == 1


async def test_the_limit_on_the_length_of_a_header_holds_on_both_paths(ports: Ports) -> None:
    for name in (each.decode() for each in LISTED):
        lines = {True: [f"{name}: " + "a," * 5000], False: [f"{name}: " + "a," * 500] * 9}
        for port in (ports.fast, ports.slow):
            for is_one_line, sent in lines.items():
                [reply] = await converse(port, request(chunk(), *sent))
                assert reply.startswith(b"HTTP/1.1 431 "), (name, is_one_line)
                [at] = re.findall(rb'"detail":"([a-z-]+): expected at most 8192 bytes', reply)
                assert at.decode() == name.lower()
    assert not ports.parsed


async def test_a_stream_continues_over_both_paths(ports: Ports) -> None:
    """Created, continued, retried and rejected, at each server in turn."""
    positions = []
    for port, position in zip([ports.fast, ports.slow] * 3, (0, 4, 4, 8, 4, 12), strict=True):
        [reply] = await converse(port, request(chunk(position)))
        body = orjson.loads(reply.split(b"\r\n\r\n", 1)[1])
        positions.append((body["position"], body.get("replayed")))
    assert positions == [(4, False), (8, False), (8, True), (12, False), (12, None), (16, False)]


async def test_if_match_of_the_current_state_continues_it(ports: Ports) -> None:
    """Also from the cache, which the two servers share."""
    etag = "*"
    for port in (ports.fast, ports.slow, ports.fast):
        condition = [f"If-Match: {etag}"] if etag != "*" else []
        [reply] = await converse(port, request(chunk(None), *condition, stream="matched"))
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
        first, etag = etag, re.findall(rb"etag: (\S+)", reply)[0].decode()
    for port in (ports.fast, ports.slow):
        [reply] = await converse(port, request(chunk(None), f"If-Match: {first}", stream="matched"))
        assert reply.startswith(b"HTTP/1.1 412 ")
    assert len(ports.parsed) == 3


async def test_requests_on_one_connection_are_answered_in_order(
    ports: Ports,
) -> None:
    """Pipelined and one by one, mixed with requests of the slow path."""
    get = request(b"", first="GET /v1/models HTTP/1.1", length="")
    wrong = request(b"{", stream="order")
    parts = [
        request(chunk(0), stream="order"),
        get,
        request(chunk(4), stream="order") + get + request(chunk(8), stream="order"),
        wrong,
        request(chunk(12), stream="order"),
        request(chunk(16), stream="order")[:-5],
        request(chunk(16), stream="order")[-5:] + get[:9],
        get[9:],
    ]
    replies = await converse(ports.fast, *parts, answers=9)
    seen = [re.search(rb'"position":(\d+)|("models")|("code")', reply) for reply in replies]
    assert [found and (found[1] or found[2] or found[3]) for found in seen] == [
        b"4", b'"models"', b"8", b'"models"', b"12", b'"code"', b"16", b"20", b'"models"',
    ]  # fmt: skip
    assert [each.chunk.position for each in ports.parsed][:1] == [0]


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Accept: application/msgpack",),
        ("X-Request-Id: mine-1",),
        (f"X-Request-Id: {'0123456789abcdef' * 2}",),
        (f"X-Request-Id: {'x' * 126}", "Accept: application/msgpack"),
    ],
    ids=["JSON", "MessagePack", "short id", "long id", "an id like a length"],
)
async def test_overload_responses_are_those_of_the_slow_path(
    ports: Ports, monkeypatch: pytest.MonkeyPatch, lines: Sequence[str]
) -> None:
    """Sent several times, since a repeated response is serialized once."""
    patch_admission(monkeypatch)
    sent = request(chunk(), *lines)
    expected = await converse(ports.slow, sent)
    assert expected[0].startswith(b"HTTP/1.1 429 ")
    replies = await converse(ports.fast, sent, sent + sent, answers=3)
    assert list(map(steady, replies)) == list(map(steady, expected)) * 3
    ids = [re.findall(rb"request[-_]id[^0-9a-z]*([0-9a-z-]+)", reply) for reply in replies]
    assert all(len(set(found)) == 1 for found in ids), "the id of the head is the body's"
    assert len(set(map(tuple, ids))) == (1 if "X-Request-Id" in str(lines) else 3)


async def test_an_overload_response_closes_the_connection_of_a_stopping_service(
    api: Harness,
) -> None:
    [fast_path] = api.http_state().fast_routes
    for closes in (False, True):
        parsed = fast_path.parse(request(chunk()))
        response = fast_path.response(parsed, Overloaded("full"), closes=closes)
        assert (b"\r\nconnection: close\r\n" in response) == closes


async def test_an_overload_response_has_the_current_drain_rate(
    api: Harness, ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = api.pipeline._chunks["probe"]
    patch_admission(monkeypatch)
    [first] = await converse(ports.fast, request(chunk()))
    monkeypatch.setattr(batcher.admission.rate, "per_s", 20.0)
    [second] = await converse(ports.fast, request(chunk()))
    assert b"which is the limit" in first
    assert b"and 20 are done per second" in second


async def test_a_connection_returns_to_the_fast_path_after_other_requests(ports: Ports) -> None:
    reader, writer = await asyncio.open_connection(HOST, ports.fast)
    get = request(b"", first="GET /v1/models HTTP/1.1", length="")
    for position, expected in ((0, 1), (4, 2)):
        writer.write(get)
        assert b'"models"' in await answer(reader)
        writer.write(request(chunk(position), stream="again"))
        assert b'"outputs"' in await answer(reader)
        assert len(ports.parsed) == expected
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("enabled", [True, False])
async def test_a_setting_switches_the_fast_path_off(
    models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch, *, enabled: bool
) -> None:
    monkeypatch.setattr(app, "configure_logs", lambda *_: None)
    monkeypatch.setenv("CARRY_MODELS_DIR", str(models["small"].path))
    monkeypatch.setenv("CARRY_REDIS_URL", "unix:///no/server.sock")
    monkeypatch.setenv("CARRY_HTTP_FAST_PATH", str(enabled))
    state: HttpState = app.create_app().state.http
    assert bool(state.fast_routes) is enabled


def under_way(server: uvicorn.Server) -> list[HttpProtocol]:
    return [connection for connection in connections_of(server) if connection._pending]


async def test_graceful_shutdown_answers_the_current_request(
    api: Harness, held_back: Callable[[], None]
) -> None:
    async with serving(api) as server:
        reader, writer = await asyncio.open_connection(HOST, port_of(server))
        writer.write(request(chunk(), stream="stopping"))
        await becomes(lambda: bool(under_way(server)), "a request under way")
        [connection] = under_way(server)
        connection.shutdown()
        held_back()
        reply = await answer(reader)
        assert b"200 OK" in reply
        assert b"connection: close\r\n" in reply
        assert await reader.read() == b""
        writer.close()


async def test_request_that_the_fast_path_fails_to_parse_is_left_to_the_slow_path(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fast_path: FastPath, data: bytes) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(FastPath, "parse", fail)
    with capture_logs() as logs:
        async with serving(api) as server:
            [response] = await converse(port_of(server), request(chunk(0)))
    assert response.startswith(b"HTTP/1.1 200"), response
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["fast_route_failed"]


async def test_a_response_that_cannot_be_made_ends_its_connection_alone(
    api: Harness, monkeypatch: pytest.MonkeyPatch, held_back: Callable[[], None]
) -> None:
    """Others of its batch are answered, and no later response takes the place of the missing."""
    answer_well = FastPath.response

    def answer_some(path: FastPath, request: FastRequest, *result: Any, **options: Any) -> bytes:
        if request.stream == "bad":
            raise ZeroDivisionError
        return answer_well(path, request, *result, **options)

    monkeypatch.setattr(FastPath, "response", answer_some)
    async with serving(api) as server:
        port, later = port_of(server), request(chunk(), stream="later")
        bad = asyncio.create_task(converse(port, request(chunk(), stream="bad") + later))
        good = asyncio.create_task(converse(port, request(chunk(), stream="good")))
        await becomes(lambda: len(under_way(server)) == 2, "both under way")
        held_back()
        assert b"200 OK" in (await good)[0]
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await bad


async def test_waiting_chunks_of_a_disconnected_client_are_dropped(
    api: Harness, monkeypatch: pytest.MonkeyPatch, held_back: Callable[[], None]
) -> None:
    """Its chunk in a batch is applied, the one that waits behind it is not."""
    async with serving(api) as server:
        writers = []
        for place in range(5):
            _, writer = await asyncio.open_connection(HOST, port_of(server))
            own = f"X-Request-Id: client-{place}"
            writer.write(request(chunk(None), own, stream="client"))
            writers.append(writer)
        await becomes(lambda: len(under_way(server)) == 5, "all under way")
        logged: list[tuple[str, int]] = []
        monkeypatch.setattr(
            "service.transports.v1.fast_path.log_request",
            lambda request_id, method, route, status, *_, **__: logged.append((request_id, status)),
        )
        for writer in writers:
            writer.transport.abort()
        await becomes(lambda: not server.server_state.connections, "no connection")
        assert sorted(logged) == [(f"client-{place}", 0) for place in range(5)]
        held_back()
        found = await api.pipeline.process(ANYONE, chunk_of("client", INPUTS))
    assert found.head.position < 6 * len(INPUTS)


async def test_connections_of_disconnected_clients_are_freed(
    api: Harness, held_back: Callable[[], None]
) -> None:
    """One's chunk is in a batch, the other's still waits."""
    async with serving(api) as server:
        seen: list[weakref.ref[HttpProtocol]] = []
        for place in range(2):
            _, writer = await asyncio.open_connection(HOST, port_of(server))
            writer.write(request(chunk(None), stream="client"))
            await becomes(lambda: bool(under_way(server)), f"chunk {place} under way")
            seen += map(weakref.ref, under_way(server))
            writer.transport.abort()
            await becomes(lambda: not server.server_state.connections, "no connection")
        held_back()
        await api.pipeline.process(ANYONE, chunk_of("client", INPUTS))

    def are_freed() -> bool:
        gc.collect()
        return not any(each() for each in seen)

    await becomes(are_freed, "freed")


class Framing:
    """Callbacks of the server's parser for the bytes of one request."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.ends = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.ends += 1


async def test_fast_path_and_parser_frame_requests_alike(api: Harness) -> None:
    """Any mutation of a valid request that the fast path accepts is one request to the parser."""
    [fast_path] = api.http_state().fast_routes
    random = Random(11)
    good = [*FAST.values(), *SLOW.values(), *REJECTED.values()]
    bits = [b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"0", b",", b"\x00", b"Content-Length: 3\r\n",
            b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"Connection: close\r\n",
            b"Connection: Upgrade\r\nUpgrade: x\r\n", b"Expect: 100-continue\r\n"]  # fmt: skip
    seen = 0
    for _ in range(20_000):
        data = bytearray(random.choice(good))
        end = data.find(b"\r\n\r\n") + 4
        for _ in range(random.randrange(3)):
            at = random.randrange(end)
            data[at : at + random.randrange(3)] = random.choice(bits)
        parsed = fast_path.parse(bytes(data))
        if not isinstance(parsed, FastRequest):
            continue
        seen += 1
        framing = Framing()
        parser = httptools.HttpRequestParser(framing)
        parser.feed_data(bytes(data[: parsed.total_bytes - 1]))
        assert not framing.ends
        parser.feed_data(bytes(data[parsed.total_bytes - 1 : parsed.total_bytes]))
        assert framing.ends == 1
        assert data[: parsed.total_bytes].endswith(framing.body)
        check_head(parser.get_method(), b"", parser.get_http_version(), framing.headers)
        assert parser.should_keep_alive()
        assert not parser.should_upgrade()
    assert seen > 1000
