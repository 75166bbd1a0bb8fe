"""The way of one batch: load -> judge -> encode -> infer -> commit -> reply.

A batch holds chunks of different streams, and whole sequences to predict, of one model. Each
member succeeds or fails on its own: a refused, poisoned or conflicting chunk never touches
its neighbours. A chunk whose commit finds its stream moved on is judged and computed again,
a bounded number of times. Nothing is answered before its commit is known, and no refusal or
replay is ever taken from the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from models.state import State
from service.delivery import (
    Process,
    Replay,
    advance,
    already_applied,
    judge,
    new_epoch,
    standing,
)
from service.domain import (
    Chunk,
    FloatRows,
    Prediction,
    Reply,
    Steps,
    StoredReply,
    StreamState,
    Timing,
)
from service.engine.batcher import Job
from service.engine.compute import ComputeThread
from service.engine.state_cache import StateCache
from service.errors import CarryError, Conflict, InternalError, NotFinite, StateIncompatible
from service.recorder import Recorder
from service.served import ServedModel
from service.state.protocol import Commit, Committed, Conflicted, StateStore

log = structlog.get_logger(__name__)

Work = Chunk | Steps
Result = Reply | Prediction


@dataclass(slots=True, eq=False)
class _Member:
    """One job on its way through the batch."""

    job: Job[Work, Result]
    steps: Steps
    chunk: Chunk | None
    timing: Timing
    base: StreamState | None = None
    rows: FloatRows = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    ints: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    outputs: FloatRows = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    new: StreamState | None = None


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
        compute: ComputeThread,
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

    async def __call__(self, jobs: list[Job[Work, Result]]) -> None:
        """Resolve or fail every job."""
        began_s = time.monotonic()
        members = [_member(job, began_s) for job in jobs]
        for attempt in range(self._attempts):
            members = await self._attempt(members, use_cache=attempt == 0)
            if not members:
                return
        for member in members:
            if member.chunk is not None:
                stream = member.chunk.key.stream
                member.job.fail(
                    Conflict(
                        f"stream {stream!r} was moved on by others {self._attempts} times in a row",
                        stream=stream,
                    )
                )

    async def _attempt(self, members: list[_Member], *, use_cache: bool) -> list[_Member]:
        """One pass; returns the members whose commit found their stream moved on."""
        chunks = [member for member in members if member.chunk is not None]
        ready, again = await self._judged(chunks, use_cache)
        ready += [member for member in members if member.chunk is None]
        ready = [member for member in ready if self._encoded(member)]
        if not ready:
            return again
        await self._infer(ready)
        return again + await self._commit(ready)

    async def _judged(
        self, members: list[_Member], use_cache: bool
    ) -> tuple[list[_Member], list[_Member]]:
        """Load the members' streams; those to be processed, and those to be judged anew."""
        if not members:
            return [], []
        began_s = time.monotonic()
        ready: list[_Member] = []
        unsure: list[_Member] = []
        for member in members:
            member.base = self._cached(member) if use_cache else None
            (unsure if member.base is None else ready).append(member)
        if use_cache:
            self._recorder.cache(self._served.name, len(ready), len(unsure))
        found = await self._load(unsure)
        load_s = time.monotonic() - began_s
        replays: list[_Member] = []
        for member in members:
            member.timing.load_s += load_s
        for member, stored in zip(unsure, found, strict=True):
            chunk = _chunk(member)
            try:
                if isinstance(stored, CarryError):
                    raise stored
                verdict = judge(chunk, stored)
                if stored is not None:
                    self._check_compatible(chunk, stored)
            except CarryError as error:
                member.job.fail(error)
                continue
            if isinstance(verdict, Replay):
                replays.append(member)
            else:
                member.base = verdict.base
                ready.append(member)
        answered = await asyncio.gather(*(self._replay(member) for member in replays))
        return ready, [m for m, done in zip(replays, answered, strict=True) if not done]

    async def _load(self, members: list[_Member]) -> list[StreamState | CarryError | None]:
        """The members' streams; a store that is away fails those that need it, and no others."""
        if not members:
            return []
        try:
            return await self._store.load([_chunk(member).key for member in members])
        except CarryError as error:
            return [error] * len(members)

    def _cached(self, member: _Member) -> StreamState | None:
        """The cached state, if the chunk would simply be processed from it."""
        chunk = _chunk(member)
        copy = self._cache.get(chunk.key)
        if copy is None or copy.fingerprint != self._served.fingerprint:
            return None
        try:
            return copy if isinstance(judge(chunk, copy), Process) else None
        except CarryError:
            return None

    def _check_compatible(self, chunk: Chunk, stored: StreamState) -> None:
        sizes = stored.state.floats.size, stored.state.ints.size
        spec = self._served.state
        if stored.fingerprint != self._served.fingerprint or sizes != (
            spec.float_size,
            spec.int_size,
        ):
            raise incompatible(self._served, chunk.key.stream, stored)

    async def _replay(self, member: _Member, own: Reply | None = None) -> bool:
        """Answer a retry of the last chunk from the stored reply.

        Args:
            own: the answer where the reply is not kept, but this worker computed it too.

        Returns:
            False where the stream changed meanwhile and the chunk has to be judged anew.
        """
        chunk = _chunk(member)
        try:
            state, kept = await self._store.load_with_reply(chunk.key)
            verdict = judge(chunk, state)
            if isinstance(verdict, Process):
                return False
            mark = verdict.found.mark
            if kept is not None and kept.mark == mark:
                self._recorder.replay(self._served.name)
                member.job.resolve(
                    Reply(chunk.key, mark, kept.outputs, verdict.found.state, replayed=True)
                )
            elif own is not None:
                member.job.resolve(own)
            else:
                member.job.fail(already_applied(chunk.key.stream, mark))
        except CarryError as error:
            member.job.fail(error)
        return True

    def _encoded(self, member: _Member) -> bool:
        """Encode the member's events under its state; a refusal fails it alone."""
        try:
            member.rows, member.ints = self._served.encode(member.steps, self._state(member))
        except CarryError as error:
            member.job.fail(error)
            return False
        except Exception as error:
            log.exception("encoding_failed", model=self._served.name)
            member.job.fail(InternalError(f"encoding failed: {type(error).__name__}"))
            return False
        return True

    def _state(self, member: _Member) -> State:
        return member.base.state if member.base else self._served.state.zero()

    async def _infer(self, members: list[_Member]) -> None:
        began_s = time.monotonic()
        name = self._served.name
        outputs, floats = await self._compute.infer(
            self._served.runtime,
            [member.rows for member in members],
            np.stack([self._state(member).floats for member in members]),
            lambda *call: self._recorder.batch(name, *call),
        )
        infer_s = time.monotonic() - began_s
        for member, output, after in zip(members, outputs, floats, strict=True):
            member.timing.infer_s += infer_s
            member.outputs = output
            # A copy: a view would keep the whole batch's states alive in the cache.
            state = State(after.copy(), member.ints)
            if member.chunk is not None:
                member.new = advance(
                    member.chunk,
                    member.base,
                    state,
                    fingerprint=self._served.fingerprint,
                    now_ms=self._now_ms(),
                    epoch=new_epoch(),
                )
            elif self._is_finite(member, state):
                member.job.resolve(Prediction(output, state))

    def _is_finite(self, member: _Member, state: State) -> bool:
        if np.isfinite(member.outputs).all() and np.isfinite(state.floats).all():
            return True
        if member.chunk is None:
            where, facts = "a predicted sequence", {}
        else:
            key, mark = member.chunk.key, member.base.mark if member.base else None
            where, facts = f"stream {key.stream!r}", standing(key.stream, mark)
        member.job.fail(
            NotFinite(
                f"expected finite outputs and states of {where}, got NaN or infinity", **facts
            )
        )
        return False

    async def _commit(self, members: list[_Member]) -> list[_Member]:
        """Commit what was computed; returns the members to be done again."""
        ready = [
            (member, new)
            for member in members
            if (new := member.new) is not None and self._is_finite(member, new.state)
        ]
        if not ready:
            return []
        began_s = time.monotonic()
        results = await self._store.commit(
            [
                Commit(
                    _chunk(member).key,
                    member.base.mark if member.base else None,
                    new,
                    StoredReply(new.mark, member.outputs),
                )
                for member, new in ready
            ]
        )
        commit_s = time.monotonic() - began_s
        again: list[_Member] = []
        for (member, new), result in zip(ready, results, strict=True):
            member.timing.commit_s += commit_s
            if not await self._settled(member, new, result):
                again.append(member)
        return again

    async def _settled(
        self, member: _Member, new: StreamState, result: Committed | Conflicted | CarryError
    ) -> bool:
        """Answer a member by its commit's outcome; False where it is to be done again."""
        chunk = _chunk(member)
        if isinstance(result, CarryError):
            self._cache.drop(chunk.key)
            member.job.fail(result)
            return True
        reply = Reply(
            chunk.key,
            new.mark,
            member.outputs,
            new.state,
            created=member.base is None,
            timing=member.timing,
        )
        if isinstance(result, Conflicted) and result.found == new.mark:
            # Found at the very mark this commit writes: by a nonce only this commit can have
            # written it (its answer was lost); without one, a duplicate of the chunk may have.
            if chunk.position is not None:
                self._cache.drop(chunk.key)
                return await self._replay(member, own=reply)
            result = Committed()
        if isinstance(result, Conflicted):
            self._cache.drop(chunk.key)
            self._recorder.conflict(self._served.name)
            return False
        self._cache.put(chunk.key, new)
        self._recorder.chunk(self._served.name, member.steps.length, member.timing)
        member.job.resolve(reply)
        return True


def incompatible(served: ServedModel, stream: str, stored: StreamState) -> StateIncompatible:
    """The refusal of a state that another version of the model wrote."""
    return StateIncompatible(
        f"stream {stream!r} has a state of fingerprint {stored.fingerprint.hex()}, expected "
        f"{served.fingerprint.hex()} of the served version {served.version}",
        expected=served.fingerprint.hex(),
        got=stored.fingerprint.hex(),
        **standing(stream, stored.mark),
    )


def _member(job: Job[Work, Result], began_s: float) -> _Member:
    chunk = job.payload if isinstance(job.payload, Chunk) else None
    steps = job.payload.steps if isinstance(job.payload, Chunk) else job.payload
    return _Member(job, steps, chunk, Timing(queue_s=began_s - job.submitted_s))


def _chunk(member: _Member) -> Chunk:
    if member.chunk is None:
        raise TypeError("expected a member that continues a stream")
    return member.chunk
