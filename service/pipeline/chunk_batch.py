"""Runs one batch of chunks: load -> evaluate -> encode -> infer -> commit -> reply.

A batch holds chunks of different streams of one model. Its items fail independently: a rejected,
malformed or conflicting chunk never affects the others. Streams are versioned (optimistic
concurrency): a commit is a compare-and-set on the stream head, and a chunk whose commit meets a
version conflict is evaluated and computed again, up to a limit.

The batcher answers a job whose deadline passes, whatever stage its batch is in. The stages check
deadlines where it decides whether the chunk is applied (`chunk_load`, `chunk_commit`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from service.core.delivery import stream_facts
from service.core.errors import Conflict
from service.engine.compute import Compute
from service.engine.fair_queue import BatchControl
from service.engine.state_cache import StateCache
from service.pipeline.batch_item import BatchItem, ChunkJob, StageTimes
from service.pipeline.chunk_commit import ChunkCommitter
from service.pipeline.chunk_load import ChunkLoader
from service.pipeline.inference import Inference
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.pipeline.shards import Shards
from service.pipeline.store_responsiveness import StoreResponsiveness
from service.store.base import StateStore


class ChunkBatchRunner:
    """Runs the batches of one model; its batcher calls it with the jobs of each batch.

    Args:
        now_ms: wall clock in epoch milliseconds.
        attempts: how often a chunk is tried while other writers change its stream.
        max_detached: most chunks that may wait outside of batches for unresponsive shards.
        reset: whether a stream whose state another version of the model wrote starts over;
            otherwise its chunks are rejected.

    Attributes:
        map_error: `ChunkCommitter.map_error`, for the batcher's own errors.
    """

    def __init__(
        self,
        served: ServedModel,
        store: StateStore,
        cache: StateCache,
        compute: Compute,
        recorder: Recorder,
        *,
        now_ms: Callable[[], int],
        attempts: int,
        max_detached: int,
        reset: bool = False,
    ):
        self._attempts = attempts
        self._shards = Shards(store, max_detached)
        responsiveness = StoreResponsiveness()
        self._loader = ChunkLoader(
            served, store, cache, self._shards, recorder, responsiveness, reset=reset
        )
        self._infer = Inference(served, compute, recorder, now_ms)
        self._committer = ChunkCommitter(
            served,
            store,
            cache,
            self._shards,
            recorder,
            responsiveness,
            self._loader,
            self._jobs_to_retry,
        )
        self.map_error = self._committer.map_error

    async def __call__(self, jobs: list[ChunkJob], control: BatchControl) -> list[ChunkJob]:
        """Run one batch and resolve its jobs; returns the jobs to be retried in a later batch."""
        times = StageTimes(time.monotonic())
        items = [BatchItem(job, job.payload, job.payload.key) for job in jobs]
        items = self._shards.detach_unresponsive(items, control)
        ready, to_retry = await self._loader.evaluate(items, times, control)
        computed = await self._infer(ready, times)
        if computed:
            to_retry += await self._committer.commit(computed, times, control)
        return self._jobs_to_retry(to_retry)

    def _jobs_to_retry(self, items: list[BatchItem]) -> list[ChunkJob]:
        """The jobs of the items that have attempts left; the others fail with Conflict."""
        return [item.job for item in items if self._can_retry(item)]

    def _can_retry(self, item: BatchItem) -> bool:
        """Whether an unresolved item has attempts left. An item without is resolved here."""
        if item.job.is_resolved:
            return False
        if item.job.attempts + 1 < self._attempts:
            return True
        stream = item.key.stream
        item.job.resolve(
            Conflict(
                f"other writers changed stream {stream!r} {self._attempts} times in a row",
                **stream_facts(stream, item.expected),
            )
        )
        return False
