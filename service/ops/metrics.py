"""Counters, gauges and histograms for Prometheus.

`PrometheusRecorder` is what the pipeline and the API report to. With one process the numbers
lie in memory; with several each worker keeps its own in files under
`PROMETHEUS_MULTIPROC_DIR`, which the parent sets before it starts them, and any worker that is
asked renders the sum. Labels are bounded: a model that is not served counts under `-`, so
that no client can make series. What each metric means is in `docs/reference/metrics.md`.
"""

from __future__ import annotations

import os
import platform
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from service.core.values import Timing

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
UNKNOWN_MODEL = "-"

SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10,
)  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STAGES = ("queue", "load", "infer", "commit")


class _Series(NamedTuple):
    """The series of one model; `stages` in the order of STAGES."""

    chunks: Counter
    events: Counter
    replays: Counter
    conflicts: Counter
    cache_hits: Counter
    cache_misses: Counter
    queue: Gauge
    batch_rows: Histogram
    batch_seconds: Histogram
    batch_steps: Counter
    padded_steps: Counter
    stages: tuple[Histogram, ...]


class PrometheusRecorder:
    """Implements `service.pipeline.recorder.Recorder`; one per process.

    Cheap enough for every chunk: some microseconds. Called from the event loop only.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        self._served: set[str] = set()
        model = ("model",)
        self._chunks = Counter(
            "carry_chunks", "Chunks processed and committed.", model, registry=registry
        )
        self._events = Counter(
            "carry_events", "Events of the chunks committed.", model, registry=registry
        )
        self._replays = Counter(
            "carry_replays", "Retries answered from the stored reply.", model, registry=registry
        )
        self._conflicts = Counter(
            "carry_conflicts", "Commits that found the stream moved on.", model, registry=registry
        )
        self._refusals = Counter(
            "carry_refusals",
            "Requests, or items of one, answered with a problem.",
            ("model", "code"),
            registry=registry,
        )
        self._cache_hits = Counter(
            "carry_cache_hits", "States found in a worker's memory.", model, registry=registry
        )
        self._cache_misses = Counter(
            "carry_cache_misses", "States loaded from the store.", model, registry=registry
        )
        self._queue = Gauge(
            "carry_queue_depth",
            "Chunks waiting for a batch.",
            model,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._batch_rows = Histogram(
            "carry_batch_rows", "Streams in a batch.", model, registry=registry, buckets=ROWS
        )
        self._batch_seconds = Histogram(
            "carry_batch_seconds",
            "Time of one call of the network.",
            model,
            registry=registry,
            buckets=SECONDS,
        )
        self._batch_steps = Counter(
            "carry_batch_steps", "Steps the network was asked for.", model, registry=registry
        )
        self._padded_steps = Counter(
            "carry_batch_padded_steps",
            "Steps the network computed, padding included.",
            model,
            registry=registry,
        )
        self._stages = Histogram(
            "carry_chunk_stage_seconds",
            "Time of a committed chunk in each stage.",
            ("model", "stage"),
            registry=registry,
            buckets=SECONDS,
        )
        self._models = Gauge(
            "carry_model_info",
            "The models served; always 1.",
            ("model", "version", "runtime"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        Gauge(
            "carry_build_info",
            "The service's build; always 1.",
            ("version", "python"),
            registry=registry,
            multiprocess_mode="livemax",
        ).labels(version("carry"), platform.python_version()).set(1)
        if not os.environ.get(MULTIPROCESS_DIR):
            ProcessCollector(registry=registry)
            GCCollector(registry=registry)
        # a child is found by a lock, a tuple and a dict; a batch wants a dozen of them
        self._series = lru_cache(maxsize=None)(self._series_of)
        self._refused = lru_cache(maxsize=None)(self._refusals.labels)

    def model(self, name: str, version: str, runtime: str) -> None:
        """A model is served from now on; its series begin at zero."""
        self._served.add(name)
        self._models.labels(name, version, runtime).set(1)
        self._series(name).queue.set(0)

    def _series_of(self, model: str) -> _Series:
        return _Series(
            self._chunks.labels(model),
            self._events.labels(model),
            self._replays.labels(model),
            self._conflicts.labels(model),
            self._cache_hits.labels(model),
            self._cache_misses.labels(model),
            self._queue.labels(model),
            self._batch_rows.labels(model),
            self._batch_seconds.labels(model),
            self._batch_steps.labels(model),
            self._padded_steps.labels(model),
            tuple([self._stages.labels(model, stage) for stage in STAGES]),
        )

    def chunks(self, model: str, steps: int, timings: Sequence[Timing]) -> None:
        """Chunks of one batch were committed: their steps together, the times of each."""
        series = self._series(model)
        series.chunks.inc(len(timings))
        series.events.inc(steps)
        queue_s, load_s, infer_s, commit_s = zip(*timings, strict=True)
        for stage, times_s in zip(series.stages, (queue_s, load_s, infer_s, commit_s), strict=True):
            observe_all(stage, times_s)

    def replay(self, model: str) -> None:
        """A retry was answered from the stored reply."""
        self._series(model).replays.inc()

    def refusal(self, model: str, code: str) -> None:
        """A request, or an item of one, was answered with a problem."""
        self._refused(model if model in self._served else UNKNOWN_MODEL, code).inc()

    def conflict(self, model: str) -> None:
        """A commit found the stream moved on; the chunk is done again."""
        self._series(model).conflicts.inc()

    def cache(self, model: str, hits: int, misses: int) -> None:
        """States found in, and missing from, this worker's cache when a batch was loaded."""
        series = self._series(model)
        if hits:
            series.cache_hits.inc(hits)
        if misses:
            series.cache_misses.inc(misses)

    def batch(self, model: str, rows: int, steps: int, padded_steps: int, seconds: float) -> None:
        """One runtime call: rows B, real steps, B x T after padding, wall time."""
        series = self._series(model)
        series.batch_rows.observe(rows)
        series.batch_steps.inc(steps)
        series.padded_steps.inc(padded_steps)
        series.batch_seconds.observe(seconds)

    def queue(self, model: str, depth: int) -> None:
        """Chunks waiting for a batch."""
        self._series(model).queue.set(depth)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format, of all workers together."""
        directory = os.environ.get(MULTIPROCESS_DIR)
        if not directory:
            return generate_latest(self._registry)
        _forget_dead_workers(Path(directory))
        summed = CollectorRegistry()
        MultiProcessCollector(summed, path=directory)
        return generate_latest(summed)


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe several values: as `observe` for each, with one addition for each bucket met.

    It adds to the library's own values, as `observe` does, so that it counts in several
    processes too.

    Args:
        histogram: a child, where the histogram has labels.
    """
    bounds, buckets = histogram._upper_bounds, histogram._buckets
    histogram._sum.inc(sum(values))
    # the chunks of a batch mostly share their times
    shared = bool(values) and values.count(values[0]) == len(values)
    counted = {values[0]: len(values)} if shared else Tally(values)
    for value, times in counted.items():
        buckets[bisect_left(bounds, value)].inc(times)


def _forget_dead_workers(directory: Path) -> None:
    """Drop the gauges of processes that ended; what they counted stays counted."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(directory))
        except PermissionError:
            continue
