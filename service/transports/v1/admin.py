"""The admin port: metrics, health and documentation, apart from the port of the clients.

It requires no key, so only the monitoring may reach it. Each worker listens on the port by itself
(SO_REUSEPORT), and the one that gets a scrape answers for all of them.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from functools import partial
from typing import Final

import uvicorn
from fastapi import FastAPI

from service.server.connections import Connections
from service.server.heads import host_rule
from service.server.http_protocol import HttpProtocol
from service.server.interface import HTTP_STATE, HttpState
from service.settings import Settings
from service.telemetry.logs import RequestIds
from service.transports.v1.application import RenderMetrics, add_documentation, create_application
from service.transports.v1.problems import connection_error_response

MAX_CONNECTIONS: Final = 100
STOP_S: Final = 1
"""How long the shutdown waits for requests of the admin port, in seconds."""


class AdminServer(uvicorn.Server):
    """Serves the admin port of one worker, on the worker's event loop.

    Args:
        api: the application of the clients' port, whose health and documentation it serves.
        settings: of its address and names; the parent process has bound its port with SO_REUSEPORT.
        metrics: renders `/metrics`; without it there is none.
    """

    def __init__(self, api: FastAPI, settings: Settings, metrics: RenderMetrics | None):
        http = settings.http
        host = http.admin_host or http.host
        self._address = (host, http.admin_port or 0)
        ids = RequestIds()
        app = create_application((), ids, metrics=metrics)
        if http.docs:
            # the requests that the page describes are those of the other port
            add_documentation(app, api, supportedSubmitMethods=[])
        # requires no key
        app.state.api = replace(api.state.api, requires_keys=False)
        config = uvicorn.Config(
            app,
            log_config=None,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=STOP_S,
        )
        super().__init__(config)
        config.load()
        self.lifespan = config.lifespan_class(config)
        self.lifespan.state[HTTP_STATE] = HttpState(
            Connections(replace(settings.connections, max_connections=MAX_CONNECTIONS)),
            partial(connection_error_response, api.state.api.recorder, ids),
            (),
            accepts_host=host_rule(host, http.allowed_hosts),
        )

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be used.
        """
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(self._address)
        await self.startup([listener])

    def retire(self) -> None:
        """Close the port: from now on another process has the metrics of the service."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()

    def begin_stop(self) -> None:
        """Do nothing: the port answers until the pipeline stops."""

    async def stop(self) -> None:
        """Answer accepted requests, and close the port."""
        if self.started:
            await self.shutdown()
