"""Metrics that are sampled once a second, at no cost to requests.

Connections, requests in flight, queues, the state cache and the store count for themselves in plain
attributes, and the sampler copies these into metrics. Every `COUNT_INTERVAL_S` it also counts the
streams in the store, which takes bounded time (`service.store.redis.monitor`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Final, NamedTuple

import structlog
from prometheus_client import CollectorRegistry

from service.core.errors import CarryError, StoreRefused
from service.pipeline.state_cache import StateCache
from service.store.capabilities import StoreMonitor, StreamCount
from service.telemetry.metrics import UNKNOWN
from service.telemetry.series import MODEL, makers_of, observe_all

SAMPLE_INTERVAL_S: Final = 1.0
COUNT_INTERVAL_S: Final = 30.0
"""Time between two counts of the streams in the store; each worker counts."""

log = structlog.get_logger(__name__)


class TransportLoad(NamedTuple):
    """Open connections of one transport, if they are known, and requests being answered."""

    connections: int | None
    requests: int


Loads = Callable[[], Mapping[str, TransportLoad]]
"""Returns the load of each transport."""


class Sampler:
    """Samples one worker; `start` and `stop` once each, inside its event loop."""

    def __init__(
        self,
        registry: CollectorRegistry,
        models: Collection[str],
        store: StoreMonitor,
        cache: StateCache,
        loads: Loads,
        queue_depths: Callable[[], Mapping[str, int]],
    ):
        self._models = models
        self._store = store
        self._cache = cache
        self._loads = loads
        self._queue_depths = queue_depths
        self._task: asyncio.Task[None] | None = None
        self._count_at_s = 0.0
        self._may_count = True
        self._evictions: Tally[str] = Tally()
        self._reconnects = 0
        counter, gauge, histogram = makers_of(registry)
        self._connections = gauge(
            "carry_connections", "Open connections of clients.", ("transport",)
        )
        self._requests = gauge(
            "carry_requests_in_flight", "Requests that are being answered.", ("transport",)
        )
        self._queue = gauge("carry_queue_depth", "Chunks waiting for a batch.", MODEL)
        self._cache_bytes = gauge(
            "carry_cache_bytes", "Memory of the states in the workers' caches."
        )
        self._cache_evictions = counter(
            "carry_cache_evictions", "States evicted from a worker's cache.", MODEL
        )
        self._store_up = gauge(
            "carry_store_up", "Whether the store accepts commits.", multiprocess_mode="livemin"
        )
        latest = partial(gauge, multiprocess_mode="livemostrecent")
        self._store_servers = latest(
            "carry_store_servers",
            "Primaries of the store, by whether they accept commits.",
            ("state",),
        )
        self._store_memory = latest(
            "carry_store_memory_ratio",
            "Share of its maxmemory that the fullest primary of the store uses.",
        )
        self._store_reconnects = counter(
            "carry_store_reconnects", "Connections to the store opened again."
        )
        self._round_trips = histogram(
            "carry_store_round_trip_seconds", "Time between a command to the store and its reply."
        )
        self._counts = (
            latest("carry_streams", "Streams in the store.", MODEL),
            latest("carry_live_streams", "Streams with a chunk in the last five minutes.", MODEL),
            latest("carry_state_bytes", "Bytes of the states in the store.", MODEL),
        )
        for model in models:
            self._cache_evictions.labels(model)
            self._queue.labels(model).set(0)

    def start(self) -> None:
        """Sample from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop; before the store is closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self.sample()
            if self._may_count and time.monotonic() >= self._count_at_s:
                await self._count()
                self._count_at_s = time.monotonic() + COUNT_INTERVAL_S
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def sample(self) -> None:
        """Copy everything that is counted in memory."""
        for transport, load in self._loads().items():
            if load.connections is not None:
                self._connections.labels(transport).set(load.connections)
            self._requests.labels(transport).set(load.requests)
        for model, depth in self._queue_depths().items():
            self._queue.labels(model).set(depth)
        self._cache_bytes.set(self._cache.size_bytes)
        for model, count in self._cache.evictions.items():
            if added := count - self._evictions[model]:
                self._evictions[model] = count
                self._cache_evictions.labels(model).inc(added)
        telemetry = self._store.telemetry
        self._store_up.set(telemetry.is_up)
        self._store_servers.labels("up").set(telemetry.servers_up)
        self._store_servers.labels("down").set(telemetry.servers_down)
        self._store_memory.set(telemetry.memory_ratio)
        self._store_reconnects.inc(telemetry.reconnects - self._reconnects)
        self._reconnects = telemetry.reconnects
        if telemetry.round_trips_s:
            observe_all(self._round_trips, list(telemetry.round_trips_s))
            telemetry.round_trips_s.clear()

    async def _count(self) -> None:
        try:
            counts = await self._store.count_streams()
        except StoreRefused as error:
            self._may_count = False
            log.warning("streams_not_counted", reason=error.detail)
        except CarryError:
            return  # the metrics of the store say that it is unavailable
        else:
            self.record_streams(counts)

    def record_streams(self, counts: Mapping[str, StreamCount]) -> None:
        """Record the streams of each model; those of models that are not served together."""
        totals = {model: StreamCount() for model in (*self._models, UNKNOWN)}
        for model, count in counts.items():
            name = model if model in self._models else UNKNOWN
            totals[name] = StreamCount(*map(sum, zip(totals[name], count, strict=True)))
        for model, total in totals.items():
            for metric, value in zip(self._counts, total, strict=True):
                metric.labels(model).set(round(value))
