"""Middleware of the slow path: ids of requests, the access log, responses to unexpected errors.

A line names the route, never the requested path: names of streams may be names of people.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, reset_contextvars

from service.core.tracing import PROPAGATED
from service.telemetry.access_log import RequestFacts, log_request, request_facts
from service.telemetry.logs import RequestIds
from service.transports.common.failure_log import log_client_disconnect

REQUEST_ID_HEADER: Final = b"x-request-id"
is_request_id = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}").fullmatch

PROBES: Final = (
    "/health/live",
    "/health/ready",
    "/health/store",
    "/metrics",
    "/v2/health/live",
    "/v2/health/ready",
)
"""Routes that probes request every few seconds; logged at `debug`."""

AnswerFailure = Callable[[Exception, Scope, Receive, Send], Awaitable[None]]
"""Answers a request whose application raised an unexpected exception."""


class RequestLogMiddleware:
    """ASGI middleware: assigns every request an id, and logs one line about it and traces it.

    The id is the client's `X-Request-Id` if that is a token, else a new one; it is bound to all log
    lines of the request and sent in the response. Add it last, so that it is outside of all
    other middleware and measures the whole time.

    A client that disconnected gets no response. Once a response has started it cannot be replaced,
    and an unexpected exception is passed to the server.
    """

    def __init__(self, app: ASGIApp, answer_failure: AnswerFailure, ids: RequestIds | None = None):
        self._app = app
        self._answer_failure = answer_failure
        self._ids = ids or RequestIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        request_id = request_id_of(scope["headers"], self._ids)
        status: int = 0
        facts = RequestFacts()
        api = getattr(getattr(scope.get("app"), "state", None), "api", None)
        if api is not None and api.tracer is not None:
            facts.span = api.tracer.start_request(trace_headers(scope["headers"]), began_s)

        async def count_received() -> Message:
            message = await receive()
            facts.received_bytes += len(message.get("body", b""))
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id)]
                message = {**message, "headers": headers}
            else:
                facts.sent_bytes += len(message.get("body", b""))
            await send(message)

        name = request_id.decode()
        outside = bind_contextvars(request_id=name)
        facts_outside = request_facts.set(facts)
        try:
            await self._app(scope, count_received, send_with_id)
        except ClientDisconnect:
            log_client_disconnect(scope["method"])
        except Exception as error:
            if status:
                raise
            await self._answer_failure(error, scope, receive, send_with_id)
        except BaseException:
            # no response: the server sends a plain 500
            status = status or 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", None)
            path = scope.get("path_params", {})
            is_known = api is not None and path.get("model") in api.codecs
            if is_known and facts.model is None:
                facts.model, facts.stream = path["model"], path.get("stream")
            ms = round((time.monotonic() - began_s) * 1000, 2)
            is_probe = route in PROBES
            log_request(name, scope["method"], route, status, ms, facts, is_probe=is_probe)
            request_facts.reset(facts_outside)
            reset_contextvars(**outside)


def request_id_of(headers: Iterable[tuple[bytes, bytes]], ids: RequestIds) -> bytes:
    """The id that a request names in its headers, or else a new one."""
    for name, value in headers:
        if name == REQUEST_ID_HEADER and is_request_id(value):
            return bytes(value)
    return ids.next()


def trace_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers that carry the trace of the caller; none if one is repeated, which is invalid."""
    lines = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name.decode("latin-1") in PROPAGATED
    ]
    by_name = dict(lines)
    return by_name if len(by_name) == len(lines) else {}
