"""The short way to the routes that carry chunks: no framework between the server and them.

`DirectRoutes` finds such a route by its path, calls its endpoint and sends what it returns. The
endpoint is the one that FastAPI documents and would call, with the same request and the same
errors, so that a request is answered the same on either way. What is not certainly for one of
these routes (another method or path, a mounted application) goes on to FastAPI.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.errors import CarryError
from service.transports.http.boundary import client_left, refused, unexpected


class DirectRoutes:
    """ASGI middleware over FastAPI's application.

    Args:
        app: what all other requests go to.
        routes: POST routes whose endpoints take the request alone and return the response, with
            paths of fixed parts and parameters (`{name}`).
    """

    def __init__(self, app: ASGIApp, routes: Iterable[APIRoute]):
        self._app = app
        self._routes = [_Route(route) for route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        route = self._find(scope)
        if route is None:
            await self._app(scope, receive, send)
            return
        request = DirectRequest(scope, receive)
        try:
            response = await route.endpoint(request)
        except CarryError as error:
            response = refused(request, error)
        except ClientDisconnect:
            client_left(scope["method"])
            return
        except Exception as error:
            response = unexpected(request, error)
        await response(scope, receive, send)

    def _find(self, scope: Scope) -> _Route | None:
        """The route, with what routing leaves in the scope."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope.get("root_path"):
            return None
        parts = scope["path"].split("/")
        for route in self._routes:
            parameters = route.match(parts)
            if parameters is not None:
                scope["route"] = route.route
                scope["path_params"] = parameters
                return route
        return None


class _Route:
    """A route, matched by the parts of a path."""

    def __init__(self, route: APIRoute):
        self.route = route
        self.endpoint = cast(Callable[[Request], Awaitable[Response]], route.endpoint)
        parts = route.path.split("/")
        self._length = len(parts)
        self._fixed = [(at, part) for at, part in enumerate(parts) if part[:1] != "{"]
        self._names = [(at, part[1:-1]) for at, part in enumerate(parts) if part[:1] == "{"]

    def match(self, parts: list[str]) -> dict[str, str] | None:
        """The path's parameters, or None where it is not this route's."""
        if len(parts) != self._length:
            return None
        for at, part in self._fixed:
            if parts[at] != part:
                return None
        parameters = {name: parts[at] for at, name in self._names}
        return parameters if all(parameters.values()) else None


class DirectRequest(Request):
    """Starlette's request, with its headers found by one look."""

    def __init__(self, scope: Scope, receive: Receive):
        super().__init__(scope, receive)
        self._indexed = IndexedHeaders(scope)

    @property
    def headers(self) -> Headers:
        """The headers, case-insensitive."""
        return self._indexed


class IndexedHeaders(Headers):
    """Starlette's headers with an index of the first line of each name."""

    def __init__(self, scope: Scope):
        super().__init__(scope=scope)
        self._first = dict(reversed(self._list))

    def get(self, key: str, default: Any = None) -> Any:
        """The first value of that name."""
        value = self._first.get(key.lower().encode("latin-1"))
        return default if value is None else value.decode("latin-1")

    def getlist(self, key: str) -> list[str]:
        """All values of that name."""
        return super().getlist(key) if key in self else []

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower().encode("latin-1") in self._first
