"""Routes that read their request and write their reply by hand.

An endpoint here is `request -> Response` and declares no parameters: the served model determines
how a body is parsed, and what a route accepts is documented by hand. `PlainRoute` skips FastAPI's
dependency resolution and exit stacks, which take 17 us of the 71 that a chunk of 16 events takes
on the slow path without engine and store (docs/decisions/short-http-path.md).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response


class PlainRoute(APIRoute):
    """Calls its endpoint with the request and sends what it returns."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint itself; one that is no coroutine function is run in a thread."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def plain_router(tag: str) -> APIRouter:
    """A router of plain routes under one tag of the OpenAPI document."""
    return APIRouter(tags=[tag], route_class=PlainRoute, default_response_class=Response)
