"""First stage of a batch: load the streams and evaluate the chunks: process, replay or reject.

Fast path: a chunk that continues the cached state of its stream needs no load. That state may not
be committed yet, or another worker may have replaced it, so this is speculative execution: the
compare-and-set of the commit verifies it. Neither does a chunk that starts its stream over whatever
is stored. Chunks are rejected and replayed only on what the store says, never from the cache.

A chunk that creates its stream under a quota registers it here, after the load and before its
commit (`service.access.limits`).

A load waits until the first deadline of its jobs, and again for the jobs with later ones. Jobs
of shards that do not answer are detached from the batch (`shards`).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Final

from models.errors import StateError
from service.access.limits import StreamQuota
from service.core.delivery import (
    Replay,
    Resolution,
    always_starts,
    evaluate_chunk,
    is_continuation,
    resolve_duplicate,
)
from service.core.errors import (
    CarryError,
    DeadlineExceeded,
    LimitExceeded,
    StateDamaged,
    StoreUnavailable,
)
from service.core.values import Reply, StreamState, Tombstone, UnknownVersion
from service.engine.batcher import DEADLINE_TICK_S
from service.engine.fair_queue import RunningBatch
from service.pipeline.chunk_job import ChunkJob, StageTimes
from service.pipeline.model_versions import ModelVersions
from service.pipeline.recorder import Recorder
from service.pipeline.rewarm import Rewarming, may_keep
from service.pipeline.served_model import ServedModel
from service.pipeline.shards import RETRY_AFTER_S, SHARD_TIMEOUT_S, Shards
from service.pipeline.state_cache import StateCache
from service.store.base import StateStore, StoredValue, decode_stream, decode_value
from service.store.codec import (
    WRITER,
    EncodedStream,
    encode_state,
    pack_head,
    read_packed_head,
    read_streams,
)

STORE_UNRESPONSIVE_AFTER_S: Final = 0.1
"""A deadline that expires after this much store silence is reported as `store_unavailable`,
otherwise as `deadline_exceeded`."""


STARTS_LOADED: Final = 64
"""Starts over that are loaded after one whose stream existed unexpectedly, and whose first
computation was in vain: clients that reuse the names of streams have more of them."""


class StoreResponsiveness:
    """How long the oldest unanswered request of one model's batches has waited for the store."""

    def __init__(self) -> None:
        self._waiting_since_s: float | None = None

    def note_request(self) -> None:
        """Note that a request is sent to the store."""
        if self._waiting_since_s is None:
            self._waiting_since_s = time.monotonic()

    def note_response(self) -> None:
        """Note that the store answered any request."""
        self._waiting_since_s = None

    def silence_s(self) -> float:
        """For how many seconds the store has owed an answer; 0 if it owes none."""
        return 0.0 if self._waiting_since_s is None else time.monotonic() - self._waiting_since_s

    def is_unresponsive(self) -> bool:
        """Whether a deadline that expires now is reported as `store_unavailable`."""
        return self.silence_s() > STORE_UNRESPONSIVE_AFTER_S


