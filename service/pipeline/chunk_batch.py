"""Runs one batch of chunks: load -> evaluate -> encode -> infer -> commit -> reply.

A batch holds chunks of different streams of one model. Its items fail independently: a rejected,
malformed or conflicting chunk never affects the others. Streams are versioned (optimistic
concurrency): a commit is a compare-and-set on the stream head, and a chunk whose commit meets a
version conflict is evaluated and computed again, up to a limit.

The batcher answers a job whose deadline passes, whatever stage its batch is in. The stages check
deadlines where it decides whether the chunk is applied (`ChunkLoader`, `ChunkCommitter`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable
from typing import Final

from service.core.delivery import Resolution, resolve_conflict, stream_facts
from service.core.errors import (
    CarryError,
    Conflict,
    DeadlineExceeded,
    OutcomeUnknown,
    ShuttingDown,
    StoreUnavailable,
)
from service.core.tracing import BatchTimes, Tracer
from service.core.values import NO_STREAM, Reply, StoredReply, StreamState, Timing
from service.engine.compute import Compute
from service.engine.fair_queue import BatchControl
from service.pipeline.batch_item import BatchItem, ChunkJob, Computed, StageTimes
from service.pipeline.chunk_load import ChunkLoader, StateCache, StoreResponsiveness
from service.pipeline.inference import Inference
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.pipeline.shards import Shards
from service.store.base import COMMITTED, Commit, CommitResult, Conflicted, StateStore

MAX_PARTS: Final = 3
MIN_PART_ROWS: Final = 4
"""A batch that runs alone is committed in up to `MAX_PARTS` parts, of `MIN_PART_ROWS` or more."""


class ChunkBatchRunner:
    """Runs the batches of one model; its batcher calls it with the jobs of each batch.

    Args:
        now_ms: wall clock in epoch milliseconds.
        attempts: how often a chunk is tried while other writers change its stream.
        max_detached: most chunks that may wait outside of batches for unresponsive shards.
        reset: whether a stream whose state another version of the model wrote starts over;
            otherwise its chunks are rejected.
        tracer: records the batches of traced requests; None records none.

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
        tracer: Tracer | None = None,
    ):
        self._name = served.name
        self._tracer = tracer
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
        if self._shards.unresponsive:
            items = self._shards.detach_unresponsive(items, control)
        try:
            ready, to_retry = await self._loader.evaluate(items, times, control)
            computed = await self._infer(ready, times)
            if any(item.chunk.dry_run for item, _ in computed):
                computed = self._committer.answer_dry_runs(computed, times)
            if computed:
                to_retry += await self._committer.commit(computed, times, control)
        finally:
            if self._tracer is not None:
                self._trace(self._tracer, items, times)
        return self._jobs_to_retry(to_retry)

    def _trace(self, tracer: Tracer, items: list[BatchItem], times: StageTimes) -> None:
        """Record a batch, if one of its requests is traced."""
        # a request for many streams has several chunks
        spans = list(dict.fromkeys(item.chunk.span for item in items if item.chunk.span))
        if spans:
            load_end_s = times.began_s + times.load_s
            infer_end_s = times.infer_began_s + times.infer_s
            stages = BatchTimes(
                (times.began_s, time.monotonic()),
                (times.began_s, load_end_s) if times.load_s else None,
                (times.infer_began_s, infer_end_s) if times.infer_s else None,
                (times.commit_began_s, times.commit_ended_s) if times.commit_ended_s else None,
            )
            tracer.record_batch(self._name, spans, len(items), stages)

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


