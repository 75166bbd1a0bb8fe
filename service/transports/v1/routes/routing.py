"""Path parameters of the routes, and the route class of chunk requests.

FastAPI declares, passes and documents the path parameters. All other fields of a request are read
by `request_fields` and described in `openapi.operations`: FastAPI would use the first of several
If-Match lines and the last of duplicate query parameters, and ignore unknown ones.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Path
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from service.codec.field_rules import EXAMPLE_STREAM
from service.core.values import STREAM_NAME

ModelPath = Annotated[str, Path(description="The model's slug.", examples=["flights"])]
StreamPath = Annotated[
    str,
    # `stream_name` checks the pattern, and makes the error
    Path(
        description="The stream's name.",
        examples=[EXAMPLE_STREAM],
        json_schema_extra={"pattern": STREAM_NAME},
    ),
]


class ChunkRoute(APIRoute):
    """Calls its endpoint with the request and the path parameters, without FastAPI's dependency
    resolution and exit stacks.

    These take 27 us a request with path parameters alone, and 60 us if options and headers were
    declared as well, of the 71 us that a chunk of 16 events takes on the slow path without engine
    and store (docs/decisions/http.md).
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of a request."""
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            return await endpoint(request, **request.path_params)

        return handle
