"""The gRPC server of one worker, on the worker's event loop.

Every worker listens on the same port (SO_REUSEPORT): the kernel spreads connections over them.
"""

from __future__ import annotations

import asyncio
import logging
from importlib import import_module
from typing import Any, Final

import grpc
import msgspec
import structlog

from service.settings import Settings
from service.telemetry.sampler import TransportLoad
from service.transports.common.failure_log import log_client_disconnect
from service.transports.v2.grpc.admission import Admission
from service.transports.v2.grpc.servicer import InferenceServicer
from service.transports.v2.inference import Inference
from service.transports.v2.metadata import Statistics

MAX_METADATA_BYTES: Final = 16 * 1024
MAX_STREAMS_PER_CONNECTION: Final = 1024
KEEPALIVE_MS: Final = 60_000
KEEPALIVE_TIMEOUT_MS: Final = 20_000
MIN_CLIENT_PING_MS: Final = 10_000
"""Clients that ping more often are disconnected."""

MAX_PAGES: Final = 20
"""Pages of connections that are counted of one server, each of up to `PAGE`."""

PAGE: Final = 500

log = structlog.get_logger(__name__)
_library_log: Final = logging.getLogger("grpc._cython.cygrpc")


class GrpcServer:
    """One worker's server.

    Attributes:
        port: after `start`, the one that it listens on.
    """

    def __init__(self, inference: Inference, statistics: Statistics, settings: Settings):
        admission = Admission(settings.v2, settings.connections)
        window, host = settings.websocket.pipelining_window, settings.http.host
        self._servicer = InferenceServicer(inference, statistics, admission, window)
        self._max_message_bytes = settings.v2.grpc_max_message_bytes
        self._drain_s = settings.processes.drain_s
        self._host = f"[{host}]" if ":" in host else host
        self.port = settings.v2.grpc_port or 0
        self._server: grpc.aio.Server | None = None
        self._stopped: asyncio.Task[None] | None = None

    def load(self) -> TransportLoad:
        """Open connections, of all gRPC servers in the process, and unanswered requests."""
        return TransportLoad(count_connections(), self._servicer.requests)

    async def start(self) -> None:
        """Listen.

        Raises:
            RuntimeError: the address cannot be used.
        """
        options: list[tuple[str, Any]] = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
        ]
        server = grpc.aio.server(options=options)
        for service, handlers in self._servicer.handlers().items():
            server.add_registered_method_handlers(service, handlers)
        _library_log.addFilter(_replace_disconnect)
        self.port = server.add_insecure_port(f"{self._host}:{self.port}")
        await server.start()
        self._server = server
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

    async def _stop(self, server: grpc.aio.Server) -> None:
        await self._servicer.begin_stop()
        await server.stop(self._drain_s)


def _replace_disconnect(record: logging.LogRecord) -> bool:
    """Filter of the library's log: a reply that cannot be sent is a client that disconnected.

    The library logs it with a traceback, at the level of its own failures.
    """
    kind = record.exc_info[0] if record.exc_info else None
    # the library does not export this class
    if kind is not None and kind.__name__ == "ExecuteBatchError":
        log_client_disconnect("GRPC")
        return False
    return True


def count_connections() -> int | None:
    """The open connections of all gRPC servers in this process, in bounded time.

    None if the library does not report them: it does so by channelz, whose Python interface is
    private; the public package `grpcio-channelz` only serves it over gRPC.
    """
    try:
        library = import_module("grpc._cython.cygrpc")
        servers = msgspec.json.decode(library.channelz_get_servers(0)).get("server", ())
        return sum(_connections_of(library, int(server["ref"]["serverId"])) for server in servers)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        return None


def _connections_of(library: Any, server: int) -> int:
    count, start = 0, 0
    for _ in range(MAX_PAGES):
        page = msgspec.json.decode(library.channelz_get_server_sockets(server, start, PAGE))
        sockets = page.get("socketRef", ())
        count += len(sockets)
        if page.get("end") or not sockets:
            break
        start = int(sockets[-1]["socketId"]) + 1
    return count
