"""Sampled metrics: what the sampler copies, and the connections and requests it finds."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from structlog.testing import capture_logs

from models.spec.state import State
from service.consumers.kafka import KafkaSource
from service.consumers.metrics import KafkaMetrics, TopicMetrics
from service.consumers.shared_topics import SharedTopics
from service.core.errors import Conflict, StoreRefused
from service.core.values import FIRST_TAG, Feed, StreamHead, StreamKey, StreamState
from service.pipeline.state_cache import OVERHEAD_BYTES, StateCache
from service.store.capabilities import StoreTelemetry, StreamCount
from service.telemetry.metrics import MULTIPROCESS_DIR, PrometheusRecorder
from service.telemetry.sampler import Sampler, TransportLoad
from tests.support.metrics import read, series, shadow_batch
from tests.support.pages import ROOT
from tests.support.streams import cached

COUNTS = {
    "flights": StreamCount(10.0, 4.4, 2048.0),
    "gone": StreamCount(1.0, 0.0, 64.0),
    "lost": StreamCount(2.0, 1.0, 64.0),
}


class ObservedStore:
    """A store of which only the telemetry is known."""

    def __init__(self) -> None:
        self.telemetry = StoreTelemetry(is_up=True, servers_up=2, servers_down=1)
        self.may_count = True

    async def count_streams(self) -> dict[str, StreamCount]:
        if not self.may_count:
            raise StoreRefused("no permission for dbsize")
        return COUNTS


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> PrometheusRecorder:
    monkeypatch.delenv(MULTIPROCESS_DIR, raising=False)
    return PrometheusRecorder()


def sampler_of(recorder: PrometheusRecorder, store: Any, cache: StateCache) -> Sampler:
    loads = {"http": TransportLoad(3, 2), "grpc": TransportLoad(None, 1)}
    models, depths = ["flights", "post"], iter([{"flights": 7, "post": 1}])
    return Sampler(
        recorder.registry, models, store, cache, lambda: loads, lambda: next(depths, {"flights": 4})
    )


def test_counts_are_copied_once(recorder: PrometheusRecorder) -> None:
    store, cache = ObservedStore(), StateCache(1400)
    sampler = sampler_of(recorder, store, cache)
    head = StreamHead(bytes(8), FIRST_TAG, 0)
    state = State(np.zeros(4, np.float32), np.zeros(0, np.int64))
    stream = StreamState(head, Feed.INPUTS, bytes(16), None, 0, state)
    for name in ("a", "b", "c"):
        cache.put(StreamKey("flights", name), cached(stream))
    store.telemetry.reconnects, store.telemetry.memory_ratio = 2, 0.75
    store.telemetry.round_trips_s += [0.0002, 0.3]
    assert read(recorder.render())[series("carry_queue_depth", model="flights")] == 0
    sampler.sample()
    sampler.sample()
    found = read(recorder.render())
    expected = {
        series("carry_queue_depth", model="flights"): 4,
        series("carry_queue_depth", model="post"): 1,
        series("carry_connections", transport="http"): 3,
        series("carry_requests_in_flight", transport="grpc"): 1,
        series("carry_cache_evictions_total", model="flights"): 1,
        series("carry_cache_evictions_total", model="post"): 0,
        series("carry_cache_bytes"): 2 * (OVERHEAD_BYTES + 16),
        series("carry_store_up"): 1,
        series("carry_store_servers", state="up"): 2,
        series("carry_store_servers", state="down"): 1,
        series("carry_store_memory_ratio"): 0.75,
        series("carry_store_reconnects_total"): 2,
        series("carry_store_round_trip_seconds_count"): 2,
        series("carry_store_round_trip_seconds_bucket", le="0.00025"): 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert cache.size_bytes == 2 * (OVERHEAD_BYTES + 16)
    assert series("carry_connections", transport="grpc") not in found


async def test_streams_are_counted_by_served_model(recorder: PrometheusRecorder) -> None:
    sampler = sampler_of(recorder, ObservedStore(), StateCache(0))
    sampler.start()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await sampler.stop()
    found = read(recorder.render())
    counts = {"flights": (10, 4, 2048), "post": (0, 0, 0), "-": (3, 1, 128)}
    for model, (streams, live, state_bytes) in counts.items():
        assert found[series("carry_streams", model=model)] == streams
        assert found[series("carry_live_streams", model=model)] == live
        assert found[series("carry_state_bytes", model=model)] == state_bytes
    assert {dict(labels).get("model", "") for _, labels in found} <= {"", "flights", "post", "-"}


async def test_a_count_that_is_not_permitted_is_not_repeated(
    recorder: PrometheusRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.telemetry.sampler.SAMPLE_INTERVAL_S", 0)
    monkeypatch.setattr("service.telemetry.sampler.COUNT_INTERVAL_S", 0)
    store = ObservedStore()
    store.may_count = False
    sampler = sampler_of(recorder, store, StateCache(0))
    with capture_logs() as lines:
        sampler.start()
        for _ in range(10):
            await asyncio.sleep(0)
        await sampler.stop()
    assert [line["event"] for line in lines] == ["streams_not_counted"]
    assert read(recorder.render())[series("carry_store_up")] == 1


def test_every_metric_is_documented(recorder: PrometheusRecorder) -> None:
    recorder.model("flights", "a1b2", "tensorflow", 64)
    recorder.record_request("GET", "/metrics", 200, 1.0)
    recorder.record_error("flights", Conflict(""))
    recorder.record_shares("flights", {"a1b2": 1.0})
    recorder.record_shadow("flights", "c3d4", shadow_batch())
    recorder.record_drift("flights", "a1b2", 1, {"lstm_1": 0}, {"lstm_1": 0.5})
    sampler = sampler_of(recorder, ObservedStore(), StateCache(0))
    sampler.sample()
    sampler.record_streams({})
    shared = cast(SharedTopics[Any], SimpleNamespace(counts={}, count_owned=lambda: 0))
    TopicMetrics(recorder.registry, shared, "events", "consumer").sample()
    TopicMetrics(recorder.registry, shared, "scores", "relay").sample()
    source = cast(KafkaSource, SimpleNamespace(counts={}, lags={0: 1}))
    KafkaMetrics(recorder.registry, source, "events").sample()
    page = (ROOT / "docs/reference/metrics.md").read_text()
    documented = set(re.findall(r"^\| `(carry_\w+)`", page, re.MULTILINE))
    suffix = re.compile(r"_(bucket|sum|count)$")
    rendered = {suffix.sub("", name) for name, _ in read(recorder.render())}
    assert documented == {name for name in rendered if name.startswith("carry_")}
