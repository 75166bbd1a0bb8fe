"""States of streams for a version of their model that does not answer: kept in memory, found in the
store, or computed from the history of the stream.

A state belongs to a stream head. The one in memory serves if it is at the head that a chunk
continues. Otherwise the state that is stored for the version, or the initial one, is advanced over
the history to there. If the history does not reach back that far, the version starts with the
initial state where the history starts, and the state is inexact: it says since which position.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from service.core.values import Chunk, FloatRows, StreamHead, StreamKey, StreamState
from service.engine.compute import Compute
from service.pipeline.history_run import HistoryGap, HistoryRun, advance_many
from service.pipeline.rewarm import RewarmStart, end_rewarming, find_rewarm_start
from service.pipeline.served_model import ServedModel
from service.pipeline.shadow_budget import ShadowBudget
from service.pipeline.state_cache import StateCache
from service.store.base import decode_value
from service.store.codec import EncodedStream, encode_state
from service.store.history import Histories
from service.store.layout import CodecError

STORE_S: Final = 5.0
"""Longest call of the store."""


class OfferedChunk(msgspec.Struct, frozen=True, eq=False):
    """A chunk that was answered and committed.

    Attributes:
        base: the stream head before it; None if it created the stream.
        head: the stream head after it.
        outputs: float32 [T, O], as they were answered.
        served: the version that answered.
        answered_s: when, on the monotonic clock.
    """

    chunk: Chunk
    base: StreamHead | None
    head: StreamHead
    outputs: FloatRows
    served: ServedModel
    answered_s: float


class ShadowStream(EncodedStream, frozen=True, gc=False):
    """A stream in the state of the version that did not answer.

    Attributes:
        outputs: for its last event as they were answered, and those of this version, float32 [O];
            None if they are not known.
    """

    outputs: tuple[FloatRows, FloatRows] | None = None


class ShadowStates:
    """The states of one version; use from one event loop.

    Args:
        max_bytes: bound on the states in memory.
        budget: pays for what is computed from histories.
    """

    def __init__(
        self,
        served: ServedModel,
        histories: Histories,
        compute: Compute,
        max_bytes: int,
        budget: ShadowBudget,
    ):
        self._served = served
        self._histories = histories
        self._compute = compute
        self._cache = StateCache(max_bytes)
        self._budget = budget

    async def find(
        self, offered: Sequence[OfferedChunk]
    ) -> tuple[dict[OfferedChunk, ShadowStream | None], int]:
        """Find the states that chunks of different streams continue.

        Returns:
            By chunk the state, None for the initial one of a chunk that created its stream, without
            the chunks whose state cannot be had; and the number of events that were computed.
        """
        found: dict[OfferedChunk, ShadowStream | None] = {}
        missing: list[OfferedChunk] = []
        for each in offered:
            stream = self._cache.get(each.chunk.key)
            if each.base is None:
                found[each] = None
            elif isinstance(stream, ShadowStream) and stream.head == each.base:
                found[each] = stream
            else:
                missing.append(each)
        events = await self._catch_up(missing, found) if missing else 0
        return found, events

    async def store(self, streams: Mapping[StreamKey, ShadowStream]) -> None:
        """Keep states in memory, and beside their streams in the store."""
        for key, stream in streams.items():
            self._cache.put(key, stream)
        values = [stream.value for stream in streams.values()]
        await self._histories.commit_versions([*streams], values, time.monotonic() + STORE_S)

    def drop_older(self, committed_ms: int) -> None:
        """Drop the states in memory of streams without a chunk since then."""
        self._cache.drop_older(committed_ms)

    async def _catch_up(
        self, missing: Sequence[OfferedChunk], found: dict[OfferedChunk, ShadowStream | None]
    ) -> int:
        """Compute states from what is stored; returns the number of events."""
        starts = await asyncio.gather(*map(self._find_start, missing))
        ready = [(each, start) for each, start in zip(missing, starts, strict=True) if start]
        runs = [start.run for _, start in ready]
        events = 0
        results = await advance_many(self._served, self._compute, runs, self._spend)
        for (each, start), result in zip(ready, results, strict=True):
            stream = end_rewarming(self._served, start, result)
            if isinstance(stream, StreamState):
                value = encode_state(stream)
                found[each] = ShadowStream(stream.head, stream.feed, value, stream.since)
                events += start.run.until - start.run.position
        return events

    def _spend(self, rows: int, steps: int, padded_steps: int, seconds: float) -> None:
        self._budget.spend(seconds)

    async def _find_start(self, each: OfferedChunk) -> RewarmStart | None:
        """Where the version starts, to compute the state that a chunk continues; None if
        it cannot, or if others went on from there."""
        served, key, base = self._served, each.chunk.key, each.base
        deadline_s = time.monotonic() + STORE_S
        history = await self._histories.read(key, served.fingerprint, None, deadline_s)
        record = decode_value(key, history.record)
        if (
            base is None
            or not isinstance(record, StreamState)
            or record.head.epoch != base.epoch
            or record.fingerprint == served.fingerprint
        ):
            return None
        target = record._replace(head=base)
        try:
            return find_rewarm_start(served, key, target, history)
        except (CodecError, HistoryGap):
            if history.entries or served.blocks is not None:
                return None
            run = HistoryRun(served.initial, base.position, (), base.position)
            return RewarmStart(key, target, run, base.position)
