"""The composition root of one worker: settings in, an ASGI application out.

Loads the artifacts and builds runtimes, store, pipeline and API before the event loop runs;
the application's lifespan starts them, and at shutdown drains the pipeline before it closes the
store, so that no accepted chunk is lost.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.manifest import MANIFEST_NAME
from models.errors import ArtifactError
from service.access.key_cache import AccessKeys
from service.console.page import add_console
from service.engine.runtimes.loading import open_decoders, open_runtimes
from service.pipeline.pipeline import Pipeline, PipelineLimits
from service.pipeline.served_model import ServedModel
from service.pipeline.watching import Watches
from service.server.connection_balance import FULL
from service.server.connections import BODY_BYTES_PER_S, Connections
from service.server.graceful_server import LATE_S, MEASURE_LOAD, ON_LAME_DUCK, ON_RETIRE, ON_STOP
from service.server.http_protocol import HTTP_STATE
from service.server.open_files import limit_connections_to_open_files
from service.server.origins import host_rule
from service.settings import Settings
from service.store.open import open_store
from service.store_settings import store_settings
from service.telemetry.audit import audit
from service.telemetry.logs import configure_logs
from service.telemetry.metrics import PrometheusRecorder
from service.telemetry.request_lines import access_log
from service.telemetry.sampler import Sampler, TransportLoad
from service.telemetry.tracing import open_tracer
from service.transports.live.application import SocketLimits, add_live_sockets
from service.transports.live.watching import add_watching
from service.transports.v1.admin import AdminServer
from service.transports.v1.application import ApiLimits, ConnectionLimits, create_api
from service.transports.v2.http_routes import add_kserve
from service.transports.v2.inference import Inference

if TYPE_CHECKING:
    from service.transports.v2.grpc.server import GrpcServer

COLLECTOR_THRESHOLDS = (10_000, 20, 1_000)
"""Allocations before a collection of the youngest generation, and collections of each generation
before the next one's."""

log = structlog.get_logger(__name__)


def create_app() -> FastAPI:
    """The application of a worker, by the settings in the environment.

    Raises:
        ArtifactError: a model cannot be loaded, or its alarms cannot have the configured rate.
        RuntimeUnavailableError: the runtime is not installed, or cannot run a model.
    """
    settings = Settings.load()
    configure_logs(settings.log_level, settings.log_format)
    recorder = PrometheusRecorder()
    access_log.observe = recorder.record_request
    access_log.success_ratio = settings.log_success_ratio
    tracer = open_tracer() if settings.tracing else None
    served = open_models(settings)
    store = open_store(store_settings(settings))
    pipeline = Pipeline(
        served,
        store,
        recorder,
        limits=PipelineLimits(
            max_batch_rows=settings.max_batch_rows,
            max_batch_steps=settings.max_batch_steps,
            inference_timeout_s=settings.inference_timeout_s,
            runtime_threads=settings.runtime_threads,
            max_queue=settings.max_queue,
            max_queue_wait_s=settings.max_queue_wait_s,
            batches_in_flight=settings.batches_in_flight,
            state_cache_bytes=settings.state_cache_bytes,
            state_cache_s=settings.tombstone_ttl_s,
            conflict_attempts=settings.conflict_attempts,
            drain_s=min(settings.drain_s, LATE_S),
        ),
        now_ms=lambda: time.time_ns() // 1_000_000,
        on_model_change=settings.on_model_change,
        tracer=tracer,
        audit=audit,
    )

    keys = AccessKeys(store.keys, required=settings.require_keys, on_change=audit)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[dict[str, object]]:
        await store.start()
        await store.outputs.start()
        await keys.start()
        if settings.log_streams != "none":
            access_log.name_streams(settings.log_streams, await store.keys.token_key())
        began_s = time.monotonic()
        await pipeline.start()
        for model in served:
            rows = pipeline.max_batch_rows(model)
            recorder.model(model.name, model.version, model.runtime.name, rows)
        _tune_garbage_collector()
        on_stop = []
        connections: Connections = api.state.http.connections
        on_retire = [connections.retire]

        def measure_load() -> int:
            """Active connections or chunks that wait or run, whichever are more."""
            if connections.is_full:
                return FULL
            return max(connections.count_active(), pipeline.count_chunks())

        if grpc_server is not None:
            await grpc_server.start()
            on_stop.append(grpc_server.begin_stop)
        if admin is not None:
            await admin.start()
            on_retire.append(admin.retire)
        sampler = Sampler(
            recorder.registry,
            sorted(pipeline.models),
            store.monitor,
            pipeline.cache,
            loads,
            pipeline.queue_depths,
        )
        sampler.start()
        log.info("ready", models=sorted(pipeline.models), warm_s=time.monotonic() - began_s)
        try:
            yield {
                HTTP_STATE: api.state.http,
                MEASURE_LOAD: measure_load,
                ON_LAME_DUCK: [pipeline.announce_stop, connections.announce_close],
                ON_RETIRE: [*on_retire, *on_stop],
                ON_STOP: on_stop,
            }
        finally:
            if grpc_server is not None:
                await grpc_server.stop()
            if admin is not None:
                await admin.stop()
            await pipeline.stop()
            await sampler.stop()
            recorder.flush_requests()
            recorder.rejections.flush()
            await keys.close()
            await store.outputs.close()
            await store.close()
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    limits = ApiLimits(
        max_chunk_steps=settings.max_chunk_steps,
        max_predict_steps=settings.max_predict_steps,
        max_body_bytes=settings.max_body_bytes,
        max_items=settings.max_items,
        max_forecast_samples=settings.max_forecast_samples,
        timeout_s=settings.timeout_s,
        max_timeout_s=settings.max_timeout_s,
    )
    connection_limits = ConnectionLimits(
        max_connections=limit_connections_to_open_files(settings.max_connections),
        max_connections_per_address=settings.max_connections_per_address,
        keep_alive_s=settings.keep_alive_s,
        head_timeout_s=settings.head_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        send_timeout_s=settings.send_timeout_s,
        websocket_ping_s=settings.websocket_ping_s,
        max_pending_body_bytes=settings.max_pending_body_bytes,
        max_pending_reply_bytes=settings.max_pending_reply_bytes,
    )
    has_admin = settings.admin_port is not None
    has_docs = settings.docs and not has_admin
    metrics = (lambda: (recorder.render(), recorder.content_type)) if settings.metrics else None
    api = create_api(
        pipeline,
        limits,
        recorder,
        lifespan=lifespan,
        connections=connection_limits,
        fast_path=settings.http_fast_path,
        metrics=None if has_admin else metrics,
        docs=has_docs,
        keys=keys,
        tracer=tracer,
        origins=settings.websocket_origins,
        accepts_host=host_rule(settings.host, settings.allowed_hosts),
    )
    admin = None
    if settings.admin_port is not None:
        admin = AdminServer(
            api,
            connection_limits,
            metrics=metrics,
            docs=settings.docs,
            host=settings.admin_host or settings.host,
            port=settings.admin_port,
            hosts=settings.allowed_hosts,
        )

    def loads() -> dict[str, TransportLoad]:
        by_transport = dict.fromkeys(("http", "websocket"), TransportLoad(0, 0))
        counted: Connections = api.state.http.connections
        by_transport |= {name: TransportLoad(*each) for name, each in counted.loads.items()}
        if grpc_server is not None:
            by_transport["grpc"] = grpc_server.load()
        return by_transport

    inference = Inference(api.state.api, delete_at_end=settings.sequence_end == "delete")
    add_kserve(api, inference, recorder.statistics)
    grpc_server = None
    if settings.grpc_port is not None:
        grpc_server = _grpc_server(settings, settings.grpc_port, inference, recorder)
    sockets = SocketLimits(
        settings.pipelining_window, settings.websocket_idle_s, settings.max_body_bytes
    )
    add_live_sockets(api, sockets, settings.websocket_origins)
    add_watching(api, Watches(store, store.outputs, recorder))
    if has_docs if settings.console is None else settings.console:
        add_console(api)
    return api


