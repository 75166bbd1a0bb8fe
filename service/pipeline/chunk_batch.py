"""Runs one batch of chunks: load -> evaluate -> encode -> infer -> commit -> reply.

A batch holds chunks of different streams of one model. Its jobs fail independently: a rejected,
malformed or conflicting chunk never affects the others. Streams are versioned (optimistic
concurrency): a commit is a compare-and-set on the stream head, and a chunk whose commit meets a
version conflict is evaluated and computed again, up to a limit.

The batcher answers a job whose deadline passes, in any stage of its batch. Besides, two stages
check deadlines, where these decide whether the chunk is applied (`ChunkLoader`, `_commit`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from models.detection.alarms import OPENED
from models.spec.history import HistorySpec
from service.core.delivery import Resolution, last_chunk, resolve_conflict, stream_facts
from service.core.errors import (
    CarryError,
    Conflict,
    DeadlineExceeded,
    OutcomeUnknown,
    ShuttingDown,
    StoreUnavailable,
)
from service.core.tracing import Tracer
from service.core.values import NO_STREAM, Chunk, Reply, Timing
from service.engine.batcher import BatchRunner
from service.engine.compute import MAX_INLINE_S, Compute
from service.engine.fair_queue import RunningBatch
from service.engine.policy import MIN_SPLIT_REQUESTS
from service.pipeline.chunk_job import ChunkJob, ComputedBatch, StageTimes
from service.pipeline.chunk_load import ChunkLoader, StoreResponsiveness
from service.pipeline.inference import Inference
from service.pipeline.model_versions import ModelVersions, Route
from service.pipeline.recorder import Recorder
from service.pipeline.rewarm import Rewarming
from service.pipeline.served_model import AlarmLayout, ServedModel
from service.pipeline.settings import BatchingSettings
from service.pipeline.shadow import Shadow
from service.pipeline.shards import Shards
from service.pipeline.state_cache import StateCache
from service.store.base import (
    CLOSED,
    COMMITTED,
    CONTINUING,
    AlarmChange,
    CommitColumns,
    CommitResult,
    Conflicted,
    StateStore,
)
from service.store.codec import (
    EncodedStream,
    encode_replies,
    encode_states,
    mark_inexact,
    pack_head,
    unpack_head,
)
from service.store.history import HistoryColumns


class _Stages(NamedTuple):
    """The stages of one version, before the commit.

    Attributes:
        takes_any_rows: whether its calls are not padded to a fixed number of rows.
    """

    loader: ChunkLoader
    infer: Inference
    takes_any_rows: bool


class ChunkBatchRunner(BatchRunner[Chunk, Reply]):
    """Runs the batches of one model; its batcher calls it with the jobs of each batch.

    A batch takes the route of its model once. While the challenger answers a share of the streams,
    the chunks of each version are loaded, computed and committed together. The streams of a batch
    differ, and a stream is released to its next batch only once its commit is sent: so the order of
    a stream's chunks does not depend on which version answers them.

    No chunk is answered before the outcome of its commit is known. The stream is released, and its
    new state cached, as soon as the commit is sent: the stream's next chunk may be computed from
    the uncommitted state (speculative execution, early release), because its own commit follows on
    the same ordered connection and expects the head that this one writes. If this commit fails, so
    does the next one, and its chunk is evaluated again, behind this one if that is retried too.

    A job whose deadline passes before its commit is sent is dropped: nothing was applied.
    Afterwards its outcome is unknown until the store answers.

    Args:
        settings: of batches; as many chunks as half a queue may wait outside of batches for
            unresponsive shards.
        now_ms: wall clock in epoch milliseconds.
        shadow: is offered what was committed while there is a challenger.
        tracer: records the batches of traced requests; None records none.
    """

    job_type = ChunkJob

    def __init__(
        self,
        versions: ModelVersions,
        store: StateStore,
        cache: StateCache,
        compute: Compute,
        recorder: Recorder,
        rewarming: Rewarming,
        *,
        settings: BatchingSettings,
        now_ms: Callable[[], int],
        shadow: Shadow,
        tracer: Tracer | None = None,
    ):
        self._versions = versions
        self._shadow = shadow
        self._name = versions.name
        self._compute = compute
        self._store = store
        self._cache = cache
        self._recorder = recorder
        self._rewarming = rewarming
        self._now_ms = now_ms
        self._settings = settings
        self._tracer = tracer
        self._shards = Shards(store, settings.max_queue // 2)
        self._responsiveness = StoreResponsiveness()
        self._stages: dict[ServedModel, _Stages] = {}
        self.may_split = self._stages_of(versions.route.champion).takes_any_rows

    def _stages_of(self, served: ServedModel) -> _Stages:
        """The stages of a version; made when its first batch comes."""
        known = self._stages.get(served)
        if known is not None:
            return known
        loader = ChunkLoader(
            served,
            self._store,
            self._cache,
            self._shards,
            self._recorder,
            self._responsiveness,
            self._rewarming,
            self._versions,
        )
        half = MIN_SPLIT_REQUESTS // 2
        # a call that is padded to a fixed shape costs about as much for half of the rows
        takes_any_rows = served.runtime.padded_shape(half, 1)[0] == half
        infer = Inference(served, self._compute, self._recorder)
        self._stages[served] = stages = _Stages(loader, infer, takes_any_rows)
        return stages

    def forget_retired(self, versions: ModelVersions) -> None:
        """Drop what belongs to versions of the model that are not loaded any more."""
        if versions is not self._versions:
            return
        loaded = versions.loaded.values()
        self._stages = {each: stages for each, stages in self._stages.items() if each in loaded}

    async def __call__(self, jobs: list[ChunkJob], batch: RunningBatch) -> list[ChunkJob]:
        """Run one batch and resolve its jobs; returns the jobs to be retried in a later batch."""
        # a copy, since the batcher removes detached jobs from its own list
        jobs = list(jobs)
        if self._shards.unresponsive:
            jobs = self._shards.detach_unresponsive(jobs, batch)
        route = self._versions.route
        if not route.share:
            to_retry = await self._run(route.champion, jobs, batch)
        else:
            to_retry = await self._run_canary(route, jobs, batch)
        return self._fail_exhausted(to_retry) if to_retry else []

    async def _run_canary(
        self, route: Route, jobs: list[ChunkJob], batch: RunningBatch
    ) -> list[ChunkJob]:
        """Run the jobs of each version together; returns the jobs to be retried."""
        groups: dict[ServedModel, list[ChunkJob]] = {}
        for job in jobs:
            groups.setdefault(route.answering(job.payload.key.stream), []).append(job)
        runs = [self._run(served, group, batch) for served, group in groups.items()]
        # all end before the batch does, whichever fails
        results = await asyncio.gather(*runs, return_exceptions=True)
        to_retry: list[ChunkJob] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            to_retry += result
        return to_retry

    async def _run(
        self, served: ServedModel, jobs: list[ChunkJob], batch: RunningBatch
    ) -> list[ChunkJob]:
        """Run the jobs that one version answers; returns the jobs to be retried."""
        times = StageTimes(time.monotonic())
        stages = self._stages.get(served) or self._stages_of(served)
        if self._versions.checks_codes:
            jobs = _reject_unknown_codes(served, jobs)
        try:
            ready, to_retry = await stages.loader.evaluate(jobs, times, batch)
            computed = await stages.infer(ready, times)
            times.chunks = 0 if computed is None else len(computed.jobs)
            # the calls of large networks cost more than the store's time, and more for few rows
            self.may_split = stages.takes_any_rows and times.infer_s < MAX_INLINE_S
            if computed is not None and True in [job.payload.dry_run for job in computed.jobs]:
                computed = self._answer_dry_runs(computed, times)
            if computed is not None and computed.jobs:
                is_one_server = self._store.shard(computed.jobs[0].payload.key) is None
                commit = self._commit if is_one_server else self._commit_shards
                to_retry += await commit(computed, times, batch)
        finally:
            if self._tracer is not None:
                self._trace(self._tracer, jobs, times)
        return to_retry

    def _answer_dry_runs(self, computed: ComputedBatch, times: StageTimes) -> ComputedBatch:
        """Answer the dry runs, of which nothing is stored; returns the batch without them."""
        applied: list[int] = []
        for at, job in enumerate(computed.jobs):
            if not job.payload.dry_run:
                applied.append(at)
            else:
                head = job.base.head if job.base else NO_STREAM
                timing = Timing(times.load_s, times.infer_s)
                reply = self._reply(computed, at, times, timing)
                job.resolve(replace(reply, head=head, created=False, dry_run=True))
        return computed.select(applied)

    async def _commit_shards(
        self, computed: ComputedBatch, times: StageTimes, batch: RunningBatch
    ) -> list[ChunkJob]:
        """Commit to all shards concurrently; returns the jobs to be retried."""

        def on_timeout(
            shard: Hashable, part: list[int], task: asyncio.Task[list[ChunkJob]]
        ) -> None:
            async def finish() -> list[ChunkJob]:
                return self._fail_exhausted(await task)

            self._shards.detach(shard, [computed.jobs[at] for at in part], batch, finish())

        async def commit(part: list[int]) -> list[ChunkJob]:
            return await self._commit(computed.select(part), times, batch)

        results = await self._shards.run_by_shard(
            list(range(len(computed.jobs))),
            lambda at: computed.jobs[at].payload.key,
            commit,
            on_timeout,
        )
        return [job for _, to_retry in results for job in to_retry]

    async def _commit(
        self, computed: ComputedBatch, times: StageTimes, batch: RunningBatch
    ) -> list[ChunkJob]:
        """Commit jobs in one call of the store and answer them; returns the jobs to be retried."""
        began_s, jobs = time.monotonic(), computed.jobs
        if late := [job for job in jobs if job.is_resolved or job.deadline_s <= began_s]:
            for job in late:
                job.resolve(DeadlineExceeded("the deadline expired before its commit"))
            computed = computed.select([at for at, job in enumerate(jobs) if not job.is_resolved])
            jobs = computed.jobs
        if not jobs:
            return []
        deadline_s = max([job.deadline_s for job in jobs])
        commits = self._encode(computed)
        for job, head, value in zip(jobs, computed.heads, commits.states, strict=True):
            job.is_committing = True
            if job.base is None or job.base.since is None:
                self._cache.put(job.payload.key, EncodedStream(head, job.payload.steps.feed, value))
            else:
                self._cache.drop(job.payload.key)
        batch.release_streams(commits.keys)
        self._responsiveness.note_request()
        try:
            results = await self._store.commit(commits, deadline_s)
        except BaseException as error:
            for key in commits.keys:
                self._cache.drop(key)
            if not isinstance(error, CarryError):
                raise
            for job in jobs:
                job.resolve(self.map_error(job, error))
            return []
        times.commit_began_s = times.commit_began_s or began_s
        times.commit_ended_s = time.monotonic()
        timing = Timing(times.load_s, times.infer_s, times.commit_ended_s - began_s)
        to_retry: list[ChunkJob] = []
        queue_s: list[float] = []
        steps = 0
        for at, result in enumerate(results):
            job, reply = jobs[at], self._reply(computed, at, times, timing)
            if result is COMMITTED:
                queue_s.append(reply.queue_s)
                steps += job.payload.steps.length
                job.resolve(reply)
            elif not await self._resolve_uncommitted(computed.served, job, reply, result):
                to_retry.append(job)
        if queue_s:
            self._responsiveness.note_response()
            version = computed.served.version
            self._recorder.record_chunks(self._name, version, steps, queue_s, timing)
            if self._versions.route.challenger is not None:
                committed = [at for at, result in enumerate(results) if result is COMMITTED]
                # the time of these: each shard has a part of the batch
                infer_s = times.infer_s * len(committed) / times.chunks
                self._shadow.offer(computed, committed, infer_s)
        return to_retry

    def _encode(self, computed: ComputedBatch) -> CommitColumns:
        """The bytes that the store compares and writes for each job."""
        jobs, packed = computed.jobs, list(map(pack_head, computed.heads))
        route, updated_ms = self._versions.route, self._now_ms()
        history, layout = route.champion.history, computed.served.alarm
        states = encode_states(
            [job.payload.steps.feed for job in jobs],
            packed,
            [last_chunk(job.payload, job.base.head if job.base else None) for job in jobs],
            computed.states,
            fingerprint=computed.served.fingerprint,
            updated_ms=updated_ms,
        )
        for at, job in enumerate(jobs):
            if job.base is not None and job.base.since is not None:
                states[at] = _mark_inexact(computed.served, job, job.base, states[at])
        return CommitColumns(
            [job.payload.key for job in jobs],
            [job.expected for job in jobs],
            states,
            encode_replies(packed, computed.outputs),
            self._histories(computed, history) if history or route.challenger else None,
            None if layout is None else _alarm_changes(computed, layout, states, updated_ms),
        )

    def _histories(self, computed: ComputedBatch, history: HistorySpec | None) -> HistoryColumns:
        """What the jobs' chunks add to the histories of their streams; without events, the states
        for other versions are kept."""
        jobs = computed.jobs
        if history is None:
            return HistoryColumns([b""] * len(jobs), 0, 1)
        encode, most = computed.served.history_codec.encode_last, history.events
        entries: list[bytes] = []
        for job in jobs:
            base, chunk = job.base, job.payload
            start, final = base.head.position if base else 0, chunk.final
            entries.append(encode(start, chunk.steps, most, final=final, starts=base is None))
        return HistoryColumns(entries, most, history.snapshots)

    async def _resolve_uncommitted(
        self, served: ServedModel, job: ChunkJob, reply: Reply, result: CommitResult
    ) -> bool:
        """Answer a job whose commit failed or conflicted; returns False if it has to be retried."""
        self._cache.drop(job.payload.key)
        if isinstance(result, CarryError):
            job.resolve(self.map_error(job, result))
            return True
        if isinstance(result, Conflicted):
            resolution = resolve_conflict(job.payload, reply.head, result.stored)
            if resolution is Resolution.RE_EVALUATE:
                self._recorder.record_conflict(self._name)
                self._stages_of(served).loader.note_conflict(job)
                job.is_committing = False
                job.expected = pack_head(result.stored)
                return False
            if resolution is Resolution.STORED_REPLY:
                return await self._stages_of(served).loader.replay(job, own=reply)
        steps, queue_s = job.payload.steps.length, [reply.queue_s]
        self._recorder.record_chunks(self._name, served.version, steps, queue_s, reply.timing)
        job.resolve(reply)
        return True

    def _reply(self, computed: ComputedBatch, at: int, times: StageTimes, timing: Timing) -> Reply:
        """The reply to one job."""
        job, head, served = computed.jobs[at], computed.heads[at], computed.served
        base, warm = job.base, None
        if base is not None and base.since is not None:
            warm = served.warmth(base.since, base.head.position)
        return Reply(
            job.payload.key,
            head,
            computed.outputs[at],
            computed.states,
            False,
            base is None,
            times.began_s - job.submitted_s,
            timing,
            None if served.blocks is None else served.output_position(job.payload, head),
            row=at,
            warm=warm,
            version=served,
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

    def _trace(self, tracer: Tracer, jobs: list[ChunkJob], times: StageTimes) -> None:
        """Record a batch, if one of its requests is traced."""
        # a request for many streams has several chunks
        spans = list(dict.fromkeys(job.payload.span for job in jobs if job.payload.span))
        if spans:
            stages = {
                "load": (times.began_s, times.began_s + times.load_s),
                "infer": (times.infer_began_s, times.infer_began_s + times.infer_s),
                "commit": (times.commit_began_s, times.commit_ended_s),
            }
            reached = {name: each for name, each in stages.items() if each[0] < each[1]}
            # with its commit: it is part of its requests, which are answered after it
            batch = times.began_s, times.commit_ended_s or time.monotonic()
            tracer.record_batch(self._name, spans, len(jobs), batch, reached)

    def _fail_exhausted(self, jobs: list[ChunkJob]) -> list[ChunkJob]:
        """Fail jobs that have no attempts left with Conflict; returns the unresolved ones."""
        attempts = self._settings.conflict_attempts
        for job in jobs:
            if not job.is_resolved and job.attempts + 1 >= attempts:
                stream = job.payload.key.stream
                job.resolve(
                    Conflict(
                        f"other writers changed stream {stream!r} {attempts} times in a row",
                        **stream_facts(stream, unpack_head(job.expected)),
                    )
                )
        return [job for job in jobs if not job.is_resolved]


def _reject_unknown_codes(served: ServedModel, jobs: list[ChunkJob]) -> list[ChunkJob]:
    """Reject the chunks of rows with a category that a version does not have: they were read for
    another one. Returns the others."""
    accepted: list[ChunkJob] = []
    for job in jobs:
        try:
            served.check_codes(job.payload.steps)
            accepted.append(job)
        except CarryError as error:
            job.resolve(error)
    return accepted


def _alarm_changes(
    computed: ComputedBatch, layout: AlarmLayout, states: Sequence[bytes], updated_ms: int
) -> list[AlarmChange] | None:
    """The changes of the index of open alarms; None if no stream has or had one."""
    at, column = layout
    before = [job.base is not None and job.base.value[at] > 127 for job in computed.jobs]
    after = [state[at] > 127 for state in states]
    if True not in after and True not in before:
        return None
    changes: list[AlarmChange] = []
    for was_open, is_open, outputs in zip(before, after, computed.outputs, strict=True):
        if not is_open:
            changes.append(CLOSED if was_open else "")
        elif (outputs[:, column] == OPENED).any():
            changes.append(str(updated_ms))
        else:
            changes.append(f"{CONTINUING}{updated_ms}")
    return changes


def _mark_inexact(served: ServedModel, job: ChunkJob, base: EncodedStream, state: bytes) -> bytes:
    """Mark the state after a chunk, unless its start is forgotten or was a reset in the chunk."""
    position = base.head.position
    was_reset = served.is_reset(job.payload.steps, position)
    since = served.find_since(base.since, position, was_reset=was_reset)
    return state if since is None else mark_inexact(state, since)
