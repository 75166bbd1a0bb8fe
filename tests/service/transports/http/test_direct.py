"""The short way to the chunk routes answers as FastAPI's own way does, whatever is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import orjson
import ormsgpack
import pytest
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.transports.http.request_log import RequestLog
from service.transports.http.routes import chunks
from service.transports.http.routes.direct import DirectRequest, DirectRoutes
from tests.service.transports.http.harness import EVENT, Harness, rows

ONE, MANY = "/v1/models/{model}/streams/{stream}/chunks", "/v1/models/{model}/chunks"
BODY = orjson.dumps({"position": 3, "inputs": rows(1).tolist()})
ITEMS = orjson.dumps({"chunks": [{"stream": "a", "position": 3, "inputs": rows(1).tolist()}]})
SEQUENCES = orjson.dumps({"sequences": [{"inputs": rows(2).tolist()}]})


def chunk_routes() -> list[APIRoute]:
    return [route for route in chunks.router.routes if isinstance(route, APIRoute)]


@pytest.fixture
async def ways(api: Harness) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Clients of one application: past the framework where that is possible, and through it."""
    stack = RequestLog(api.app.build_middleware_stack())

    async def through(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = api.app
        await stack(scope, receive, send)

    transport = httpx.ASGITransport(through, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://carry") as framework:
        yield api.client, framework


def content(response: httpx.Response) -> Any:
    """The body without what is new each time."""
    if not response.content:
        return None
    packed = response.headers["content-type"] == "application/msgpack"
    document = ormsgpack.unpackb(response.content) if packed else response.json()
    document.pop("request_id", None)
    for result in document.get("results", ()):
        result.get("error", {}).pop("request_id", None)
    return document


REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "refused": ("POST", "/v1/models/probe/streams/s/chunks", {"content": BODY}),
    "many": ("POST", "/v1/models/probe/chunks", {"content": ITEMS}),
    "predicted": ("POST", "/v1/models/probe/predict", {"content": SEQUENCES}),
    "packed": (
        "POST",
        "/v1/models/probe/predict?return_state=1",
        {"content": SEQUENCES, "headers": {"accept": "application/msgpack"}},
    ),
    "packed refusal": (
        "POST",
        "/v1/models/probe/streams/s/chunks",
        {"content": BODY, "headers": {"accept": "application/x-msgpack"}},
    ),
    "own id": (
        "POST",
        "/v1/models/probe/predict",
        {"content": SEQUENCES, "headers": {"X-Request-Id": "mine-1"}},
    ),
    "events": (
        "POST",
        "/v1/models/small/predict",
        {"json": {"sequences": [{"events": [EVENT]}]}},
    ),
    "If-Match": (
        "POST",
        "/v1/models/probe/streams/s/chunks",
        {"content": BODY, "headers": [("If-Match", '"a"'), ("if-match", '"b"')]},
    ),
    "two headers that are a list": (
        "POST",
        "/v1/models/probe/predict",
        {
            "content": SEQUENCES,
            "headers": [("Accept", "text/html"), ("accept", "application/msgpack")],
        },
    ),
    "a parameter twice": (
        "POST",
        "/v1/models/probe/predict?return_state=1&return_state=0",
        {"content": SEQUENCES},
    ),
    "a dot": ("POST", "/v1/models/probe/streams/%2E/chunks", {"content": BODY}),
    "compressed": (
        "POST",
        "/v1/models/probe/predict",
        {"content": SEQUENCES, "headers": {"content-encoding": "gzip"}},
    ),
    "no model": ("POST", "/v1/models/none/chunks", {"content": ITEMS}),
    "wrong body": ("POST", "/v1/models/probe/chunks", {"content": b"{"}),
    "unknown parameter": ("POST", "/v1/models/probe/chunks?a=1", {"content": ITEMS}),
    "escaped": ("POST", "/v1/models/pr%6Fbe/streams/%73/%63hunks", {"content": BODY}),
    "escaped slash": ("POST", "/v1/models/probe/streams/a%2Fb/chunks", {"content": BODY}),
    "line's end": ("POST", "/v1/models/probe/streams/s/chunks%0A", {"content": BODY}),
    "bad name": ("POST", "/v1/models/probe/streams/a%20b/chunks", {"content": BODY}),
    "no stream": ("POST", "/v1/models/probe/streams//chunks", {"content": BODY}),
    "slash": ("POST", "/v1/models/probe/streams/s/chunks/", {"content": BODY}),
    "double slash": ("POST", "//v1/models/probe/chunks", {"content": ITEMS}),
    "case": ("POST", "/V1/models/probe/chunks", {"content": ITEMS}),
    "GET": ("GET", "/v1/models/probe/chunks", {}),
    "HEAD": ("HEAD", "/v1/models/probe/streams/s/chunks", {}),
    "OPTIONS": ("OPTIONS", "/v1/models/probe/predict", {}),
    "PUT": ("PUT", "/v1/models/probe/streams/s/chunks", {"content": BODY}),
    "another route": ("GET", "/v1/models/probe", {}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_both_ways_answer_the_same(
    api: Harness, ways: tuple[httpx.AsyncClient, httpx.AsyncClient], name: str
) -> None:
    method, address, request = REQUESTS[name]
    found = []
    for client in ways:
        before = api.counts.seen.copy()
        response = await client.request(method, address, **request)
        headers = [pair for pair in response.headers.raw if pair[0] != b"x-request-id"]
        sent = request.get("headers", {})
        if isinstance(sent, dict) and "X-Request-Id" in sent:
            assert response.headers["x-request-id"] == sent["X-Request-Id"]
        counted = {
            code: count - before[code]
            for code, count in api.counts.seen.items()
            if count != before[code] and code not in ("hits", "misses", "batches")
        }
        found.append((response.status_code, headers, content(response), counted))
    assert found[0] == found[1]


async def test_applied_chunks_have_the_same_headers(
    ways: tuple[httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    names = []
    for client, stream in zip(ways, "ab", strict=True):
        address = f"/v1/models/probe/streams/{stream}/chunks"
        response = await client.post(address, json={"position": 0, "inputs": rows(2).tolist()})
        assert response.status_code == 200
        assert int(response.headers["content-length"]) == len(response.content)
        names.append([name for name, _ in response.headers.raw])
    assert names[0] == names[1]


async def refused_by_the_framework(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError(f"{scope['path']} went through the framework")


def scope_of(path: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
        "root_path": "",
        **more,
    }


@pytest.mark.parametrize(
    "path", ["/v1/models/probe/streams/s/chunks", "/v1/models/probe/chunks", "/v1/models/x/predict"]
)
async def test_chunks_do_go_past_the_framework(api: Harness, path: str) -> None:
    direct = DirectRoutes(refused_by_the_framework, chunk_routes())
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = scope_of(path, app=api.app)
    await direct(scope, receive, send)
    assert sent[0]["status"] in (400, 404)
    assert scope["route"].path.count("{") == len(scope["path_params"])


@pytest.mark.parametrize(
    "scope",
    [
        scope_of("/v1/models/probe/chunks", method="GET"),
        scope_of("/base/v1/models/probe/chunks", root_path="/base"),
        scope_of("/v1/models/probe/chunks", root_path="/v1"),
        scope_of("/v1/models//chunks"),
        {"type": "lifespan"},
        {"type": "websocket", "path": "/v1/models/probe/chunks"},
    ],
)
async def test_what_is_not_certain_goes_through_the_framework(scope: dict[str, Any]) -> None:
    passed: list[Scope] = []

    async def framework(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)

    await DirectRoutes(framework, chunk_routes())(scope, None, None)  # type: ignore[arg-type]
    assert passed == [scope]
    assert "route" not in scope


def test_headers_are_those_of_the_framework() -> None:
    raw: Iterable[tuple[bytes, bytes]] = (
        (b"accept", b"a"),
        (b"if-match", b"\xe9"),
        (b"accept", b"b"),
        (b"if-match", b"2"),
    )
    headers = DirectRequest(scope_of("/", headers=raw), None).headers  # type: ignore[arg-type]
    assert headers.get("Accept") == headers["accept"] == "a"
    assert headers.get("host") is None
    assert headers.get("host", "x") == "x"
    assert headers.getlist("IF-MATCH") == ["é", "2"]
    assert headers.getlist("host") == []
    assert "if-Match" in headers
    assert "host" not in headers