def _grpc_server(
    settings: Settings, port: int, inference: Inference, recorder: PrometheusRecorder
) -> GrpcServer:
    # needs packages that are not installed without the extra
    from service.transports.v2.grpc.server import GrpcLimits, GrpcServer

    limits = GrpcLimits(
        max_message_bytes=settings.grpc_max_message_bytes,
        max_pending_bytes=settings.max_pending_body_bytes,
        receive_s=settings.body_timeout_s + settings.grpc_max_message_bytes / BODY_BYTES_PER_S,
        max_calls=settings.grpc_max_calls,
        stream_window=settings.pipelining_window,
        drain_s=settings.drain_s,
    )
    return GrpcServer(
        inference, recorder.statistics, limits, settings.host, settings.grpc_port or 0
    )


def _tune_garbage_collector() -> None:
    """Exempt long-lived objects from garbage collection, and collect rarely.

    A full collection traverses every state in memory, tens of milliseconds with the default size of
    the state cache. Other objects are freed by their reference counts, or young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def open_models(settings: Settings) -> list[ServedModel]:
    """Load the artifacts of the settings and open their runtimes, not yet warmed up.

    Raises:
        ArtifactError, RuntimeUnavailableError: as for `create_app`.
    """
    artifacts = with_alarm_rates(load_models(settings.models_dir), settings.alarm_rates())
    runtimes = open_runtimes(settings.runtime, artifacts, settings.runtime_threads)
    decoders = open_decoders(runtimes, artifacts, settings.runtime_threads)
    return [ServedModel(*each) for each in zip(artifacts, runtimes, decoders, strict=True)]


def load_models(directory: Path) -> list[Artifact]:
    """Every artifact in a directory, or the one that the directory itself is.

    Raises:
        ArtifactError: there is none, one is rejected, or two have one name.
    """
    if (directory / MANIFEST_NAME).is_file():
        return [load_artifact(directory)]
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: expected a directory of model artifacts")
    paths = sorted(path.parent for path in directory.glob(f"*/{MANIFEST_NAME}"))
    if not paths:
        raise ArtifactError(
            f"{directory}: expected a model artifact, or a directory of them, and found no "
            f"{MANIFEST_NAME}; `carry init` or `carry train` makes one"
        )
    artifacts: dict[str, Artifact] = {}
    for path in paths:
        artifact = load_artifact(path)
        if artifact.spec.name in artifacts:
            other = artifacts[artifact.spec.name].path
            raise ArtifactError(f"{path}: model {artifact.spec.name!r} is also in {other}")
        artifacts[artifact.spec.name] = artifact
    return list(artifacts.values())


def with_alarm_rates(artifacts: list[Artifact], rates: Mapping[str, float]) -> list[Artifact]:
    """Apply the expected rates of false alarms, by model, to the artifacts.

    Raises:
        ArtifactError: there is no such model, or its alarms cannot have that rate.
    """
    names = [artifact.spec.name for artifact in artifacts]
    for name in rates:
        if name not in names:
            raise ArtifactError(
                f"CARRY_FALSE_ALARMS_PER_DAY: expected models among {names}, got {name!r}"
            )
    try:
        return [
            artifact.with_alarm_rate(rates[name]) if name in rates else artifact
            for name, artifact in zip(names, artifacts, strict=True)
        ]
    except ArtifactError as error:
        raise ArtifactError(f"CARRY_FALSE_ALARMS_PER_DAY: {error}") from error
