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
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from msgspec.structs import replace

from service.core.delivery import Resolution, last_chunk, resolve_conflict, stream_facts
from service.core.errors import (
    CarryError,
    Conflict,
    DeadlineExceeded,
    OutcomeUnknown,
    ShuttingDown,
    StoreUnavailable,
)
from service.core.tracing import BatchTimes, Tracer
from service.core.values import NO_STREAM, Reply, Timing
from service.engine.compute import Compute
from service.engine.fair_queue import BatchControl
from service.pipeline.batch_item import BaseStream, BatchItem, ChunkJob, Computed, StageTimes
from service.pipeline.chunk_load import ChunkLoader, StateCache, StoreResponsiveness
from service.pipeline.inference import Inference
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.pipeline.shards import Shards
from service.store.base import COMMITTED, CommitColumns, CommitResult, Conflicted, StateStore
from service.store.codec import (
    encode_replies,
    encode_states,
    pack_head,
    unpack_head,
)

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
        self._infer = Inference(served, compute, recorder)
        self._committer = ChunkCommitter(
            served,
            store,
            cache,
            self._shards,
            recorder,
            responsiveness,
            self._loader,
            self._jobs_to_retry,
            now_ms,
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
            if computed is not None and any(item.chunk.dry_run for item in computed.items):
                computed = self._committer.answer_dry_runs(computed, times)
            if computed is not None and computed.items:
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
                **stream_facts(stream, unpack_head(item.expected) if item.expected else None),
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
        now_ms: wall clock in epoch milliseconds.
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
        now_ms: Callable[[], int],
    ):
        self._served = served
        self._store = store
        self._cache = cache
        self._shards = shards
        self._recorder = recorder
        self._responsiveness = responsiveness
        self._loader = loader
        self._jobs_to_retry = jobs_to_retry
        self._now_ms = now_ms

    def answer_dry_runs(self, computed: Computed, times: StageTimes) -> Computed:
        """Answer the dry runs, of which nothing is stored; returns the other items."""
        applied: list[int] = []
        for at, item in enumerate(computed.items):
            if not item.chunk.dry_run:
                applied.append(at)
            else:
                head = item.base.head if item.base else NO_STREAM
                reply = self._reply(computed, at, times, 0.0)
                item.job.resolve(replace(reply, head=head, created=False, dry_run=True))
        return computed.select(applied)

    async def commit(
        self, computed: Computed, times: StageTimes, control: BatchControl
    ) -> list[BatchItem]:
        """Commit computed items and answer them; returns the items to be retried.

        A batch that runs alone is pipelined in a few parts: the store writes one part while the
        next is prepared, and the first parts are answered while the store writes the last.
        """
        count = len(computed.items)
        if self._store.shard(computed.items[0].key) is not None:
            return await self._commit_shards(computed, times, control)
        parts = min(MAX_PARTS, count // MIN_PART_ROWS)
        if parts < 2 or not control.is_alone:
            return await self._commit_part(computed, times, control)
        rows = math.ceil(count / parts)
        commits = [
            self._commit_part(computed.part(slice(at, at + rows)), times, control)
            for at in range(0, count, rows)
        ]
        to_retry: list[BatchItem] = []
        # all parts are awaited even if one of them raises
        for result in await asyncio.gather(*commits, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
            to_retry += result
        return to_retry

    async def _commit_shards(
        self, computed: Computed, times: StageTimes, control: BatchControl
    ) -> list[BatchItem]:
        """Commit to all shards concurrently; returns the items to be retried."""

        def on_timeout(
            shard: Hashable, part: list[int], task: asyncio.Task[list[BatchItem]]
        ) -> None:
            async def finish() -> list[ChunkJob]:
                return self._jobs_to_retry(await task)

            self._shards.detach(shard, [computed.items[at] for at in part], control, finish())

        async def commit(part: list[int]) -> list[BatchItem]:
            return await self._commit_part(computed.select(part), times, control)

        results = await self._shards.run_by_shard(
            list(range(len(computed.items))), lambda at: computed.items[at].key, commit, on_timeout
        )
        return [item for _, to_retry in results for item in to_retry]

    async def _commit_part(
        self, computed: Computed, times: StageTimes, control: BatchControl
    ) -> list[BatchItem]:
        """Commit some items of a batch and answer them; returns the items to be retried."""
        began_s = time.monotonic()
        deadlines_s = [item.job.deadline_s for item in computed.items]
        if min(deadlines_s) <= began_s or any(item.job.is_resolved for item in computed.items):
            in_time = [self._is_in_time(item.job, began_s) for item in computed.items]
            computed = computed.select([at for at, is_in_time in enumerate(in_time) if is_in_time])
        if not computed.items:
            return []
        items, heads = computed.items, computed.heads
        commits = self._encode(computed)
        for item, head, value in zip(items, heads, commits.states, strict=True):
            item.job.is_committing = True
            self._cache.put(item.key, BaseStream(head, item.chunk.steps.feed, value))
        control.release_streams(commits.keys)
        self._responsiveness.note_request()
        try:
            results = await self._store.commit(commits, _last_deadline_s(items))
        except BaseException as error:
            for key in commits.keys:
                self._cache.drop(key)
            if not isinstance(error, CarryError):
                raise
            for item in items:
                item.job.resolve(self.map_error(item.job, error))
            return []
        times.commit_began_s = times.commit_began_s or began_s
        times.commit_ended_s = time.monotonic()
        commit_s = times.commit_ended_s - began_s
        to_retry: list[BatchItem] = []
        timings: list[Timing] = []
        steps = 0
        for at, result in enumerate(results):
            item, reply = items[at], self._reply(computed, at, times, commit_s)
            if result is COMMITTED:
                timings.append(reply.timing)
                steps += item.chunk.steps.length
                item.job.resolve(reply)
            elif not await self._resolve_uncommitted(item, reply, result):
                to_retry.append(item)
        if timings:
            self._responsiveness.note_response()
            self._recorder.record_chunks(self._served.name, steps, timings)
        return to_retry

    def _encode(self, computed: Computed) -> CommitColumns:
        """The bytes that the store compares and writes for each item."""
        items, packed = computed.items, list(map(pack_head, computed.heads))
        states = encode_states(
            [item.chunk.steps.feed for item in items],
            packed,
            [last_chunk(item.chunk, item.base.head if item.base else None) for item in items],
            computed.states,
            fingerprint=self._served.fingerprint,
            updated_ms=self._now_ms(),
        )
        return CommitColumns(
            [item.key for item in items],
            [item.expected for item in items],
            states,
            encode_replies(packed, computed.outputs),
        )

    def _is_in_time(self, job: ChunkJob, now_s: float) -> bool:
        """Whether the chunk may still be committed: its deadline has not passed, and its caller
        has not been answered with an error."""
        if job.deadline_s <= now_s:
            job.resolve(DeadlineExceeded("the deadline expired before its commit"))
        return not job.is_resolved

    async def _resolve_uncommitted(
        self, item: BatchItem, reply: Reply, result: CommitResult
    ) -> bool:
        """Answer an item whose commit failed or conflicted; False if it has to be retried."""
        self._cache.drop(item.key)
        if isinstance(result, CarryError):
            item.job.resolve(self.map_error(item.job, result))
            return True
        if isinstance(result, Conflicted):
            resolution = resolve_conflict(item.chunk, reply.head, result.stored)
            if resolution is Resolution.RE_EVALUATE:
                self._recorder.record_conflict(self._served.name)
                item.job.is_committing = False
                item.expected = pack_head(result.stored) if result.stored else b""
                return False
            if resolution is Resolution.STORED_REPLY:
                return await self._loader.replay(item, own=reply)
        self._recorder.record_chunks(self._served.name, item.chunk.steps.length, [reply.timing])
        item.job.resolve(reply)
        return True

    def _reply(self, computed: Computed, at: int, times: StageTimes, commit_s: float) -> Reply:
        """The reply to one item."""
        item, head = computed.items[at], computed.heads[at]
        return Reply(
            item.key,
            head,
            computed.outputs[at],
            computed.states,
            False,
            item.base is None,
            Timing(times.began_s - item.job.submitted_s, times.load_s, times.infer_s, commit_s),
            self._served.output_position(item.chunk, head),
            row=at,
        )

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


def _last_deadline_s(items: Sequence[BatchItem]) -> float | None:
    """The latest deadline of the items; None if one of them has none."""
    deadline_s = max([item.job.deadline_s for item in items])
    return None if deadline_s == math.inf else deadline_s
