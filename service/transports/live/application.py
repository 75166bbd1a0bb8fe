"""Live sockets of an application, and the addresses for requests without upgrade."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from service.server.errors import UpgradeRequired
from service.server.http_protocol import HttpState
from service.server.origins import parse_origins
from service.server.settings import WebSocketSettings
from service.server.websocket_protocol import WebSockets
from service.telemetry.logs import RequestIds
from service.transports.live.handshake import MODEL_ROUTE, STREAM_ROUTE, LiveSockets, serves
from service.transports.v1.context import ApiContext, caller_of


def add_live_sockets(app: FastAPI, settings: WebSocketSettings) -> None:
    """Serve the live sockets of an application that `create_api` made."""
    api: ApiContext = app.state.api
    state: HttpState = app.state.http
    origins = parse_origins(settings.websocket_origins)
    sockets = LiveSockets(api, RequestIds(), settings.pipelining_window, origins)
    app.state.http = state._replace(
        websockets=WebSockets(serves, sockets, api.limits.max_body_bytes, settings.websocket_idle_s)
    )
    for route in (STREAM_ROUTE, MODEL_ROUTE):
        app.add_api_route(route, _require_upgrade, methods=["GET"], include_in_schema=False)


async def _require_upgrade(request: Request) -> Response:
    """Answer a request that reached HTTP: it is not the handshake of a WebSocket."""
    caller_of(request)
    raise UpgradeRequired("expected a WebSocket handshake, got an HTTP request")
