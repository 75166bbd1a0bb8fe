"""The way of one batch: load -> judge -> encode -> infer -> commit -> reply.

A batch holds chunks of different streams of one model. Each
member succeeds or fails on its own: a refused, poisoned or conflicting chunk never touches its
neighbours. A chunk whose commit finds its stream moved on goes back to be judged and computed
again, a bounded number of times. Nothing is answered before its commit is known, and no refusal
or replay is ever taken from memory.

What lies in memory is a state that was committed, or whose commit is under way: the stream's next
chunk may be computed from it at once, because its own commit follows on the same ordered way and
expects that state's mark. If the first one fails, so does the second, and it is judged anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import structlog
from numpy.typing import NDArray

from models.state import State
from service.delivery import (
    Answer,
    Replay,
    advance,
    after_conflict,
    answer_retry,
    continues,
    judge,
    standing,
)
from service.domain import (
    Chunk,
    FloatRows,
    Reply,
    StoredReply,
    StreamKey,
    StreamState,
    Timing,
)
from service.engine.batcher import Job, Release
from service.engine.compute import Compute
from service.engine.state_cache import StateCache
from service.errors import CarryError, Conflict, InternalError, NotFinite, StateIncompatible
from service.recorder import Recorder
from service.served import ServedModel
from service.state.protocol import COMMITTED, Commit, CommitResult, Conflicted, StateStore

log = structlog.get_logger(__name__)

ChunkJob = Job[Chunk, Reply]


@dataclass(slots=True, eq=False)
class _Member:
    """A chunk on its way through the batch.

    Attributes:
        base: the stream it continues; None where it begins one.
        rows: float32 [T, F]; ints: int64 [M], the clock after the chunk.
        outputs: float32 [T, O].
    """

    job: ChunkJob
    chunk: Chunk
    key: StreamKey
    base: StreamState | None = None
    rows: FloatRows = field(init=False)
    ints: NDArray[np.int64] = field(init=False)
    outputs: FloatRows = field(init=False)


@dataclass(slots=True)
class _Times:
    """When the batch began, and how long its stages took, in seconds."""

    began_s: float
    load_s: float = 0.0
    infer_s: float = 0.0
    commit_s: float = 0.0

    def of(self, member: _Member) -> Timing:
        queue_s = self.began_s - member.job.submitted_s
        return Timing(queue_s, self.load_s, self.infer_s, self.commit_s)


class BatchRun:
    """Runs batches of one model; `__call__` is what the model's batcher is given.

    Args:
        now_ms: wall clock in epoch milliseconds.
        attempts: how often a chunk is tried against a stream that others move on.
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
    ):
        self._served = served
        self._store = store
        self._cache = cache
        self._compute = compute
        self._recorder = recorder
        self._now_ms = now_ms
        self._attempts = attempts
        self._on_call = partial(recorder.batch, served.name)
        self._zero = served.state.zero()

    async def __call__(self, jobs: list[ChunkJob], release: Release) -> list[ChunkJob]:
        """Settle the jobs; returns those whose stream others moved on, to be done again."""
        times = _Times(time.monotonic())
        members = [_Member(job, job.payload, job.payload.key) for job in jobs]
        ready, again = await self._judged(members, times)
        ready = self._encoded(ready)
        if ready:
            computed = await self._infer(ready, times)
            if computed:
                again += await self._commit(computed, times, release)
        return [member.job for member in again if not self._gave_up(member)]

    def _gave_up(self, member: _Member) -> bool:
        if member.job.attempts + 1 < self._attempts:
            return False
        stream = member.key.stream
        member.job.settle(
            Conflict(
                f"stream {stream!r} was moved on by others {self._attempts} times in a row",
                stream=stream,
            )
        )
        return True

    async def _judged(
        self, members: list[_Member], times: _Times
    ) -> tuple[list[_Member], list[_Member]]:
        """Find the members' streams; those to be processed, and those to be judged anew."""
        ready: list[_Member] = []
        unsure: list[_Member] = []
        for member in members:
            member.base = self._cached(member)
            (unsure if member.base is None else ready).append(member)
        self._recorder.cache(self._served.name, len(ready), len(unsure))
        if not unsure:
            return ready, []
        found = await self._load(unsure)
        times.load_s = time.monotonic() - times.began_s
        replays: list[_Member] = []
        for member, stored in zip(unsure, found, strict=True):
            try:
                if isinstance(stored, CarryError):
                    raise stored
                verdict = judge(member.chunk, stored)
                if stored is not None:
                    self._check_compatible(member.key, stored)
            except CarryError as error:
                member.job.settle(error)
                continue
            if isinstance(verdict, Replay):
                replays.append(member)
            else:
                member.base = verdict.base
                ready.append(member)
        if not replays:
            return ready, []
        answered = await asyncio.gather(*(self._replay(member) for member in replays))
        return ready, [m for m, done in zip(replays, answered, strict=True) if not done]

    async def _load(self, members: list[_Member]) -> list[StreamState | CarryError | None]:
        """The members' streams; a store that is away fails those that need it, and no others."""
        try:
            return await self._store.load([member.key for member in members])
        except CarryError as error:
            return [error] * len(members)

    def _cached(self, member: _Member) -> StreamState | None:
        """The state in memory, if the chunk would simply be processed from it."""
        copy = self._cache.get(member.key)
        if copy is None or copy.fingerprint != self._served.fingerprint:
            return None
        return copy if continues(member.chunk, copy) else None

    def _check_compatible(self, key: StreamKey, stored: StreamState) -> None:
        sizes = stored.state.floats.size, stored.state.ints.size
        spec = self._served.state
        if stored.fingerprint != self._served.fingerprint or sizes != (
            spec.float_size,
            spec.int_size,
        ):
            raise incompatible(self._served, key.stream, stored)

    async def _replay(self, member: _Member, own: Reply | None = None) -> bool:
        """Answer a retry of the last chunk from the stored reply.

        Args:
            own: the answer where the reply is not kept, but this worker computed it too.

        Returns:
            False where the stream changed meanwhile and the chunk has to be judged anew.
        """
        key = member.key
        try:
            state, kept = await self._store.load_with_reply(key)
            answer = answer_retry(member.chunk, state, kept, own.mark if own else None)
            if answer is Answer.ANEW:
                return False
            if answer is Answer.STORED and state is not None and kept is not None:
                self._recorder.replay(self._served.name)
                member.job.settle(Reply(key, kept.mark, kept.outputs, state.state, replayed=True))
            elif own is not None:
                member.job.settle(own)
        except CarryError as error:
            member.job.settle(error)
        return True

    def _encoded(self, members: list[_Member]) -> list[_Member]:
        """Encode the members' events under their states; a refusal fails one alone."""
        encoded: list[_Member] = []
        states = [member.base.state if member.base else self._zero for member in members]
        items = [(m.chunk.steps, state) for m, state in zip(members, states, strict=True)]
        for member, found in zip(members, self._served.encode_many(items), strict=True):
            if isinstance(found, Exception):
                member.job.settle(self._encoding_failed(found))
            else:
                member.rows, member.ints = found
                encoded.append(member)
        return encoded

    def _encoding_failed(self, error: Exception) -> CarryError:
        if isinstance(error, CarryError):
            return error
        log.error("encoding_failed", model=self._served.name, exc_info=error)
        return InternalError(f"encoding failed: {type(error).__name__}")

    async def _infer(
        self, members: list[_Member], times: _Times
    ) -> list[tuple[_Member, StreamState]]:
        """Compute the members; each with its stream as it is then, where that is finite."""
        began_s = time.monotonic()
        floats = [(m.base.state if m.base else self._zero).floats for m in members]
        outputs, states, finite = await self._compute.infer(
            self._served.runtime,
            [member.rows for member in members],
            np.concatenate(floats).reshape(len(floats), -1),
            self._on_call,
        )
        times.infer_s = time.monotonic() - began_s
        now_ms, fingerprint = self._now_ms(), self._served.fingerprint
        computed: list[tuple[_Member, StreamState]] = []
        for member, output, after in zip(members, outputs, states, strict=True):
            if not finite and not (np.isfinite(output).all() and np.isfinite(after).all()):
                member.job.settle(_not_finite(member))
                continue
            member.outputs = output
            # A copy: a view would keep the whole batch's states alive in the cache.
            state = State(after.copy(), member.ints)
            new = advance(member.chunk, member.base, state, fingerprint=fingerprint, now_ms=now_ms)
            computed.append((member, new))
        return computed

    async def _commit(
        self, computed: list[tuple[_Member, StreamState]], times: _Times, release: Release
    ) -> list[_Member]:
        """Commit what was computed; returns the members to be done again.

        The streams' next chunks may go on from here at once, from memory: their commits follow
        these on the store's one ordered way, and fail if these do.
        """
        commits: list[Commit] = []
        for member, new in computed:
            before = member.base.mark if member.base else None
            commits.append(Commit(member.key, before, new, StoredReply(new.mark, member.outputs)))
            self._cache.put(member.key, new)
            release(member.key)
        began_s = time.monotonic()
        try:
            results = await self._store.commit(commits)
        except BaseException:
            for commit in commits:
                self._cache.drop(commit.key)
            raise
        times.commit_s = time.monotonic() - began_s
        again: list[_Member] = []
        timings: list[Timing] = []
        steps = 0
        for (member, new), result in zip(computed, results, strict=True):
            if result is COMMITTED:
                timing = times.of(member)
                timings.append(timing)
                steps += member.chunk.steps.length
                member.job.settle(_reply(member, new, timing))
            elif not await self._settled(member, new, result, times):
                again.append(member)
        if timings:
            self._recorder.chunks(self._served.name, steps, timings)
        return again

    async def _settled(
        self, member: _Member, new: StreamState, result: CommitResult, times: _Times
    ) -> bool:
        """Answer a member that was not simply written; False where it is to be done again."""
        self._cache.drop(member.key)
        if isinstance(result, CarryError):
            member.job.settle(result)
            return True
        reply = _reply(member, new, times.of(member))
        if isinstance(result, Conflicted):
            answer = after_conflict(member.chunk, new.mark, result.found)
            if answer is Answer.ANEW:
                self._recorder.conflict(self._served.name)
                return False
            if answer is Answer.STORED:
                return await self._replay(member, own=reply)
        self._recorder.chunks(self._served.name, member.chunk.steps.length, [reply.timing])
        member.job.settle(reply)
        return True


def _reply(member: _Member, new: StreamState, timing: Timing) -> Reply:
    created = member.base is None
    return Reply(member.key, new.mark, member.outputs, new.state, False, created, timing)


def incompatible(served: ServedModel, stream: str, stored: StreamState) -> StateIncompatible:
    """The refusal of a state that another version of the model wrote."""
    return StateIncompatible(
        f"stream {stream!r} has a state of fingerprint {stored.fingerprint.hex()}, expected "
        f"{served.fingerprint.hex()} of the served version {served.version}",
        expected=served.fingerprint.hex(),
        got=stored.fingerprint.hex(),
        **standing(stream, stored.mark),
    )


def _not_finite(member: _Member) -> NotFinite:
    mark = member.base.mark if member.base else None
    return NotFinite(
        f"expected finite outputs and states of stream {member.key.stream!r}, got NaN or infinity",
        **standing(member.key.stream, mark),
    )
