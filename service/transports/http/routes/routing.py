"""Routes that read their request and write their reply by hand.

An endpoint here is `request -> Response` and declares no parameters, so that nothing of the
framework's own parsing runs: per request that is half of what routing costs, and parsing the
body is the type of the served model's business. What a route takes is documented by hand.
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
