"""A worker with a challenger in the shadow, and a runtime that misbehaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.core.values import StreamKey, StreamState
from service.engine.runtimes.base import FloatBatch, Lengths
from service.pipeline.model_versions import Route
from service.pipeline.pipeline import Pipeline
from service.pipeline.served_model import ServedModel
from service.store.base import decode_stream
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import oracle_step
from tests.support.pipelines import (
    Counts,
    send,
    worker,
)
from tests.support.servers import becomes

HISTORY = HistorySpec(events=32, snapshots=4)
Rows = NDArray[np.float32]


class Service:
    """A worker with a challenger.

    Attributes:
        served: champion and challenger.
        runtimes: of both.
    """

    def __init__(
        self, pipeline: Pipeline, store: RedisStore, counts: Counts, challenger: ServedModel
    ):
        self.pipeline = pipeline
        self.store = store
        self.counts = counts
        [self.versions] = pipeline.versions.values()
        self.champion, self.challenger = self.versions.route.champion, challenger
        self.versions.add(challenger)
        self.offered = 0
        self.route(self.champion, challenger)

    def route(
        self, champion: ServedModel, challenger: ServedModel | None, share: float = 0.0
    ) -> None:
        self.versions.route = Route(champion, challenger, share)

    async def send(self, stream: str, rows: Rows, position: int | None = None) -> Rows:
        """Send a chunk; returns its outputs."""
        self.offered += 1
        reply = await send(self.pipeline, stream, rows, position)
        assert reply.warm is None
        return reply.outputs

    def done(self) -> dict[str, int]:
        return {name: self.counts.seen[f"shadow_{name}"] for name in OUTCOMES}

    async def settled(self) -> dict[str, int]:
        """What became of all chunks, once it is known."""
        await becomes(lambda: sum(self.done().values()) >= self.offered, "the shadow's outcomes")
        return self.done()

    async def state(self, stream: str, served: ServedModel) -> StreamState | None:
        """The stored state of a stream for a version that did not answer."""
        key = StreamKey("probe", stream)
        stored = await self.store.histories.read(key, served.fingerprint)
        return None if stored.version_state is None else decode_stream(stored.version_state)


OUTCOMES = ("computed", "dropped", "failed")


@asynccontextmanager
async def shadowed(
    url: str,
    artifacts: tuple[Artifact, Artifact],
    *,
    history: HistorySpec | None = HISTORY,
    runtime: Callable[[Artifact], NumpyRuntime] = NumpyRuntime,
) -> AsyncIterator[Service]:
    counts, store = Counts(), RedisStore(StoreSettings(url, store_wait_s=60))
    old, new = artifacts
    challenger = ServedModel(new, runtime(new), history=history)
    async with worker(
        url,
        old,
        counts,
        store=store,
        history=history,
        shadow_budget=10,
    ) as pipeline:
        yield Service(pipeline, store, counts, challenger)


def state_after(artifact: Artifact, rows: Rows) -> NDArray[np.float64]:
    return oracle_step(artifact.spec, artifact.weights, rows, artifact.state.zero().floats)[1]


def assert_state(state: StreamState | None, artifact: Artifact, rows: Rows) -> None:
    """The state is exact, at the end of these events."""
    assert state is not None
    assert state.head.position == len(rows)
    assert state.since is None
    np.testing.assert_allclose(
        state.state.floats, state_after(artifact, rows), rtol=1e-5, atol=1e-5
    )


async def feed(service: Service, stream: str, rows: Rows, sizes: Sequence[int]) -> list[Rows]:
    """Send the rows in chunks of these sizes, from position 0."""
    outputs, at = [], 0
    for size in sizes:
        outputs.append(await service.send(stream, rows[at : at + size], at))
        at += size
    return outputs


class Unruly(NumpyRuntime):
    """A runtime that does, before each call, what it is told."""

    def __init__(self, artifact: Artifact):
        super().__init__(artifact)
        self.before: Callable[[], None] = lambda: None
        self.factor = 1.0

    def step(self, rows: FloatBatch, lengths: Lengths, states: Rows) -> tuple[FloatBatch, Rows]:
        self.before()
        outputs, after = super().step(rows, lengths, states)
        return outputs, (after * np.float32(self.factor)).astype(np.float32)


def unruly(service: Service) -> Unruly:
    runtime = service.challenger.runtime
    assert isinstance(runtime, Unruly)
    return runtime
