"""Prometheus metrics: counters, gauges and histograms of the pipeline and the API.

A single process keeps its values in memory. Several workers keep theirs in files under
`PROMETHEUS_MULTIPROC_DIR`, which the parent process sets before it starts them, and the worker that
is scraped renders the sum. Label values are bounded: a model that is not served, or an address that
is no route, is counted as `-`, so that clients cannot create series.
`docs/reference/metrics.md` describes each metric.
"""

from __future__ import annotations

import asyncio
import os
import platform
import threading
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    GCCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client import values as prometheus_values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.values import MultiProcessValue, MutexValue

from service.core.errors import CarryError, ServiceFailure, Unauthenticated, leaf_errors
from service.core.values import Timing
from service.pipeline.recorder import ModelStatistics, ShadowBatch, ShadowReport
from service.telemetry.access_log import GRPC, WEBSOCKET, audit
from service.telemetry.series import MODEL, VERSION, makers_of, observe_all
from service.telemetry.shadow_metrics import ShadowMetrics, read_report

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
UNKNOWN = "-"
METHODS = frozenset(("DELETE", "GET", GRPC, "HEAD", "OPTIONS", "PATCH", "POST", "PUT", WEBSOCKET))
"""Methods of requests that have series of their own."""

FLUSH_INTERVAL_S = 1.0
"""How long the values of batches and requests are collected before they are added to their series;
a worker that is killed loses those of the last interval."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STAGES = ("queue", "load", "infer", "commit")

REJECTIONS_INTERVAL_S = 60.0
MAX_KEYS = 100
MAX_ENTRIES = 50
UNPROVEN = "unknown"
"""For requests that have not proved to hold a key of this service."""

OTHER = "other"

RESTARTS = "carry_worker_restarts"
RESTARTS_HELP = "Workers that exited and were started again."

_STATISTICS = (
    "carry_chunks_total",
    "carry_batch_rows_count",
    "carry_refusals_total",
    "carry_chunk_stage_seconds_sum",
)
"""The samples that `statistics` adds up."""


class PrometheusRecorder:
    """Recorder of Prometheus metrics (`service.pipeline.recorder.Recorder`); one per process.

    What is recorded for every batch and request is collected and added to its series once per
    interval, since each addition by itself would cost as much as a tenth of a chunk. Use from the
    event loop only.

    Attributes:
        registry: holds the metrics of this process; others may add theirs.
        rejections: counts those of access keys.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        counter, gauge, histogram = makers_of(registry)
        self._served: set[str] = set()
        self._chunks = counter("carry_chunks", "Chunks processed and committed.", MODEL)
        self._version_chunks = counter(
            "carry_version_chunks",
            "Chunks processed and committed, by the version that answered.",
            VERSION,
        )
        self._events = counter("carry_events", "Events of the chunks committed.", MODEL)
        self._replays = counter("carry_replays", "Retries answered from the stored reply.", MODEL)
        self._conflicts = counter("carry_conflicts", "Version conflicts of commits.", MODEL)
        self._rewarmed = counter(
            "carry_rewarmed",
            "Streams rewarmed for a chunk, by whether their state is exact.",
            ("model", "state"),
        )
        self._problems = counter(
            "carry_refusals",
            "Requests, or items of a request, answered with a problem.",
            ("model", "code"),
        )
        self.rejections = KeyRejections(registry)
        shadow = ShadowMetrics(registry)
        self._cache_hits = counter("carry_cache_hits", "States found in a worker's memory.", MODEL)
        self._cache_misses = counter("carry_cache_misses", "States loaded from the store.", MODEL)
        self._websockets = gauge("carry_websocket_connections", "Open WebSockets.", MODEL)
        self._watchers = gauge(
            "carry_watchers", "Clients that watch the outputs of a stream.", MODEL
        )
        self._batch_rows = histogram("carry_batch_rows", "Streams in a batch.", MODEL, buckets=ROWS)
        self._batch_seconds = histogram(
            "carry_batch_seconds", "Duration of one inference call.", MODEL
        )
        self._batch_steps = counter("carry_batch_steps", "Steps of the chunks in a batch.", MODEL)
        self._padded_steps = counter(
            "carry_batch_padded_steps", "Steps computed by the network, including padding.", MODEL
        )
        self._stages = histogram(
            "carry_chunk_stage_seconds",
            "Time of a committed chunk in each stage.",
            ("model", "stage"),
        )
        self._request_seconds = histogram(
            "carry_request_seconds", "Duration of requests.", ("method", "route", "status")
        )
        self._drift_samples = counter(
            "carry_drift_samples", "Chunks compared with the ranges of training.", VERSION
        )
        self._drift_outside = counter(
            "carry_drift_outside",
            "Compared chunks whose norm was outside of its range in training.",
            (*VERSION, "part"),
        )
        self._drift_ratios = gauge(
            "carry_drift_norm_ratio",
            "Mean norm of the last compared batch over the end of its range in training.",
            (*VERSION, "part"),
            multiprocess_mode="livemax",
        )
        self._models = gauge(
            "carry_model_info",
            "The models served; always 1.",
            ("model", "version", "runtime"),
            multiprocess_mode="livemax",
        )
        self._version_share = gauge(
            "carry_version_share",
            "Share of a model's streams that a version answers.",
            ("model", "version"),
            multiprocess_mode="livemax",
        )
        self._shares: defaultdict[str, set[str]] = defaultdict(set)
        self._max_rows = gauge(
            "carry_batch_max_rows", "Most streams in a batch.", MODEL, multiprocess_mode="livemax"
        )
        # the parent process counts them
        counter(RESTARTS, RESTARTS_HELP)
        build = gauge(
            "carry_build_info",
            "The service's build; always 1.",
            ("version", "python"),
            multiprocess_mode="livemax",
        )
        build.labels(version("carry"), platform.python_version()).set(1)
        if not os.environ.get(MULTIPROCESS_DIR):
            ProcessCollector(registry=registry)
            GCCollector(registry=registry)
        # Looking up a child takes a lock, a tuple and a dict.
        self._problems_of = lru_cache(maxsize=None)(self._problems.labels)
        self._batches: defaultdict[tuple[str, str], list[tuple[int, Sequence[float], Timing]]]
        self._batches = defaultdict(list)
        self._lookups: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self._calls: defaultdict[str, list[tuple[int, int, int, float]]] = defaultdict(list)
        self._requests: defaultdict[tuple[str, str | None, int], list[float]] = defaultdict(list)
        self._shadows: defaultdict[tuple[str, str], list[ShadowBatch]] = defaultdict(list)
        self._collected: tuple[tuple[dict[Any, list[Any]], Callable[..., None]], ...] = (
            (self._batches, self._add_batches),
            (self._lookups, self._add_lookups),
            (self._calls, self._add_calls),
            (self._requests, self._add_requests),
            (self._shadows, shadow.add),
        )
        self._flush_timer: asyncio.TimerHandle | None = None
        # two flushes at once would add the same values twice
        self._flushing = threading.Lock()

    def model(self, name: str, version: str, runtime: str, max_rows: int) -> None:
        """Register a model that is served, in batches of so many streams; its series start at
        zero."""
        self._served.add(name)
        self._max_rows.labels(name).set(max_rows)
        self._models.labels(name, version, runtime).set(1)
        self._add_batches((name, version), [])
        self._add_lookups(name, [])
        self._add_calls(name, [])
        for each in (self._replays, self._conflicts, self._websockets, self._watchers):
            each.labels(name)
        for state in ("exact", "inexact"):
            self._rewarmed.labels(name, state)
        for kind in leaf_errors(ServiceFailure):
            # an alert on an increase does not see one from no series to 1
            self._problems_of(name, kind.code)

    def record_shares(self, model: str, shares: Mapping[str, float]) -> None:
        """Record the share of the streams that each version answers; 0 for all others."""
        for known in self._shares[model] - shares.keys():
            self._version_share.labels(model, known).set(0)
        for answering, share in shares.items():
            self._version_share.labels(model, answering).set(share)
        self._shares[model] |= shares.keys()

    def record_chunks(
        self, model: str, version: str, steps: int, queue_s: Sequence[float], timing: Timing
    ) -> None:
        """Record the committed chunks of one batch: the version that answered, the sum of their
        steps, how long each waited, and the times that they share."""
        self._batches[model, version].append((steps, queue_s, timing))
        if self._flush_timer is None:
            self._flush_soon()

    def _add_batches(
        self, answered: tuple[str, str], recorded: list[tuple[int, Sequence[float], Timing]]
    ) -> None:
        model, _ = answered
        counts = [len(queue_s) for _, queue_s, _ in recorded]
        self._chunks.labels(model).inc(sum(counts))
        self._version_chunks.labels(*answered).inc(sum(counts))
        self._events.labels(model).inc(sum([steps for steps, *_ in recorded]))
        shared_s = [(timing.load_s, timing.infer_s, timing.commit_s) for *_, timing in recorded]
        queued_s = [time_s for _, queue_s, _ in recorded for time_s in queue_s]
        stages_s = np.repeat(np.array(shared_s).reshape(-1, 3), counts, axis=0).T
        for stage, times_s in zip(STAGES, (queued_s, *stages_s.tolist()), strict=True):
            observe_all(self._stages.labels(model, stage), times_s)

    def record_replay(self, model: str) -> None:
        """Count a retry that is answered from the stored reply."""
        self._replays.labels(model).inc()

    def record_error(self, model: str, error: CarryError) -> None:
        """Count a request, or an item of a request, that is answered with a problem."""
        self._problems_of(model if model in self._served else UNKNOWN, error.code).inc()
        if error.reason is not None:
            self.rejections.record(error)

    def record_conflict(self, model: str) -> None:
        """Count a version conflict; the chunk is re-evaluated."""
        self._conflicts.labels(model).inc()

    def record_rewarmed(self, model: str, exact: int, inexact: int) -> None:
        """Count streams that were rewarmed, with exact or inexact states."""
        self._rewarmed.labels(model, "exact").inc(exact)
        self._rewarmed.labels(model, "inexact").inc(inexact)

    def record_cache_lookups(self, model: str, hits: int, misses: int) -> None:
        """Count the states of a batch that this worker's cache contains and lacks."""
        self._lookups[model].append((hits, misses))

    def _add_lookups(self, model: str, recorded: list[tuple[int, int]]) -> None:
        self._cache_hits.labels(model).inc(sum([hits for hits, _ in recorded]))
        self._cache_misses.labels(model).inc(sum([misses for _, misses in recorded]))

    def record_runtime_call(
        self, model: str, rows: int, steps: int, padded_steps: int, seconds: float
    ) -> None:
        """Record one call of the runtime: rows B, steps, B x T steps with padding, wall time."""
        self._calls[model].append((rows, steps, padded_steps, seconds))

    def _add_calls(self, model: str, recorded: list[tuple[int, int, int, float]]) -> None:
        rows, steps, padded, seconds = zip(*recorded, strict=True) if recorded else [()] * 4
        observe_all(self._batch_rows.labels(model), rows)
        observe_all(self._batch_seconds.labels(model), seconds)
        self._batch_steps.labels(model).inc(sum(steps))
        self._padded_steps.labels(model).inc(sum(padded))

    def record_shadow(self, model: str, challenger: str, batch: ShadowBatch) -> None:
        """Record what the challenger of this version did."""
        self._shadows[model, challenger].append(batch)
        if self._flush_timer is None:
            self._flush_soon()

    def shadow_report(self, model: str, challenger: str) -> ShadowReport:
        """The report on a challenger, of all workers together; call it in a thread, as
        `statistics`."""
        self.flush()
        return read_report(self._of_all_workers().collect(), model, challenger)

    def record_drift(
        self,
        model: str,
        version: str,
        samples: int,
        outside: Mapping[str, int],
        ratios: Mapping[str, float],
    ) -> None:
        """Record sampled chunks of a version: by part of its inputs and states, how many norms were
        outside of their range in training, and the mean norm relative to the range's end."""
        self._drift_samples.labels(model, version).inc(samples)
        for part, count in outside.items():
            self._drift_outside.labels(model, version, part).inc(count)
            self._drift_ratios.labels(model, version, part).set(ratios[part])

    def record_websockets(self, model: str, change: int) -> None:
        """Add to the open WebSockets."""
        self._websockets.labels(model).inc(change)

    def record_watchers(self, model: str, change: int) -> None:
        """Add to the clients that watch a stream."""
        self._watchers.labels(model).inc(change)

    def record_request(self, method: str, route: str | None, status: int, ms: float) -> None:
        """Record a request of any transport."""
        if method not in METHODS:
            method = UNKNOWN
        self._requests[method, route, status].append(ms)
        if self._flush_timer is None:
            self._flush_soon()

    def _add_requests(self, request: tuple[str, str | None, int], times_ms: list[float]) -> None:
        method, route, status = request
        method, route = (UNKNOWN, UNKNOWN) if route is None else (method, route)
        child = self._request_seconds.labels(method, route, status)
        observe_all(child, [ms / 1000 for ms in times_ms])

    def _flush_soon(self) -> None:
        """Start the timer of the next flush; without an event loop, flush at once."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
        else:
            self._flush_timer = loop.call_later(FLUSH_INTERVAL_S, self._flush_at_interval)

    def _flush_at_interval(self) -> None:
        self._flush_timer = None
        self.flush()

    def flush(self) -> None:
        """Add all that was collected to its series; from any thread."""
        with self._flushing:
            for collected, add in self._collected:
                for key, values in [*collected.items()]:
                    if count := len(values):
                        add(key, values[:count])
                        del values[:count]

    def render(self) -> bytes:
        """Render the metrics of all workers in Prometheus' text format."""
        self.flush()
        return generate_latest(self._of_all_workers())

    def statistics(self) -> dict[str, ModelStatistics]:
        """The totals of every served model, of all workers together.

        Call it in a thread: it reads files where several workers share their numbers.
        """
        self.flush()
        totals: dict[str, Tally[str]] = {}
        for metric in self._of_all_workers().collect():
            for sample in metric.samples:
                if sample.name in _STATISTICS:
                    model, name = sample.labels["model"], sample.labels.get("stage", sample.name)
                    totals.setdefault(model, Tally()).update({name: sample.value})
        return {
            model: ModelStatistics(
                int(of_model["carry_chunks_total"]),
                int(of_model["carry_batch_rows_count"]),
                int(of_model["carry_refusals_total"]),
                *[of_model[stage] for stage in STAGES],
            )
            for model, of_model in totals.items()
        }

    def _of_all_workers(self) -> CollectorRegistry:
        directory = os.environ.get(MULTIPROCESS_DIR)
        if not directory:
            return self.registry
        _drop_gauges_of_dead_workers(Path(directory))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=directory)
        return registry


