"""The gRPC server of one worker, on the worker's event loop.

Every worker listens on the same port (SO_REUSEPORT): the kernel spreads connections over them.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import structlog

from service.server.connections import Connections
from service.server.http2_protocol import Http2Connection
from service.settings import Settings
from service.telemetry.sampler import TransportLoad
from service.transports.v2.grpc.admission import Admission
from service.transports.v2.grpc.call import read_head
from service.transports.v2.grpc.servicer import InferenceServicer
from service.transports.v2.inference import Inference
from service.transports.v2.metadata import Statistics

CHECK_S: Final = 0.02
"""Time between two checks whether all connections have ended."""

log = structlog.get_logger(__name__)


class GrpcServer:
    """One worker's server.

    Attributes:
        port: after `start`, the one that it listens on.
    """

    def __init__(self, inference: Inference, statistics: Statistics, settings: Settings):
        v2, window = settings.v2, settings.websocket.pipelining_window
        admission = Admission(v2, settings.connections)
        self._servicer = InferenceServicer(
            inference, statistics, admission, window, v2.grpc_max_message_bytes
        )
        self._connections = Connections(settings.connections)
        self._drain_s = settings.processes.drain_s
        self._host = settings.http.host
        self.port = v2.grpc_port or 0
        self._server: asyncio.Server | None = None
        self._stopped: asyncio.Task[None] | None = None

    def load(self) -> TransportLoad:
        """Open connections and unanswered requests."""
        return TransportLoad(len(self._connections), self._servicer.requests)

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be used.
        """
        make = partial(Http2Connection, self._connections, read_head, self._servicer.accept)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            make, self._host, self.port, reuse_port=True, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        log.info("grpc_ready", address=f"{self._host}:{self.port}")

    def begin_stop(self) -> None:
        """Reject new calls, end the streams, and let the other calls finish."""
        if self._server is not None and self._stopped is None:
            self._stopped = asyncio.get_running_loop().create_task(self._stop(self._server))

    def retire(self) -> None:
        """Begin to stop: another process accepts calls on the port."""
        self.begin_stop()

    async def stop(self) -> None:
        """Reject new calls, and wait until the other calls have finished."""
        self.begin_stop()
        if self._stopped is not None:
            await self._stopped

    async def _stop(self, server: asyncio.Server) -> None:
        server.close()
        self._servicer.begin_stop()
        self._connections.retire()
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._drain_s
        while len(self._connections) and loop.time() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(CHECK_S)
        self._connections.abort()
        await asyncio.sleep(0)
