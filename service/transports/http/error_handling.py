"""The edge of the application: what raised inside becomes a problem document.

Errors of the service and of routing have handlers; whatever else is raised is logged with its
traceback and answered `internal_error`, which tells the client the request's id and nothing
of the inside. Every refusal is counted once.
"""

from __future__ import annotations

from collections.abc import Iterable

import structlog
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import (
    CarryError,
    Failed,
    InternalError,
    MethodNotAllowed,
    Overloaded,
    RouteNotFound,
)
from service.transports.http.context import api_of
from service.transports.http.problems import problem_response
from service.transports.http.replies.replies import Header

log = structlog.get_logger(__name__)


def add_handlers(app: FastAPI) -> None:
    """Answer the service's errors and those of routing."""
    app.add_exception_handler(CarryError, _on_carry_error)
    app.add_exception_handler(HTTPException, _on_http_error)


class LastResort:
    """ASGI middleware: an unexpected exception becomes `internal_error`.

    It lies outside of the handlers above. A client that left gets no answer, and an answer
    that has begun cannot be changed any more: then the exception goes on to the server.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            client_left(scope["method"])
        except Exception as error:
            if begun:
                raise
            await unexpected(Request(scope), error)(scope, receive, send)


def client_left(method: str) -> None:
    """Log that a client was gone before its request was there, or before it was answered."""
    log.info("client_left", method=method)


def unexpected(request: Request, error: Exception) -> Response:
    """The answer to what nobody expected, which is being handled; the log has its traceback."""
    log.exception("request_failed", error=type(error).__name__)
    return _answer(
        request, InternalError("the request failed unexpectedly; the service's log has the reason")
    )


def refused(request: Request, error: CarryError) -> Response:
    """The answer to an error of the service."""
    note_failure(error)
    return _answer(request, error)


def note_failure(error: CarryError) -> None:
    """Log an error whose cause is on this side; an overload was logged, once for all of it."""
    if isinstance(error, Failed) and not isinstance(error, Overloaded):
        log.warning("request_failed", code=error.code, detail=error.detail)


async def _on_carry_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, CarryError):
        raise error
    return refused(request, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    path, method = request.url.path, request.method
    if error.status_code == 404:
        return _answer(
            request, RouteNotFound(f"expected an address that GET /docs lists, got {path[:300]!r}")
        )
    if error.status_code == 405:
        allowed = _allowed(request)
        refusal = MethodNotAllowed(
            f"expected {' or '.join(allowed)}, got {method}", expected=allowed, got=method
        )
        return _answer(request, refusal, [(b"allow", ", ".join(allowed).encode())])
    raise error


def _answer(request: Request, error: CarryError, headers: Iterable[Header] = ()) -> Response:
    # Before routing there is no path parameter; the recorder bounds the names of models.
    model = request.scope.get("path_params", {}).get("model", "-")
    api_of(request).recorder.record_error(model, error.code)
    return problem_response(error, request, headers)


def _allowed(request: Request) -> list[str]:
    """The methods of every route at this address; the framework names those of the first."""
    methods: set[str] = set()
    for route in request.app.routes:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            methods.update(getattr(route, "methods", None) or ())
    return sorted(methods)