class ChunkCommitter:
    """Last stage of a batch: commits and answers the chunks of one model.

    No chunk is answered before the outcome of its commit is known. The stream is released, and its
    new state cached, as soon as the commit is sent: the stream's next chunk may be computed from
    the uncommitted state (speculative execution, early release), because its own commit follows on
    the same ordered connection and expects the head that this one writes. If this commit fails, so
    does the next one, and its chunk is evaluated again, behind this one if that is retried too.

    An item whose deadline passes before its commit is sent is dropped: nothing was applied.
    Afterwards its outcome is unknown until the store answers.

    Args:
        loader: answers chunks that turn out to be duplicates.
        jobs_to_retry: the jobs of items that may be retried; fails the others.
    """

    def __init__(
        self,
        served: ServedModel,
        store: StateStore,
        cache: StateCache,
        shards: Shards,
        recorder: Recorder,
        responsiveness: StoreResponsiveness,
        loader: ChunkLoader,
        jobs_to_retry: Callable[[list[BatchItem]], list[ChunkJob]],
    ):
        self._served = served
        self._store = store
        self._cache = cache
        self._shards = shards
        self._recorder = recorder
        self._responsiveness = responsiveness
        self._loader = loader
        self._jobs_to_retry = jobs_to_retry

    def answer_dry_runs(self, computed: list[Computed], times: StageTimes) -> list[Computed]:
        """Answer the dry runs, of which nothing is stored; returns the other items."""
        applied: list[Computed] = []
        for item, new in computed:
            if item.chunk.dry_run:
                head = item.base.head if item.base else NO_STREAM
                reply = self._reply(item, new, _timing(item, times, 0.0))
                item.job.resolve(reply._replace(head=head, created=False, dry_run=True))
            else:
                applied.append((item, new))
        return applied

    async def commit(
        self, computed: list[Computed], times: StageTimes, control: BatchControl
    ) -> list[BatchItem]:
        """Commit computed items and answer them; returns the items to be retried.

        A batch that runs alone is pipelined in a few parts: the store writes one part while the
        next is prepared, and the first parts are answered while the store writes the last.
        """
        if self._store.shard(computed[0][0].key) is not None:
            return await self._commit_shards(computed, times, control)
        parts = min(MAX_PARTS, len(computed) // MIN_PART_ROWS)
        if parts < 2 or not control.is_alone:
            return await self._commit_part(computed, times, control)
        rows = math.ceil(len(computed) / parts)
        commits = [
            self._commit_part(computed[at : at + rows], times, control)
            for at in range(0, len(computed), rows)
        ]
        to_retry: list[BatchItem] = []
        # all parts are awaited even if one of them raises
        for result in await asyncio.gather(*commits, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            to_retry += result
        return to_retry

    async def _commit_shards(
        self, computed: list[Computed], times: StageTimes, control: BatchControl
    ) -> list[BatchItem]:
        """Commit to all shards concurrently; returns the items to be retried."""

        def on_timeout(
            shard: Hashable, part: list[Computed], task: asyncio.Task[list[BatchItem]]
        ) -> None:
            async def finish() -> list[ChunkJob]:
                return self._jobs_to_retry(await task)

            self._shards.detach(shard, [item for item, _ in part], control, finish())

        async def commit(part: list[Computed]) -> list[BatchItem]:
            return await self._commit_part(part, times, control)

        results = await self._shards.run_by_shard(
            computed, lambda each: each[0].key, commit, on_timeout
        )
        return [item for _, to_retry in results for item in to_retry]

    async def _commit_part(
        self, computed: list[Computed], times: StageTimes, control: BatchControl
    ) -> list[BatchItem]:
        """Commit some items of a batch and answer them; returns the items to be retried."""
        began_s = time.monotonic()
        computed = [each for each in computed if self._is_in_time(each[0].job, began_s)]
        if not computed:
            return []
        commits: list[Commit] = []
        for item, new in computed:
            item.job.is_committing = True
            reply = StoredReply(new.head, item.outputs)
            commits.append(Commit(item.key, item.expected, new, reply))
            self._cache.put(item.key, new)
        control.release_streams([commit.key for commit in commits])
        self._responsiveness.note_request()
        try:
            results = await self._store.commit(commits, _last_deadline_s(computed))
        except BaseException as error:
            for commit in commits:
                self._cache.drop(commit.key)
            if not isinstance(error, CarryError):
                raise
            for item, _ in computed:
                item.job.resolve(self.map_error(item.job, error))
            return []
        times.commit_began_s = times.commit_began_s or began_s
        times.commit_ended_s = time.monotonic()
        commit_s = times.commit_ended_s - began_s
        to_retry: list[BatchItem] = []
        timings: list[Timing] = []
        steps = 0
        for (item, new), result in zip(computed, results, strict=True):
            timing = _timing(item, times, commit_s)
            if result is COMMITTED:
                timings.append(timing)
                steps += item.chunk.steps.length
                item.job.resolve(self._reply(item, new, timing))
            elif not await self._resolve_uncommitted(item, new, result, timing):
                to_retry.append(item)
        if timings:
            self._responsiveness.note_response()
            self._recorder.record_chunks(self._served.name, steps, timings)
        return to_retry

    def _is_in_time(self, job: ChunkJob, now_s: float) -> bool:
        """Whether the chunk may still be committed: its deadline has not passed, and its caller
        has not been answered with an error."""
        if job.deadline_s <= now_s:
            job.resolve(DeadlineExceeded("the deadline expired before its commit"))
        return not job.is_resolved

    async def _resolve_uncommitted(
        self, item: BatchItem, new: StreamState, result: CommitResult, timing: Timing
    ) -> bool:
        """Answer an item whose commit failed or conflicted; False if it has to be retried."""
        self._cache.drop(item.key)
        if isinstance(result, CarryError):
            item.job.resolve(self.map_error(item.job, result))
            return True
        reply = self._reply(item, new, timing)
        if isinstance(result, Conflicted):
            resolution = resolve_conflict(item.chunk, new.head, result.stored)
            if resolution is Resolution.RE_EVALUATE:
                self._recorder.record_conflict(self._served.name)
                item.job.is_committing = False
                item.expected = result.stored
                return False
            if resolution is Resolution.STORED_REPLY:
                return await self._loader.replay(item, own=reply)
        self._recorder.record_chunks(self._served.name, item.chunk.steps.length, [timing])
        item.job.resolve(reply)
        return True

    def _reply(self, item: BatchItem, new: StreamState, timing: Timing) -> Reply:
        head, last = new.head, new.last
        created = last is not None and last.created
        first = self._served.output_position(item.chunk, head)
        return Reply(item.key, head, item.outputs, new.state, False, created, timing, first)

    def map_error(self, job: ChunkJob, error: CarryError) -> CarryError:
        """The error to answer a job with, given what failed.

        Once its commit is sent, a chunk may have been applied: a deadline or a shutdown then
        becomes `outcome_unknown`, and a chunk without a position must not be sent again. A deadline
        that expires while the store or the stream's shard does not answer becomes
        `store_unavailable`.
        """
        if not job.is_committing:
            if not isinstance(error, DeadlineExceeded):
                return error
            if self._responsiveness.is_unresponsive():
                silence_s = self._responsiveness.silence_s()
                return StoreUnavailable(
                    f"{error.detail}; the store has not answered for {silence_s:.1f} s"
                )
            if self._shards.is_unresponsive(job.payload.key):
                return StoreUnavailable(f"{error.detail}; the stream's shard does not answer")
            return error
        if isinstance(error, DeadlineExceeded | ShuttingDown):
            stream = job.payload.key.stream
            error = OutcomeUnknown(
                f"whether the store wrote stream {stream!r} is not known: {error.detail}",
                stream=stream,
            )
        return error if job.payload.position is not None else error.without_position()


def _timing(item: BatchItem, times: StageTimes, commit_s: float) -> Timing:
    """The times of one item: those of the batch, and its own in the queue."""
    queue_s = times.began_s - item.job.submitted_s
    return Timing(queue_s, times.load_s, times.infer_s, commit_s)


def _last_deadline_s(computed: list[Computed]) -> float | None:
    """The latest deadline of the items; None if one of them has none."""
    deadline_s = max([item.job.deadline_s for item, _ in computed])
    return None if deadline_s == math.inf else deadline_s
