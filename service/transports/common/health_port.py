"""A port with health and metrics alone, for a process without the HTTP API; it requires no key."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service.core.values import Check

STOP_S: Final = 1
"""How long the shutdown waits for requests, in seconds."""

Checks = Callable[[], Awaitable[Sequence[Check]]]
RenderMetrics = Callable[[], tuple[bytes, str]]
"""Returns metrics and their content type; called in a thread."""


@asynccontextmanager
async def health_port(
    host: str, port: int, checks: Checks, render_metrics: RenderMetrics
) -> AsyncIterator[int]:
    """Serve `/health/live`, `/health/ready` and `/metrics` as the API does; yields the port.

    Args:
        port: 0 for any that is free.

    Raises:
        OSError: the address cannot be used.
    """

    async def get_live(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def get_ready(_: Request) -> Response:
        found = await checks()
        failing = [check.name for check in found if not check.ok]
        document = {
            "status": "not_ready" if failing else "ready",
            "failing": failing,
            "degraded": [check.name for check in found if check.degraded],
            "checks": [{"name": each.name, "ok": each.ok, "detail": each.detail} for each in found],
        }
        return JSONResponse(document, 503 if failing else 200)

    async def get_metrics(_: Request) -> Response:
        body, content_type = await asyncio.to_thread(render_metrics)
        return Response(body, headers={"Content-Type": content_type})

    routes = [
        Route("/health/live", get_live),
        Route("/health/ready", get_ready),
        Route("/metrics", get_metrics),
    ]
    config = uvicorn.Config(
        Starlette(routes=routes),
        log_config=None,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_S,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    await server.startup([listener])
    try:
        yield listener.getsockname()[1]
    finally:
        await server.shutdown([listener])
