"""The way of one batch: load -> evaluate_chunk -> encode -> infer -> commit -> reply.

A batch holds chunks of different streams of one model. Each item succeeds or fails on its own: a
refused, poisoned or conflicting chunk never touches its neighbours. A chunk whose commit finds its
stream moved on goes back to be judged and computed again, a bounded number of times. Nothing is
answered before its commit is known, and no refusal or replay is ever taken from memory.

A chunk whose time is up is answered by the batcher, whatever its batch is doing: nothing was
applied before its commit began, and it is then left out; from there on its outcome is unknown.
The store is waited for until the first deadline of those that need it, and again for the others;
chunks of shards that do not answer are detached from the batch (`shards`).

What lies in memory is a state that was committed, or whose commit is under way: the stream's next
chunk may be computed from it at once, because its own commit follows on the same ordered way and
expects that state's head. If the first one fails, so does the second, and it is judged anew,
behind the first one where that is done again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Final

import structlog

from models.errors import StateError
from service.core.delivery import (
    Replay,
    Resolution,
    evaluate_chunk,
    is_continuation,
    resolve_conflict,
    resolve_duplicate,
    stream_facts,
)
from service.core.errors import (
    CarryError,
    Conflict,
    DeadlineExceeded,
    OutcomeUnknown,
    ShuttingDown,
    StateDamaged,
    StateIncompatible,
    StoreUnavailable,
)
from service.core.values import (
    Chunk,
    Reply,
    StoredReply,
    StreamHead,
    StreamState,
    Timing,
    Tombstone,
)
from service.engine.batcher import DEADLINE_TICK_S
from service.engine.compute import Compute
from service.engine.jobs import BatchControl
from service.engine.state_cache import StateCache
from service.pipeline.batch_item import BatchItem, ChunkJob, StageTimes
from service.pipeline.inference import Inference
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.pipeline.shards import Shards
from service.store.base import (
    COMMITTED,
    Commit,
    CommitResult,
    Conflicted,
    Loaded,
    StateStore,
)

log = structlog.get_logger(__name__)

MOST_PARTS: Final = 3
LEAST_ROWS: Final = 4
"""A batch that is alone is committed in so many parts at most, each of so many streams at least."""

SILENCE_S: Final = 0.1
"""A store that was silent for so long is away; before, a caller's time was merely short."""