class ChunkLoader:
    """Loads and evaluates the chunks that one version of a model answers.

    Args:
        rewarming: computes states of streams that another version wrote.
        versions: the versions of the model.
    """

    def __init__(
        self,
        served: ServedModel,
        store: StateStore,
        cache: StateCache,
        shards: Shards,
        recorder: Recorder,
        responsiveness: StoreResponsiveness,
        rewarming: Rewarming,
        versions: ModelVersions,
    ):
        self._served = served
        self._versions = versions
        self._fingerprint = served.fingerprint
        self._store = store
        self._cache = cache
        self._shards = shards
        self._recorder = recorder
        self._responsiveness = responsiveness
        # when to register again under a key, after its count did not answer
        self._retry_s: defaultdict[str, float] = defaultdict(float)
        self._rewarming = rewarming
        self._blocks = served.blocks
        self._starts_to_load = 0

    async def evaluate(
        self, jobs: list[ChunkJob], times: StageTimes, batch: RunningBatch
    ) -> tuple[list[ChunkJob], list[ChunkJob]]:
        """Find the state that each chunk continues; answer the chunks to replay or reject.

        Returns:
            The jobs to compute, with `base` and `expected`, and those to retry in a later batch.
        """
        ready: list[ChunkJob] = []
        started: list[ChunkJob] = []
        uncached: list[ChunkJob] = []
        for job in jobs:
            job.base = self._cached(job)
            if job.base is not None:
                job.expected = read_packed_head(job.base.value)
                ready.append(job)
            elif job.payload.starts_over and self._starts_without_load(job):
                started.append(job)
            else:
                uncached.append(job)
        self._recorder.record_cache_lookups(self._served.name, len(ready), len(uncached))
        ready += started
        if not uncached:
            return ready, []
        loaded = await self._shards.read(uncached, self._load, batch)
        times.load_s = time.monotonic() - times.began_s
        replays: list[ChunkJob] = []
        to_rewarm: list[ChunkJob] = []
        created: dict[StreamQuota, list[ChunkJob]] = {}
        to_retry: list[ChunkJob] = []
        for (job, value), stream in zip(loaded, self._read_streams(loaded), strict=True):
            if job.is_resolved:
                continue
            if job.is_out_of_order:
                to_retry.append(job)
                continue
            if stream and is_continuation(job.payload, stream.head, stream.feed):
                job.base, job.expected = stream, read_packed_head(stream.value)
                ready.append(job)
                continue
            try:
                stored = decode_value(job.payload.key, value)
                if isinstance(stored, CarryError):
                    raise stored
                current = self._usable(job, stored)
                evaluation = evaluate_chunk(job.payload, current, closed=self._is_closed(current))
            except CarryError as error:
                job.resolve(error)
                continue
            if isinstance(evaluation, Replay):
                replays.append(job)
            elif evaluation.base and evaluation.base.fingerprint != self._fingerprint:
                to_rewarm.append(job)
            else:
                base = evaluation.base
                if base and isinstance(value, bytes):
                    state = encode_state(base) if base is job.rewarmed else value
                    job.base = EncodedStream(base.head, base.feed, state, base.since)
                job.expected = pack_head(stored.head) if stored else b""
                ready.append(job)
                quota = None if job.payload.dry_run else job.payload.quota
                if isinstance(quota, StreamQuota) and not isinstance(stored, StreamState):
                    created.setdefault(quota, []).append(job)
        if to_rewarm:
            self._rewarming.detach(self._served, to_rewarm, batch)
        if created:
            parts = [self._register(quota, group, batch) for quota, group in created.items()]
            rejected = {job for part in await asyncio.gather(*parts) for job in part}
            ready = [job for job in ready if job not in rejected]
        if replays:
            answered = await self._shards.read(replays, self._replay_all, batch)
            to_retry += [job for job, is_answered in answered if not is_answered]
        return ready, to_retry

    def _starts_without_load(self, job: ChunkJob) -> bool:
        """Whether a stream is started over without a load: if the chunk starts it in any case, the
        commit expects the cached stream, or else none, and verifies that."""
        chunk = job.payload
        if job.attempts or chunk.quota is not None or not always_starts(chunk):
            return False
        copy = self._cache.get(chunk.key)
        if copy is None and self._starts_to_load:
            self._starts_to_load -= 1
            return False
        job.expected = b"" if copy is None else read_packed_head(copy.value)
        return True

    def note_conflict(self, job: ChunkJob) -> None:
        """Note that the stream of a job was another one than its commit expected."""
        if job.payload.starts_over:
            self._starts_to_load = STARTS_LOADED

    async def replay(self, job: ChunkJob, own: Reply | None = None) -> bool:
        """Answer a retry of a stream's last chunk with the stored reply.

        Args:
            own: the reply that this worker computed for the chunk, in case none is stored.

        Returns:
            False if the stream changed in the meantime, so that the chunk has to be retried.
        """
        chunk = job.payload
        try:
            state, kept = await self._store.load_with_reply(chunk.key, job.deadline_s)
            if kept is not None and state is not None:
                is_writable = self._versions.can_write(kept.outputs, state.fingerprint)
                kept = kept if is_writable else None
            resolution = resolve_duplicate(
                chunk, state, kept, own.head if own else None, closed=self._is_closed(state)
            )
            if resolution is Resolution.RE_EVALUATE:
                return False
            if resolution is Resolution.STORED_REPLY and state is not None and kept is not None:
                self._recorder.record_replay(self._served.name)
                writer = self._versions.writer(state.fingerprint)
                warm = None
                if state.since is not None and state.last is not None:
                    warm = writer.warmth(state.since, state.last.start)
                is_known = writer.fingerprint == state.fingerprint
                job.resolve(
                    Reply(
                        chunk.key,
                        kept.head,
                        kept.outputs,
                        state.state,
                        replayed=True,
                        created=state.last is not None and state.last.created,
                        output_position=writer.output_position(chunk, kept.head),
                        dry_run=chunk.dry_run,
                        warm=warm,
                        version=writer if is_known else UnknownVersion(state.fingerprint),
                    )
                )
            elif own is not None:
                job.resolve(own)
        except CarryError as error:
            job.resolve(error)
        return True

    async def _register(
        self, quota: StreamQuota, jobs: list[ChunkJob], batch: RunningBatch
    ) -> list[ChunkJob]:
        """Register the streams that jobs create under a quota; returns the rejected jobs.

        If the quota is reached, the jobs wait outside of the batch until the streams that do not
        exist are removed from it, and are retried; at most every `quota.RECONCILE_S`.
        """
        keys = [job.payload.key for job in jobs]
        now_s, deadline_s = time.monotonic(), max(job.deadline_s for job in jobs)
        is_sharded = self._store.shard(keys[0]) is not None
        if is_sharded:
            # the shard of the count may not answer, and other streams of the batch must not wait
            deadline_s = min(deadline_s, now_s + SHARD_TIMEOUT_S)
        try:
            if self._retry_s[quota.key_id] > now_s:
                reason = f"the store does not answer how many streams the key {quota.key_id} has"
                raise StoreUnavailable(reason, retry_after_s=RETRY_AFTER_S)
            errors: list[CarryError | None] = [
                *await quota.register(keys, self._served.state_bytes, deadline_s)
            ]
        except CarryError as failure:
            errors = [failure] * len(jobs)
            if is_sharded and self._retry_s[quota.key_id] <= now_s:
                self._retry_s[quota.key_id] = now_s + RETRY_AFTER_S
        rejected = {job: error for job, error in zip(jobs, errors, strict=True) if error}

        async def reconcile() -> list[ChunkJob]:
            await quota.reconcile()
            return [job for job in rejected if not job.is_resolved]

        if quota.may_reconcile and LimitExceeded in map(type, rejected.values()):
            batch.detach([*rejected], reconcile())
        else:
            for job, error in rejected.items():
                job.resolve(error)
        return [*rejected]

    async def _replay_all(self, jobs: list[ChunkJob]) -> list[bool]:
        return await asyncio.gather(*(self.replay(job) for job in jobs))

    def _read_streams(
        self, loaded: list[tuple[ChunkJob, StoredValue]]
    ) -> list[EncodedStream | None]:
        """The loaded streams that may be continued without decoding."""
        if self._blocks is not None:
            return [None] * len(loaded)
        sizes = self._served.state.int_size, self._served.state.float_size
        values = [value if isinstance(value, bytes) else b"" for _, value in loaded]
        return read_streams(values, self._served.fingerprint, *sizes)

    async def _load(self, jobs: list[ChunkJob]) -> list[StoredValue]:
        """Load the jobs' streams.

        If the store does not answer, each job fails at its own deadline while the others wait on.
        """
        loaded: dict[ChunkJob, StoredValue] = {}
        remaining = jobs
        while remaining:
            values: list[StoredValue]
            self._responsiveness.note_request()
            try:
                values = await self._store.load(
                    [job.payload.key for job in remaining], min(job.deadline_s for job in remaining)
                )
                self._responsiveness.note_response()
            except CarryError as error:
                values = [error] * len(remaining)
            expired_s = time.monotonic() + DEADLINE_TICK_S
            waiting: list[ChunkJob] = []
            for job, value in zip(remaining, values, strict=True):
                loaded[job] = value
                if not isinstance(value, StoreUnavailable):
                    continue
                if job.deadline_s > expired_s:
                    waiting.append(job)
                elif self._responsiveness.is_unresponsive():
                    job.resolve(value)
                else:
                    job.resolve(DeadlineExceeded("the deadline expired before it was loaded"))
            # if no deadline expired, the call failed by itself: the store is unavailable
            remaining = [] if len(waiting) == len(remaining) else waiting
        return [loaded[job] for job in jobs]

    def _cached(self, job: ChunkJob) -> EncodedStream | None:
        """The cached state of the stream, if the chunk certainly continues it.

        Never for a dry run, which no commit would verify.
        """
        chunk = job.payload
        if chunk.dry_run:
            return None
        copy = self._cache.get(chunk.key)
        if copy is None or not is_continuation(chunk, copy.head, copy.feed):
            return None
        if copy.value[WRITER] != self._fingerprint:
            return None
        if self._blocks is not None and self._is_closed(decode_stream(copy.value)):
            return None
        return copy

    def _usable(self, job: ChunkJob, stored: StreamState | Tombstone | None) -> StreamState | None:
        """The stored stream if the chunk can continue it; None if the stream has to start over.

        A stream that has to be rewarmed is evaluated with the state that another version wrote.

        Raises:
            StateIncompatible: another version of the model wrote its state.
            StateDamaged: it holds an impossible number of waiting rows.
        """
        if stored is None or isinstance(stored, Tombstone):
            return None
        chunk, policy = job.payload, self._rewarming.policy
        if self._served.is_compatible(stored):
            self._check_waiting(stored)
            return stored
        if policy == "reset" or (chunk.starts_over and chunk.epoch is None):
            return None
        if policy == "rewarm":
            rewarmed = job.rewarmed
            return rewarmed if rewarmed and rewarmed.head == stored.head else stored
        if policy == "keep" and may_keep(self._served, self._versions, stored):
            kept = stored._replace(fingerprint=self._fingerprint)
            self._check_waiting(kept)
            return kept
        if chunk.epoch is not None and chunk.epoch != stored.head.epoch:
            return stored  # epoch_mismatch takes precedence
        raise self._served.incompatible(chunk.key.stream, stored)

    def _check_waiting(self, stored: StreamState) -> None:
        if self._blocks is None:
            return
        try:
            self._blocks.check(stored.state)
        except StateError as error:
            raise StateDamaged(f"the stored state cannot be continued: {error}") from error

    def _is_closed(self, state: StreamState | None) -> bool:
        """Whether a final chunk ended the stream."""
        if self._blocks is None or state is None or not self._served.is_compatible(state):
            return False
        return self._blocks.is_closed(state.state)
