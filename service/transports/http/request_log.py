"""One line of the log for each request, and an id that ties its other lines to it.

A line names routes, never the path that was asked for: names of streams may be names of people.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from structlog.contextvars import bind_contextvars, reset_contextvars

from service.ops.logs import log_request

REQUEST_ID_HEADER = b"x-request-id"
is_request_id = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}").fullmatch
_ID_LIMIT = 2**64

PROBES = ("/health/live", "/health/ready", "/metrics")
"""Routes that machines ask for every few seconds; logged at `debug`."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequestIds:
    """Ids that count on from a random number: unique without the system's random bytes."""

    def __init__(self) -> None:
        self._next = secrets.randbelow(_ID_LIMIT)

    def next(self) -> bytes:
        """One that was not given yet."""
        self._next = (self._next + 1) % _ID_LIMIT
        return b"%016x" % self._next


class RequestLog:
    """ASGI middleware: gives every request an id, and the log one line about it.

    The id is the client's `X-Request-Id` where that is a plain token, else a new one; it is
    bound for all lines of the request and sent back in the reply's header. Put it outside of
    everything else, so that the time is the whole time.
    """

    def __init__(self, app: AsgiApp, ids: RequestIds | None = None):
        self._app = app
        self._ids = ids or RequestIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        request_id = self._request_id(scope)
        status: int = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id)]
                message = {**message, "headers": headers}
            await send(message)

        name = request_id.decode()
        outside = bind_contextvars(request_id=name)
        try:
            await self._app(scope, receive, send_with_id)
        except BaseException:
            # nothing was answered: the server sends a plain 500, or the client is gone
            status = status or 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", None)
            log_request(
                logging.DEBUG if route in PROBES else logging.INFO,
                name,
                scope["method"],
                route,
                status,
                round((time.perf_counter() - began_s) * 1000, 2),
            )
            reset_contextvars(**outside)

    def _request_id(self, scope: Scope) -> bytes:
        for name, value in scope["headers"]:
            if name == REQUEST_ID_HEADER and is_request_id(value):
                return bytes(value)
        return self._ids.next()
