"""Rewarming: computes states of streams for a version of their model that did not write them.

The state at the head of the stored record is computed from the nearest of

    its own state of the stream     which it wrote before, or as the challenger
    the initial state               at the start of the stream, or else of what its history has

over the recent events in between (`service.pipeline.history_run`). It is exact, unless the history
reaches neither the start of the stream nor a reset; then it says since which position it is
computed, until its start is forgotten (`ServedModel.warmth`).

Nothing is stored here: the commit of the stream's next chunk writes the first state of the version.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple

from models.spec.blocks import BlockSpec
from service.core.errors import CarryError, DeadlineExceeded, Overloaded
from service.core.values import StreamKey, StreamState
from service.engine.compute import Compute
from service.engine.fair_queue import RunningBatch
from service.pipeline.chunk_job import ChunkJob
from service.pipeline.history_run import (
    PIECE_ROWS,
    Advanced,
    HistoryGap,
    HistoryRun,
    advance_many,
    decode_entries,
)
from service.pipeline.model_versions import ModelVersions
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.store.base import Store, decode_value
from service.store.history import StoredHistory
from service.store.history_codec import HistoryEntry, entries_from, read_range
from service.store.layout import CodecError

RETRY_AFTER_S: Final = 1.0


class RewarmStart(NamedTuple):
    """Where a version starts to compute its state of a stream.

    Attributes:
        record: as another version wrote it.
        since: as of `StreamState`, unless the state is reset on the way.
    """

    key: StreamKey
    record: StreamState
    run: HistoryRun
    since: int | None


class Rewarming:
    """Computes the states of streams for the versions of one model.

    Args:
        max_waiting: most chunks that may wait for the states of their streams.

    Attributes:
        policy: what happens to streams that another version wrote, as in the settings.
    """

    def __init__(
        self,
        store: Store,
        compute: Compute,
        recorder: Recorder,
        *,
        policy: str,
        max_waiting: int,
    ):
        self.policy = policy
        self._store = store
        self._compute = compute
        self._recorder = recorder
        self._max_waiting = max_waiting
        self._waiting = 0
        # one group at a time, so that the first ones are done soon; a shard that does not answer
        # stops no other
        self._turns: defaultdict[Hashable, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._other_turns: defaultdict[Hashable, asyncio.Lock] = defaultdict(asyncio.Lock)

    def turn(self, key: StreamKey) -> asyncio.Lock:
        """To be held while a state of a stream is computed from its history for what is no chunk:
        one at a time, since each takes a slice of time for every turn of the chunks."""
        return self._other_turns[self._store.shard(key)]

    def detach(self, served: ServedModel, jobs: Sequence[ChunkJob], batch: RunningBatch) -> None:
        """Detach jobs until their streams have states for a version, then requeue them with these.

        Those beyond `max_waiting` fail with Overloaded.
        """
        groups: dict[Hashable, list[ChunkJob]] = {}
        for at, job in enumerate(jobs):
            if self._waiting + at < self._max_waiting:
                groups.setdefault(self._store.shard(job.payload.key), []).append(job)
            else:
                job.resolve(
                    Overloaded(
                        f"{self._max_waiting} streams wait for a state of version {served.version}",
                        retry_after_s=RETRY_AFTER_S,
                    )
                )
        for shard, group in groups.items():
            for first in range(0, len(group), PIECE_ROWS):
                part = group[first : first + PIECE_ROWS]
                self._waiting += len(part)
                batch.detach(part, self._rewarm(served, part, self._turns[shard]))

    async def _rewarm(
        self, served: ServedModel, jobs: list[ChunkJob], turn: asyncio.Lock
    ) -> list[ChunkJob]:
        """Give jobs states of their streams; returns those to be retried."""
        try:
            async with turn:
                waiting = [job for job in jobs if not (job.is_resolved or job.is_cancelled)]
                requests = [(job.payload.key, job.deadline_s) for job in waiting]
                states = await self._states(served, requests)
        finally:
            self._waiting -= len(jobs)
        found = [state.since is None for state in states if isinstance(state, StreamState)]
        self._recorder.record_rewarmed(served.name, found.count(True), found.count(False))
        for job, state in zip(waiting, states, strict=True):
            if isinstance(state, CarryError):
                job.resolve(state)
            else:
                job.rewarmed = state
        return [job for job in waiting if not job.is_resolved]

    async def load_own_state(
        self,
        served: ServedModel,
        versions: ModelVersions,
        key: StreamKey,
        stored: StreamState,
        deadline_s: float = math.inf,
    ) -> StreamState | None:
        """A stream that another version wrote, with the state from which this version continues
        it, for reads and forecasts.

        It may have moved on since it was read; None if it was deleted.

        Raises:
            StateIncompatible: by choice, or as what is kept of the stream is not enough.
            StateDamaged, StoreUnavailable, DeadlineExceeded
        """
        if self.policy == "keep" and may_keep(served, versions, stored):
            return stored._replace(fingerprint=served.fingerprint)
        if self.policy != "rewarm":
            raise served.incompatible(key.stream, stored)
        left_s = None if deadline_s == math.inf else deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s), self.turn(key):
                [state] = await self._states(served, [(key, deadline_s)])
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline expired before the state was computed") from error
        if isinstance(state, CarryError):
            raise state
        return state

    async def _states(
        self, served: ServedModel, requests: Sequence[tuple[StreamKey, float]]
    ) -> list[StreamState | CarryError | None]:
        """The states of streams, each with a deadline, for a version."""
        starts = await asyncio.gather(*(self._start(served, *each) for each in requests))
        runs = [start.run for start in starts if isinstance(start, RewarmStart)]
        on_call = partial(self._recorder.record_runtime_call, served.name)
        results = iter(await advance_many(served, self._compute, runs, on_call))
        return [
            end_rewarming(served, start, next(results)) if isinstance(start, RewarmStart) else start
            for start in starts
        ]

    async def _start(
        self, served: ServedModel, key: StreamKey, deadline_s: float
    ) -> RewarmStart | CarryError | None:
        """Where a version starts to compute a stream; None if there is no stream."""
        try:
            history = await self._store.histories.read(
                key, served.fingerprint, deadline_s=deadline_s
            )
        except CarryError as error:
            return error
        record = decode_value(key, history.record)
        if not isinstance(record, StreamState):
            return record if isinstance(record, CarryError) else None
        try:
            return find_rewarm_start(served, key, record, history)
        except (CodecError, HistoryGap) as error:
            return served.incompatible(key.stream, record, str(error))


def may_keep(served: ServedModel, versions: ModelVersions, stored: StreamState) -> bool:
    """Whether a state of another version may be one of this, as far as is known of that one."""
    writer = versions.writer(stored.fingerprint)
    is_known = writer.fingerprint == stored.fingerprint
    return served.fits(stored) and (served.shares_states(writer) or not is_known)


def find_rewarm_start(
    served: ServedModel, key: StreamKey, record: StreamState, history: StoredHistory
) -> RewarmStart:
    """The nearest state that a version can start from, and the events since then.

    Raises:
        HistoryGap: the history is too short.
        CodecError: its events have other fields than the version's.
    """
    head = record.head
    own = record if served.is_compatible(record) else _own_state(served, key, history)
    kept = history.entries
    first = read_range(kept[0]).start if kept else head.position
    if own is not None and (own.head == head or first <= own.head.position):
        start, state, since = own.head.position, own.state, own.since
    elif not kept and served.history is None:
        raise HistoryGap("the store keeps no recent events of streams of this model")
    else:
        start, state, since = first, served.initial, first
    entries: Iterable[HistoryEntry] = ()
    if own is None or own.head != head:
        entries = decode_entries(served, entries_from(kept, start))
    if state is served.initial:
        if kept and served.history_codec.decode(kept[0]).starts:
            since = None
        elif served.blocks is not None:
            start = since = _first_block(served.blocks.blocks, first, head.position)
    return RewarmStart(key, record, HistoryRun(state, start, entries, head.position), since)


def _own_state(served: ServedModel, key: StreamKey, history: StoredHistory) -> StreamState | None:
    own = decode_value(key, history.version_state)
    return own if isinstance(own, StreamState) and served.is_compatible(own) else None


def _first_block(blocks: BlockSpec, first: int, position: int) -> int:
    """The start of the first block whose events are all kept, of those at a position and after.

    Raises:
        HistoryGap: events are missing that wait for their block.
    """
    start = -(-first // blocks.size) * blocks.size
    if start > blocks.outputs_emitted_at(position):
        raise HistoryGap(f"events before position {first} that wait for their block are not kept")
    return start


def end_rewarming(
    served: ServedModel, start: RewarmStart, result: Advanced | CarryError | HistoryGap
) -> StreamState | CarryError:
    """The stream with the state at the end of a run."""
    record = start.record
    if isinstance(result, Exception):
        return served.incompatible(start.key.stream, record, str(result))
    position = record.head.position
    since = served.find_since(start.since, position, was_reset=result.was_reset)
    return record._replace(fingerprint=served.fingerprint, state=result.state, since=since)
