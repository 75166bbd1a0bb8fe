"""Builds the pipeline of one process from its settings, without a transport.

    async with build_pipeline(Settings.load()) as service:
        caller = service.keys.caller(authorization)
        reply = await service.pipeline.process(caller, chunk, deadline_s)

A transport, a consumer and a command start from it; `examples/json_lines.py` is the smallest one.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from service.access.key_cache import AccessKeys
from service.model_files import VersionFiles, open_models
from service.pipeline.model_versions import ModelVersions
from service.pipeline.pipeline import Pipeline
from service.settings import Settings
from service.store.base import Store
from service.store.redis.redis_store import RedisStore
from service.telemetry.access_log import access_log, audit
from service.telemetry.metrics import PrometheusRecorder
from service.telemetry.sampler import Sampler, TransportLoad

if TYPE_CHECKING:
    from service.telemetry.tracing import OtelTracer

COLLECTOR_THRESHOLDS: Final = (10_000, 20, 1_000)
"""Allocations before a collection of the youngest generation, and collections of each generation
before the next one's."""


@dataclass
class PipelineService:
    """A pipeline with the store, keys, metrics and traces behind it; made by `build_pipeline`.

    Entering it connects to the store and warms the models up. Leaving it drains the pipeline before
    it closes the store, so that no accepted chunk is lost. Use it once, on one event loop.

    Attributes:
        loads: each gives the load of some transports, for the metrics.
        warm_s: how long the models took to warm up.
    """

    settings: Settings
    store: Store
    pipeline: Pipeline
    keys: AccessKeys
    recorder: PrometheusRecorder
    tracer: OtelTracer | None
    loads: list[Callable[[], Mapping[str, TransportLoad]]] = field(default_factory=list)
    warm_s: float = 0.0
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        """Start everything; what is started is closed if the rest fails.

        Raises:
            StoreUnavailable, StoreRefused: the store cannot be used.
        """
        async with AsyncExitStack() as stack:
            if self.tracer is not None:
                stack.push_async_callback(asyncio.to_thread, self.tracer.close)
            stack.push_async_callback(self.store.close)
            await self.store.start()
            stack.push_async_callback(self.store.outputs.close)
            await self.store.outputs.start()
            stack.push_async_callback(self.keys.close)
            await self.keys.start()
            log_streams = self.settings.telemetry.log_streams
            if log_streams != "none":
                access_log.name_streams(log_streams, await self.store.keys.token_key())
            stack.callback(self.recorder.rejections.flush)
            stack.callback(self.recorder.flush)
            sampler = Sampler(
                self.recorder.registry,
                sorted(self.pipeline.models),
                self.store.monitor,
                self.pipeline.cache,
                lambda: {name: load for loads in self.loads for name, load in loads().items()},
                self.pipeline.queue_depths,
            )
            stack.push_async_callback(sampler.stop)
            began_s = time.monotonic()
            stack.push_async_callback(self.pipeline.stop)
            await self.pipeline.start()
            self.warm_s = time.monotonic() - began_s
            for versions in self.pipeline.versions.values():
                self._record_versions(versions)
            self.pipeline.aliases.on_switch.append(self._record_versions)
            sampler.start()
            self._stack = stack.pop_all()
        return self

    def _record_versions(self, versions: ModelVersions) -> None:
        """Record the loaded versions of a model, and which share of the streams each answers."""
        champion, challenger, share = versions.route
        for served in versions.loaded.values():
            rows = self.pipeline.max_batch_rows(champion)
            self.recorder.model(served.name, served.version, served.runtime.name, rows)
        shares = {champion.version: 1 - share}
        if challenger is not None:
            shares[challenger.version] = share
        self.recorder.record_shares(versions.name, shares)

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


def build_pipeline(
    settings: Settings,
    drain_s: float | None = None,
    store: Store | None = None,
    model: str | None = None,
) -> PipelineService:
    """Load the models and make the pipeline and what it needs; nothing is started yet.

    Args:
        drain_s: longest graceful shutdown of the pipeline, if not that of the settings.
        store: if not that of the settings; not started yet.
        model: name of the only model to load; None for all.

    Raises:
        ArtifactError: a model cannot be loaded, its alarms cannot have the configured rate, or
            there is no such model.
        RuntimeUnavailableError: the runtime is not installed, or cannot run a model.
        StoreRefused: the store's address cannot be used.
    """
    recorder = PrometheusRecorder()
    access_log.observe = recorder.record_request
    access_log.success_ratio = settings.telemetry.log_success_ratio
    tracer = None
    if settings.telemetry.tracing:
        # needs packages that are not installed without the extra
        from service.telemetry.tracing import open_tracer

        tracer = open_tracer()
    served = open_models(settings.models, model)
    store = store or RedisStore(settings.store)
    pipeline = Pipeline(
        served,
        store,
        recorder,
        settings=settings.batching,
        now_ms=lambda: time.time_ns() // 1_000_000,
        runtime_threads=settings.models.runtime_threads,
        state_cache_s=settings.store.tombstone_ttl_s,
        drain_s=settings.processes.drain_s if drain_s is None else drain_s,
        tracer=tracer,
        audit=audit,
        load_version=VersionFiles(settings.models),
    )
    required = settings.access.require_keys
    keys = AccessKeys(store.keys, store.rates, store.usage, required=required, on_change=audit)
    return PipelineService(settings, store, pipeline, keys, recorder, tracer)


def tune_garbage_collector() -> None:
    """Exempt long-lived objects from garbage collection, and collect rarely.

    A full collection traverses every state in memory, tens of milliseconds with the default size of
    the state cache. Other objects are freed by their reference counts, or young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