class ChunkBatchRunner:
    """Runs batches of one model; `__call__` is what the model's batcher is given.

    Args:
        now_ms: wall clock in epoch milliseconds.
        attempts: how often a chunk is tried against a stream that others move on.
        max_detached: most chunks that may wait, outside of batches, for unresponsive shards.
        reset: whether a state of another version of the model is begun anew, not refused.
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
        self._served = served
        self._store = store
        self._shards = Shards(store, max_detached)
        self._cache = cache
        self._recorder = recorder
        self._infer = Inference(served, compute, recorder, now_ms)
        self._attempts = attempts
        self._reset = reset
        self._asked_s: float | None = None
        self._blocks = served.blocks

    async def __call__(self, jobs: list[ChunkJob], control: BatchControl) -> list[ChunkJob]:
        """Settle the jobs; returns those whose stream others moved on, to be done again."""
        times = StageTimes(time.monotonic())
        items = [BatchItem(job, job.payload, job.payload.key) for job in jobs]
        items = self._shards.detach_unresponsive(items, control)
        ready, again = await self._judged(items, times, control)
        computed = await self._infer(ready, times)
        if computed:
            again += await self._commit(computed, times, control)
        return self._jobs_to_retry(again)

    def _jobs_to_retry(self, items: list[BatchItem]) -> list[ChunkJob]:
        """The jobs of the items that have attempts left; the others fail with Conflict."""
        return [item.job for item in items if not self._gave_up(item)]

    def _gave_up(self, item: BatchItem) -> bool:
        """Whether there is no further try."""
        if item.job.is_resolved:
            return True
        if item.job.attempts + 1 < self._attempts:
            return False
        stream = item.key.stream
        item.job.resolve(
            Conflict(
                f"stream {stream!r} was moved on by others {self._attempts} times in a row",
                **stream_facts(stream, item.expected),
            )
        )
        return True

    async def _judged(
        self, items: list[BatchItem], times: StageTimes, control: BatchControl
    ) -> tuple[list[BatchItem], list[BatchItem]]:
        """Find the items' streams; those to be processed, and those to be judged anew."""
        ready: list[BatchItem] = []
        unsure: list[BatchItem] = []
        for item in items:
            item.base = self._cached(item)
            if item.base is None:
                unsure.append(item)
            else:
                item.expected = item.base.head
                ready.append(item)
        self._recorder.record_cache_lookups(self._served.name, len(ready), len(unsure))
        if not unsure:
            return ready, []
        found = await self._shards.read(unsure, self._load, control)
        times.load_s = time.monotonic() - times.began_s
        replays: list[BatchItem] = []
        again: list[BatchItem] = []
        for item, stored in found:
            if item.job.is_resolved:
                continue
            if item.job.is_out_of_order:
                again.append(item)
                continue
            try:
                if isinstance(stored, CarryError):
                    raise stored
                ours = self._ours(item.chunk, stored)
                evaluation = evaluate_chunk(item.chunk, ours, closed=self._closed(ours))
            except CarryError as error:
                item.job.resolve(error)
                continue
            if isinstance(evaluation, Replay):
                replays.append(item)
            else:
                item.base = evaluation.base
                item.expected = stored.head if stored else None
                ready.append(item)
        if replays:
            answered = await self._shards.read(replays, self._replay_all, control)
            again += [item for item, done in answered if not done]
        return ready, again

    async def _replay_all(self, items: list[BatchItem]) -> list[bool]:
        return await asyncio.gather(*(self._replay(item) for item in items))

    async def _load(self, items: list[BatchItem]) -> list[Loaded]:
        """The items' streams. A store that is away fails those that need it, each when its
        time is up, and no others."""
        found: dict[BatchItem, Loaded] = {}
        left = items
        while left:
            states: list[Loaded]
            self._note_asked()
            try:
                states = await self._store.load([item.key for item in left], _until(min, left))
                self._asked_s = None
            except CarryError as error:
                states = [error] * len(left)
            late_s = time.monotonic() + DEADLINE_TICK_S
            waiting: list[BatchItem] = []
            for item, state in zip(left, states, strict=True):
                found[item] = state
                if not isinstance(state, StoreUnavailable):
                    continue
                if item.job.deadline_s > late_s:
                    waiting.append(item)
                elif self._silent_s() > SILENCE_S:
                    item.job.resolve(state)
                else:
                    late = DeadlineExceeded("the time for the chunk was up before it was loaded")
                    item.job.resolve(late)
            # Where nobody's time was up, the store has given up by itself.
            left = [] if len(waiting) == len(left) else waiting
        return [found[item] for item in items]

    def _cached(self, item: BatchItem) -> StreamState | None:
        """The state in memory, if the chunk would simply be processed from it."""
        copy = self._cache.get(item.key)
        if copy is None or copy.fingerprint != self._served.fingerprint:
            return None
        if self._blocks is not None and self._closed(copy):
            return None
        return copy if is_continuation(item.chunk, copy) else None

    def _ours(self, chunk: Chunk, stored: StreamState | Tombstone | None) -> StreamState | None:
        """The stream as the chunk sees it: none, where it has to begin anew.

        Raises:
            StateIncompatible: another version of the model wrote its state.
            StateDamaged: other rows wait than can.
        """
        if stored is None or isinstance(stored, Tombstone):
            return None
        if self._served.is_compatible(stored):
            self._check_waiting(stored)
            return stored
        if self._reset:
            return None
        if chunk.epoch is not None and chunk.epoch != stored.head.epoch:
            return stored  # which is refused for its epoch, before anything else
        raise incompatible(self._served, chunk.key.stream, stored)

    def _check_waiting(self, stored: StreamState) -> None:
        if self._blocks is None:
            return
        try:
            self._blocks.check(stored.state)
        except StateError as error:
            raise StateDamaged(f"the stored state cannot be continued: {error}") from error

    def _closed(self, found: StreamState | None) -> bool:
        """Whether a final chunk ended the stream."""
        if self._blocks is None or found is None or not self._served.is_compatible(found):
            return False
        return self._blocks.is_closed(found.state)

    async def _replay(self, item: BatchItem, own: Reply | None = None) -> bool:
        """Answer a retry of the last chunk from the stored reply.

        Args:
            own: the answer where the reply is not kept, but this worker computed it too.

        Returns:
            False where the stream changed meanwhile and the chunk has to be judged anew.
        """
        key = item.key
        try:
            state, kept = await self._store.load_with_reply(key, _until(min, [item]))
            answer = resolve_duplicate(
                item.chunk, state, kept, own.head if own else None, closed=self._closed(state)
            )
            if answer is Resolution.RE_EVALUATE:
                return False
            if answer is Resolution.STORED_REPLY and state is not None and kept is not None:
                self._recorder.record_replay(self._served.name)
                created = state.last is not None and state.last.created
                first = self._output_position(item.chunk, kept.head)
                item.job.resolve(
                    Reply(
                        key,
                        kept.head,
                        kept.outputs,
                        state.state,
                        replayed=True,
                        created=created,
                        output_position=first,
                    )
                )
            elif own is not None:
                item.job.resolve(own)
        except CarryError as error:
            item.job.resolve(error)
        return True

    async def _commit(
        self,
        computed: list[tuple[BatchItem, StreamState]],
        times: StageTimes,
        control: BatchControl,
    ) -> list[BatchItem]:
        """Commit what was computed; returns the items to be done again.

        Where nothing else is to be done meanwhile it goes in a few parts: the store writes one
        while the next is made, and the first are answered while it writes the last.
        """
        if self._store.shard(computed[0][0].key) is not None:
            return await self._commit_shards(computed, times, control)
        parts = min(MOST_PARTS, len(computed) // LEAST_ROWS)
        if parts < 2 or not control.is_alone:
            return await self._commit_part(computed, times, control)
        rows = math.ceil(len(computed) / parts)
        committing = [
            self._commit_part(computed[at : at + rows], replace(times), control)
            for at in range(0, len(computed), rows)
        ]
        again: list[BatchItem] = []
        # Each of them is waited for, whatever became of the others.
        for found in await asyncio.gather(*committing, return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
            again += found
        return again

    async def _commit_shards(
        self,
        computed: list[tuple[BatchItem, StreamState]],
        times: StageTimes,
        control: BatchControl,
    ) -> list[BatchItem]:
        """Commit to all shards concurrently; returns the items to be retried."""

        def on_timeout(
            shard: Hashable,
            part: list[tuple[BatchItem, StreamState]],
            task: asyncio.Task[list[BatchItem]],
        ) -> None:
            async def finish() -> list[ChunkJob]:
                return self._jobs_to_retry(await task)

            self._shards.detach(shard, [item for item, _ in part], control, finish())

        async def commit(part: list[tuple[BatchItem, StreamState]]) -> list[BatchItem]:
            return await self._commit_part(part, replace(times), control)

        results = await self._shards.run_by_shard(
            computed, lambda each: each[0].key, commit, on_timeout
        )
        return [item for _, again in results for item in again]

    async def _commit_part(
        self,
        computed: list[tuple[BatchItem, StreamState]],
        times: StageTimes,
        control: BatchControl,
    ) -> list[BatchItem]:
        """Commit some of a batch; returns the items to be done again.

        The streams' next chunks may go on from here at once, from memory: their commits follow
        these on the store's one ordered way, and fail if these do.
        """
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
            control.release_stream(item.key)
        self._note_asked()
        try:
            results = await self._store.commit(commits, _until(max, [item for item, _ in computed]))
        except BaseException as error:
            for commit in commits:
                self._cache.drop(commit.key)
            if not isinstance(error, CarryError):
                raise
            for item, _ in computed:
                item.job.resolve(self.map_error(item.job, error))
            return []
        times.commit_s = time.monotonic() - began_s
        again: list[BatchItem] = []
        timings: list[Timing] = []
        steps = 0
        for (item, new), result in zip(computed, results, strict=True):
            if result is COMMITTED:
                timing = times.of(item)
                timings.append(timing)
                steps += item.chunk.steps.length
                item.job.resolve(self._reply(item, new, timing))
            elif not await self._settled(item, new, result, times):
                again.append(item)
        if timings:
            self._asked_s = None
            self._recorder.record_chunks(self._served.name, steps, timings)
        return again

    def _note_asked(self) -> None:
        """The store is asked now; it is silent from here until it has answered anything."""
        if self._asked_s is None:
            self._asked_s = time.monotonic()

    def _silent_s(self) -> float:
        return 0.0 if self._asked_s is None else time.monotonic() - self._asked_s

    def _is_in_time(self, job: ChunkJob, now_s: float) -> bool:
        """Whether the chunk may still be committed; its caller may have been told otherwise."""
        if job.deadline_s <= now_s:
            job.resolve(DeadlineExceeded("the time for the chunk was up before its commit"))
        return not job.is_resolved

    def map_error(self, job: ChunkJob, error: CarryError) -> CarryError:
        """What an error says of its chunk: one whose commit has begun may have been applied, and
        then one without a position must not be sent again. Time that ran out while the store is
        silent is the store's fault."""
        if not job.is_committing:
            if not isinstance(error, DeadlineExceeded):
                return error
            if (silent_s := self._silent_s()) > SILENCE_S:
                return StoreUnavailable(
                    f"{error.detail}; the store has not answered for {silent_s:.1f} s"
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

    async def _settled(
        self, item: BatchItem, new: StreamState, result: CommitResult, times: StageTimes
    ) -> bool:
        """Answer an item that was not simply written; False where it is to be done again."""
        self._cache.drop(item.key)
        if isinstance(result, CarryError):
            item.job.resolve(self.map_error(item.job, result))
            return True
        reply = self._reply(item, new, times.of(item))
        if isinstance(result, Conflicted):
            answer = resolve_conflict(item.chunk, new.head, result.stored)
            if answer is Resolution.RE_EVALUATE:
                self._recorder.record_conflict(self._served.name)
                item.job.is_committing = False
                item.expected = result.stored
                return False
            if answer is Resolution.STORED_REPLY:
                return await self._replay(item, own=reply)
        self._recorder.record_chunks(self._served.name, item.chunk.steps.length, [reply.timing])
        item.job.resolve(reply)
        return True

    def _reply(self, item: BatchItem, new: StreamState, timing: Timing) -> Reply:
        created = new.last is not None and new.last.created
        first = self._output_position(item.chunk, new.head)
        return Reply(item.key, new.head, item.outputs, new.state, False, created, timing, first)

    def _output_position(self, chunk: Chunk, after: StreamHead) -> int | None:
        """Index of the event of the first output of a chunk, whose stream is then at `after`."""
        if self._blocks is None:
            return None
        return self._blocks.blocks.outputs_emitted_at(after.position - chunk.steps.length)


def _until(which: Callable[[Iterable[float]], float], items: list[BatchItem]) -> float | None:
    """The first or last deadline, as a store takes it."""
    deadline_s = which([item.job.deadline_s for item in items])
    return None if deadline_s == math.inf else deadline_s


def incompatible(served: ServedModel, stream: str, stored: StreamState) -> StateIncompatible:
    """The refusal of a state that another version of the model wrote."""
    return StateIncompatible(
        f"stream {stream!r} has a state of fingerprint {stored.fingerprint.hex()}, expected "
        f"{served.fingerprint.hex()} of the served version {served.version}",
        expected=served.fingerprint.hex(),
        got=stored.fingerprint.hex(),
        **stream_facts(stream, stored.head),
    )
