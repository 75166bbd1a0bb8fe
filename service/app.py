"""Composes the application of one worker: the pipeline of its settings, and the transports on it.

Models are loaded before the event loop runs; the application's lifespan starts the pipeline and the
servers of other ports, and at shutdown stops these before the pipeline drains.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI

from service.build import PipelineService, build_pipeline, tune_garbage_collector
from service.console.page import add_console
from service.pipeline.watching import Watches
from service.server.connection_balance import FULL
from service.server.connections import Connections, limit_connections_to_open_files
from service.server.interface import HTTP_STATE, LIFECYCLE, Lifecycle
from service.server.worker import LATE_S
from service.settings import Settings
from service.telemetry.logs import configure_logs
from service.telemetry.sampler import TransportLoad
from service.transports.live.handshake import add_live_sockets
from service.transports.live.watching import add_watching
from service.transports.v1.admin import AdminServer
from service.transports.v1.application import create_api
from service.transports.v2.http_routes import add_kserve
from service.transports.v2.inference import Inference

if TYPE_CHECKING:
    from service.transports.v2.grpc.server import GrpcServer


log = structlog.get_logger(__name__)


def create_app() -> FastAPI:
    """The application of a worker, by the settings in the environment.

    Raises:
        ArtifactError, RuntimeUnavailableError, StoreRefused: as for `build_pipeline`.
    """
    settings = Settings.load()
    configure_logs(settings.telemetry.log_level, settings.telemetry.log_format)
    # the server has waited for its requests by then
    service = build_pipeline(settings, min(settings.processes.drain_s, LATE_S))
    http, recorder = settings.http, service.recorder
    has_admin = http.admin_port is not None
    metrics = (lambda: (recorder.render(), recorder.content_type)) if http.metrics else None
    connections = replace(
        settings.connections,
        max_connections=limit_connections_to_open_files(settings.connections.max_connections),
    )
    limited = replace(settings, connections=connections)
    servers: list[GrpcServer | AdminServer] = []
    watches = Watches(service.store, service.store.outputs, recorder)
    api = create_api(
        service.pipeline,
        recorder,
        service.keys,
        limited,
        lifespan=lambda api: _serve(api, service, watches, servers),
        metrics=None if has_admin else metrics,
        tracer=service.tracer,
    )
    service.loads.append(lambda: _loads(api))
    inference = Inference(api.state.api, delete_at_end=settings.v2.sequence_end == "delete")
    add_kserve(api, inference, recorder.statistics)
    add_live_sockets(api, settings.websocket)
    add_watching(api, watches)
    if api.state.has_documentation if http.console is None else http.console:
        add_console(api)
    if settings.v2.grpc_port is not None:
        servers.append(_grpc_server(service, inference))
    if has_admin:
        servers.append(AdminServer(api, limited, metrics))
    return api


@asynccontextmanager
async def _serve(
    api: FastAPI,
    service: PipelineService,
    watches: Watches,
    servers: list[GrpcServer | AdminServer],
) -> AsyncIterator[Mapping[str, object]]:
    """Run the pipeline and the servers of other ports."""
    pipeline = service.pipeline
    connections: Connections = api.state.http.connections

    def measure_load() -> int:
        """Active connections or chunks that wait or run, whichever are more."""
        if connections.is_full:
            return FULL
        return max(connections.count_active(), pipeline.count_chunks())

    async with service:
        tune_garbage_collector()
        for server in servers:
            await server.start()
        log.info("ready", models=sorted(pipeline.models), warm_s=service.warm_s)
        try:
            yield {
                HTTP_STATE: api.state.http,
                LIFECYCLE: Lifecycle(
                    measure_load,
                    on_lame_duck=[pipeline.announce_stop, connections.announce_close],
                    # responses without an end are ended first
                    on_retire=[
                        watches.drain,
                        connections.retire,
                        *(server.retire for server in servers),
                    ],
                    on_drain=[watches.drain, *(server.begin_stop for server in servers)],
                ),
            }
        finally:
            for server in servers:
                await server.stop()


def _loads(api: FastAPI) -> Mapping[str, TransportLoad]:
    none = dict.fromkeys(("http", "websocket"), TransportLoad(0, 0))
    connections: Connections = api.state.http.connections
    return none | {name: TransportLoad(*each) for name, each in connections.loads.items()}


def _grpc_server(service: PipelineService, inference: Inference) -> GrpcServer:
    # needs packages that are not installed without the extra
    from service.transports.v2.grpc.server import GrpcServer

    server = GrpcServer(inference, service.recorder.statistics, service.settings)
    service.loads.append(lambda: {"grpc": server.load()})
    return server
