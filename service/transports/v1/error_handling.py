"""Exceptions of the slow path as problem documents, logged and counted once.

Errors of the service and of routing have handlers. Any other exception is logged with its traceback
and answered `internal_error`, which carries the request's id and no internals.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import CarryError
from service.server.errors import MethodNotAllowed, RouteNotFound
from service.telemetry.access_log import note_error
from service.transports.common.failure_log import (
    log_client_disconnect,
    log_failure,
    log_unexpected_failure,
)
from service.transports.v1.context import api_of
from service.transports.v1.problems import problem_response
from service.transports.v1.replies import Header


def add_error_handlers(app: FastAPI) -> None:
    """Register the handlers of the service's errors and those of routing."""
    app.add_exception_handler(CarryError, _on_carry_error)
    app.add_exception_handler(HTTPException, _on_http_error)


class InternalErrorMiddleware:
    """ASGI middleware: an unexpected exception becomes `internal_error`.

    It is outside of the handlers above. A client that disconnected gets no response. Once a
    response has started it cannot be replaced, and the exception is passed to the server.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response_started = False

        async def watch(message: Message) -> None:
            nonlocal response_started
            response_started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            log_client_disconnect(scope["method"])
        except Exception as error:
            if response_started:
                raise
            internal = log_unexpected_failure(error)
            await _error_response(Request(scope), internal)(scope, receive, send)


async def _on_carry_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, CarryError):
        raise error
    log_failure(error)
    return _error_response(request, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    path, method = request.url.path, request.method
    if error.status_code == 404:
        expected = (
            "an address that GET /docs lists"
            if request.app.state.has_documentation
            else "a known address"
        )
        return _error_response(request, RouteNotFound(f"expected {expected}, got {path[:300]!r}"))
    if error.status_code == 405:
        allowed = _allowed_methods(request)
        not_allowed = MethodNotAllowed(
            f"expected {' or '.join(allowed)}, got {method}", expected=allowed, got=method
        )
        return _error_response(request, not_allowed, [(b"allow", ", ".join(allowed).encode())])
    raise error


def _error_response(
    request: Request, error: CarryError, headers: Iterable[Header] = ()
) -> Response:
    # before routing there is no path parameter; the recorder bounds the names of models
    note_error(error)
    model = request.scope.get("path_params", {}).get("model", "-")
    api_of(request).recorder.record_error(model, error)
    return problem_response(error, request, headers)


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes at this address; FastAPI would name those of the first only."""
    methods: set[str] = set()
    for route in request.app.routes:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            methods.update(getattr(route, "methods", None) or ())
    return sorted(methods)