def share_metrics(directory: str) -> None:
    """Store the metrics of this process and its children in files of one directory, from which any
    of them can report all; call it before the first metric is made."""
    os.environ[MULTIPROCESS_DIR] = directory
    # the library read the environment when it was imported
    prometheus_values.ValueClass = MultiProcessValue()


class WorkerRestarts:
    """Counts the restarts of workers, in the process that starts them.

    That process serves no metrics: it counts in a file of its own beside those of the workers, with
    a class of values that its forks do not use. A service that started with one worker has no such
    folder, and nothing reads its count.
    """

    def __init__(self) -> None:
        name = f"{RESTARTS}_total"
        kind = MultiProcessValue() if os.environ.get(MULTIPROCESS_DIR) else MutexValue
        self._value = kind("counter", name, name, (), (), RESTARTS_HELP)

    def count(self) -> None:
        """Count one."""
        self._value.inc(1)


def _drop_gauges_of_dead_workers(directory: Path) -> None:
    """Drop the gauges of workers that exited; their counters are kept."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(directory))
        except PermissionError:
            continue


class KeyRejections:
    """Counts the rejected access keys of one process, and writes their audit lines.

    Use from the event loop only. Series and lines are bounded, whatever clients send. The first
    `MAX_KEYS` keys of the store that are rejected have series of their own. Each combination of
    key, code and reason has a line at once, and another one with the number of further rejections
    at the end of the minute; combinations beyond `MAX_ENTRIES` in a minute share one.
    """

    def __init__(self, registry: CollectorRegistry):
        self._counter = Counter(
            "carry_key_rejections",
            "Requests, or items of a request, rejected because of their access key.",
            ("key", "code"),
            registry=registry,
        )
        # an alert on an increase does not see one from no series to 1
        self._counter.labels(UNPROVEN, Unauthenticated.code)
        self._keys: set[str] = set()
        self._tally: Tally[tuple[str, str, str]] = Tally()

    def record(self, error: CarryError) -> None:
        """Record a rejection: a key that is not valid, does not allow the request, or has reached
        a limit."""
        key = error.key_id if error.key_id is not None and error.is_key_proven else UNPROVEN
        if key != UNPROVEN and len(self._keys) < MAX_KEYS:
            self._keys.add(key)
        label = key if key == UNPROVEN or key in self._keys else OTHER
        self._counter.labels(label, error.code).inc()
        entry = key, error.code, str(error.reason)
        if entry not in self._tally and len(self._tally) >= MAX_ENTRIES:
            entry = OTHER, OTHER, OTHER
        if not self._tally:
            # without the request's context, whose id the lines of the minute would have
            loop = asyncio.get_running_loop()
            loop.call_later(REJECTIONS_INTERVAL_S, self.flush, context=Context())
        self._tally[entry] += 1
        if self._tally[entry] == 1:
            _write_rejection(entry, 1)

    def flush(self) -> None:
        """Write the lines of repeated rejections; also call it before the process ends."""
        tally, self._tally = self._tally, Tally()
        for entry, count in tally.items():
            if count > 1:
                _write_rejection(entry, count - 1)


def _write_rejection(entry: tuple[str, str, str], count: int) -> None:
    key, code, reason = entry
    audit("access_rejected", key=key, code=code, reason=reason, count=count)
