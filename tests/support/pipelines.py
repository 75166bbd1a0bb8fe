"""Pipelines with a Redis server and the oracle as runtime, and chunks for them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.history import HistorySpec
from models.spec.model import parse_spec
from models.spec.state import State
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest, new_nonce
from service.core.errors import CarryError
from service.core.values import Chunk, Feed, Reply, SequenceInput, Steps, StreamKey, Timing
from service.engine.runtimes.base import Runtime
from service.pipeline.model_aliases import VersionLoader
from service.pipeline.pipeline import Pipeline
from service.pipeline.recorder import ShadowBatch, ShadowReport
from service.pipeline.served_model import ServedModel
from service.pipeline.settings import BatchingSettings
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from service.telemetry.shadow_metrics import ShadowMetrics, read_report
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights, oracle_step

SPEC = parse_spec(
    {
        "name": "probe",
        "features": 3,
        "layers": [{"kind": "lstm", "units": 5}, {"kind": "gru", "units": 4}],
        "heads": [
            {"kind": "sequence", "name": "last"},
            {"kind": "dense", "name": "out", "units": 2},
            {
                "kind": "dense",
                "name": "steep",
                "input": "features",
                "units": 1,
                "activation": "exponential",
            },
        ],
    }
)


@dataclass
class Counts:
    """A recorder that counts.

    Attributes:
        rejected: id and reason of each access key that was rejected.
        shadows: what challengers did.
        drift: what was recorded of sampled batches: version, chunks, norms outside and ratios.
    """

    seen: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str | None, str | None]] = field(default_factory=list)
    shadows: list[ShadowBatch] = field(default_factory=list)
    largest_batch: int = 0
    drift: list[tuple[str, int, Mapping[str, int], Mapping[str, float]]] = field(
        default_factory=list
    )

    def record_chunks(
        self, model: str, version: str, steps: int, queue_s: Sequence[float], timing: Timing
    ) -> None:
        self.seen["chunks"] += len(queue_s)
        self.seen[version] += len(queue_s)
        self.seen["events"] += steps

    def record_replay(self, model: str) -> None:
        self.seen["replays"] += 1

    def record_error(self, model: str, error: CarryError) -> None:
        self.seen[error.code] += 1
        if error.reason is not None:
            self.rejected.append((error.key_id, error.reason))

    def record_conflict(self, model: str) -> None:
        self.seen["conflicts"] += 1

    def record_rewarmed(self, model: str, exact: int, inexact: int) -> None:
        self.seen["rewarmed"] += exact
        self.seen["rewarmed_inexact"] += inexact

    def record_cache_lookups(self, model: str, hits: int, misses: int) -> None:
        self.seen["hits"] += hits
        self.seen["misses"] += misses

    def record_runtime_call(
        self, model: str, rows: int, steps: int, padded_steps: int, seconds: float
    ) -> None:
        self.seen["batches"] += 1
        self.largest_batch = max(self.largest_batch, rows)

    def record_shadow(self, model: str, challenger: str, batch: ShadowBatch) -> None:
        self.seen.update({f"shadow_{outcome}": n for outcome, n in batch.outcomes.items()})
        self.shadows.append(batch)

    def shadow_report(self, model: str, challenger: str) -> ShadowReport:
        registry = CollectorRegistry()
        ShadowMetrics(registry).add((model, challenger), self.shadows)
        return read_report(registry.collect(), model, challenger)

    def record_drift(
        self,
        model: str,
        version: str,
        samples: int,
        outside: Mapping[str, int],
        ratios: Mapping[str, float],
    ) -> None:
        self.drift.append((version, samples, outside, ratios))

    def record_websockets(self, model: str, change: int) -> None:
        self.seen["websockets"] += change

    def record_watchers(self, model: str, change: int) -> None:
        self.seen["watchers"] += change


def make_artifact(folder: Path, seed: int = 1) -> Artifact:
    """The probe model with contracting weights."""
    return write_artifact(folder / f"probe-{seed}", SPEC, contracting_weights(SPEC, seed))


UNBOUNDED = BatchingSettings(inference_timeout_s=3600, max_queue_wait_s=math.inf)
"""Settings whose durations a loaded machine does not exceed."""


@asynccontextmanager
async def worker(
    url: str,
    artifact: Artifact,
    counts: Counts | None = None,
    *,
    cache_bytes: int = 2**20,
    reply_max_bytes: int = 65_536,
    idle_ttl_s: int = 0,
    store: RedisStore | None = None,
    runtime: Runtime | None = None,
    in_flight: int = 3,
    queue: int = 4096,
    drain_s: float = 30.0,
    on_model_change: Literal["rewarm", "keep", "reset", "refuse"] = "rewarm",
    history: HistorySpec | None = None,
    load_version: VersionLoader | None = None,
    shadow_budget: float = 0.5,
) -> AsyncIterator[Pipeline]:
    """One worker's pipeline on a store of its own connections."""
    store = store or RedisStore(
        StoreSettings(url, reply_max_bytes=reply_max_bytes, idle_ttl_s=idle_ttl_s, store_wait_s=60)
    )
    pipeline = Pipeline(
        [ServedModel(artifact, runtime or NumpyRuntime(artifact), history=history)],
        store,
        counts or Counts(),
        settings=replace(
            UNBOUNDED,
            max_queue=queue,
            state_cache_bytes=cache_bytes,
            conflict_attempts=64,
            batches_in_flight=in_flight,
            on_model_change=on_model_change,
            shadow_budget=shadow_budget,
        ),
        now_ms=lambda: time.time_ns() // 1_000_000,
        drain_s=drain_s,
        load_version=load_version,
    )
    await store.start()
    try:
        await pipeline.start()
        yield pipeline
    finally:
        await pipeline.stop()
        await store.close()


def rows_of(random: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Rows [count, F] of the probe model."""
    return random.normal(size=(count, SPEC.input_features)).astype(np.float32)


def chunk_of(
    stream: str,
    rows: NDArray[np.float32],
    position: int | None = None,
    *,
    epoch: bytes | None = None,
    model: str = "probe",
) -> Chunk:
    """One chunk as a transport would make it."""
    steps = Steps(Feed.INPUTS, len(rows), rows=rows)
    nonce = b"" if position is not None else new_nonce()
    return Chunk(StreamKey(model, stream), steps, chunk_digest(None, steps, nonce), position, epoch)


async def send(
    pipeline: Pipeline,
    stream: str,
    rows: NDArray[np.float32],
    position: int | None = None,
    *,
    epoch: bytes | None = None,
    deadline_s: float = math.inf,
) -> Reply:
    """Send a chunk of the probe model to a service that is open; returns its reply."""
    chunk = chunk_of(stream, rows, position, epoch=epoch)
    return await pipeline.process(ANYONE, chunk, deadline_s)


def sequence_of(rows: NDArray[np.float32]) -> SequenceInput:
    """A sequence to predict, of the probe model."""
    return SequenceInput(Steps(Feed.INPUTS, len(rows), rows=rows))


def oracle_outputs(
    artifact: Artifact, rows: NDArray[np.float32], state: State | None = None
) -> NDArray[np.float64]:
    """The oracle on the whole sequence: outputs [T, O]."""
    start = artifact.state.zero() if state is None else state
    return oracle_step(artifact.spec, artifact.weights, rows, start.floats)[0]
