"""First stage of a batch: load the streams and evaluate the chunks: process, replay or reject.

Fast path: a chunk that continues the cached state of its stream needs no load. That state may not
be committed yet, or another worker may have replaced it, so this is speculative execution: the
compare-and-set of the commit verifies it. Chunks are rejected and replayed only on what the store
says, never from the cache.

A load waits until the first deadline of its items, and again for the items with later ones. Items
of shards that do not answer are detached from the batch (`shards`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

from models.errors import StateError
from service.core.delivery import (
    Replay,
    Resolution,
    evaluate_chunk,
    is_continuation,
    resolve_duplicate,
)
from service.core.errors import CarryError, DeadlineExceeded, StateDamaged, StoreUnavailable
from service.core.values import Chunk, Feed, Reply, StreamHead, StreamKey, StreamState, Tombstone
from service.engine.batcher import DEADLINE_TICK_S
from service.engine.fair_queue import BatchControl
from service.pipeline.batch_item import BaseStream, BatchItem, StageTimes
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel
from service.pipeline.shards import Shards
from service.store.base import StateStore, StoredValue, decode_value
from service.store.codec import (
    HEADER_BYTES,
    committed_at_ms,
    decode_stream,
    pack_head,
    packed_head,
    read_heads,
)

OVERHEAD_BYTES: Final = 640
"""Memory of one entry besides the state's values: header, objects and dictionary (592 by
tracemalloc)."""

STORE_UNRESPONSIVE_AFTER_S: Final = 0.1
"""A deadline that expires after this much store silence is reported as `store_unavailable`,
otherwise as `deadline_exceeded`."""


class StateCache:
    """LRU cache of the states of this worker's recent streams, which saves their load.

    A cached state may be stale or not yet committed: the compare-and-set of the commit detects
    that, and the chunk is then retried from the store. So the cache only ever provides the initial
    state of a computation.

    Args:
        max_bytes: bound on the memory of the states; 0 keeps none.

    Attributes:
        size_bytes: memory of the states.
        evictions: states that were evicted so far, by model.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self.size_bytes = 0
        self.evictions: Counter[str] = Counter()
        self._entries: OrderedDict[StreamKey, BaseStream] = OrderedDict()

    def get(self, key: StreamKey) -> BaseStream | None:
        """The cached state of a stream, or None."""
        state = self._entries.get(key)
        if state is not None:
            self._entries.move_to_end(key)
        return state

    def put(self, key: StreamKey, stream: BaseStream) -> None:
        """Cache a stream whose commit has been sent; evicts the least recently used ones."""
        entries = self._entries
        replaced = entries.get(key)
        entries[key] = stream
        entries.move_to_end(key)
        if replaced is None:
            self.size_bytes += _size_bytes(stream)
        else:
            self.size_bytes += len(stream.value) - len(replaced.value)
        while self.size_bytes > self._max_bytes:
            evicted, oldest = entries.popitem(last=False)
            self.size_bytes -= _size_bytes(oldest)
            self.evictions[evicted.model] += 1

    def drop(self, key: StreamKey) -> None:
        """Invalidate the cached state of a stream, if there is one."""
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self.size_bytes -= _size_bytes(dropped)

    def drop_older(self, committed_ms: int) -> None:
        """Drop the states of streams that this worker has not used since a commit before then."""
        while self._entries:
            key, oldest = next(iter(self._entries.items()))
            if committed_at_ms(oldest.value) >= committed_ms:
                return
            self.drop(key)


def _size_bytes(stream: BaseStream) -> int:
    return OVERHEAD_BYTES - HEADER_BYTES + len(stream.value)


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
        """Seconds since the store owes an answer; 0 if it owes none."""
        return 0.0 if self._waiting_since_s is None else time.monotonic() - self._waiting_since_s

    def is_unresponsive(self) -> bool:
        """Whether a deadline that expires now is the store's fault."""
        return self.silence_s() > STORE_UNRESPONSIVE_AFTER_S


class Evaluated(NamedTuple):
    """The items of a batch that are not resolved yet.

    Attributes:
        ready: to be computed, with `base` and `expected`.
        to_retry: to be evaluated again in a later batch.
    """

    ready: list[BatchItem]
    to_retry: list[BatchItem]


class ChunkLoader:
    """Loads and evaluates the chunks of one model.

    Args:
        reset: whether a stream whose state another version of the model wrote starts over;
            otherwise its chunks are rejected.
    """

    def __init__(
        self,
        served: ServedModel,
        store: StateStore,
        cache: StateCache,
        shards: Shards,
        recorder: Recorder,
        responsiveness: StoreResponsiveness,
        *,
        reset: bool,
    ):
        self._served = served
        self._store = store
        self._cache = cache
        self._shards = shards
        self._recorder = recorder
        self._responsiveness = responsiveness
        self._reset = reset
        self._blocks = served.blocks

    async def evaluate(
        self, items: list[BatchItem], times: StageTimes, control: BatchControl
    ) -> Evaluated:
        """Find the state that each chunk continues; answer the chunks to replay or reject."""
        ready: list[BatchItem] = []
        uncached: list[BatchItem] = []
        for item in items:
            item.base = self._cached(item)
            if item.base is None:
                uncached.append(item)
            else:
                item.expected = packed_head(item.base.value)
                ready.append(item)
        self._recorder.record_cache_lookups(self._served.name, len(ready), len(uncached))
        if not uncached:
            return Evaluated(ready, [])
        loaded = await self._shards.read(uncached, self._load, control)
        times.load_s = time.monotonic() - times.began_s
        replays: list[BatchItem] = []
        to_retry: list[BatchItem] = []
        for (item, value), known in zip(loaded, self._read_heads(loaded), strict=True):
            if item.job.is_resolved:
                continue
            if item.job.is_out_of_order:
                to_retry.append(item)
                continue
            if known and isinstance(value, bytes) and is_continuation(item.chunk, *known):
                item.base = BaseStream(*known, value)
                item.expected = packed_head(value)
                ready.append(item)
                continue
            try:
                stored = decode_value(item.key, value)
                if isinstance(stored, CarryError):
                    raise stored
                current = self._usable(item.chunk, stored)
                evaluation = evaluate_chunk(item.chunk, current, closed=self._is_closed(current))
            except CarryError as error:
                item.job.resolve(error)
                continue
            if isinstance(evaluation, Replay):
                replays.append(item)
            else:
                base = evaluation.base
                item.base = base and BaseStream(base.head, base.feed, base.value)
                item.expected = pack_head(stored.head) if stored else b""
                ready.append(item)
        if replays:
            answered = await self._shards.read(replays, self._replay_all, control)
            to_retry += [item for item, is_answered in answered if not is_answered]
        return Evaluated(ready, to_retry)

    async def replay(self, item: BatchItem, own: Reply | None = None) -> bool:
        """Answer a retry of a stream's last chunk with the stored reply.

        Args:
            own: the reply that this worker computed for the chunk, in case none is stored.

        Returns:
            False if the stream changed in the meantime, so that the chunk has to be retried.
        """
        try:
            state, kept = await self._store.load_with_reply(item.key, _first_deadline_s([item]))
            resolution = resolve_duplicate(
                item.chunk, state, kept, own.head if own else None, closed=self._is_closed(state)
            )
            if resolution is Resolution.RE_EVALUATE:
                return False
            if resolution is Resolution.STORED_REPLY and state is not None and kept is not None:
                self._recorder.record_replay(self._served.name)
                item.job.resolve(
                    Reply(
                        item.key,
                        kept.head,
                        kept.outputs,
                        state.state,
                        replayed=True,
                        created=state.last is not None and state.last.created,
                        output_position=self._served.output_position(item.chunk, kept.head),
                        dry_run=item.chunk.dry_run,
                    )
                )
            elif own is not None:
                item.job.resolve(own)
        except CarryError as error:
            item.job.resolve(error)
        return True

    async def _replay_all(self, items: list[BatchItem]) -> list[bool]:
        return await asyncio.gather(*(self.replay(item) for item in items))

    def _read_heads(
        self, loaded: list[tuple[BatchItem, StoredValue]]
    ) -> list[tuple[StreamHead, Feed] | None]:
        """The head and the feed of each loaded stream that may be continued without decoding."""
        if self._blocks is not None:
            return [None] * len(loaded)
        sizes = self._served.state.int_size, self._served.state.float_size
        values = [value if isinstance(value, bytes) else b"" for _, value in loaded]
        return read_heads(values, self._served.fingerprint, *sizes)

    async def _load(self, items: list[BatchItem]) -> list[StoredValue]:
        """Load the items' streams.

        If the store does not answer, each item fails at its own deadline while the others wait on.
        """
        loaded: dict[BatchItem, StoredValue] = {}
        remaining = items
        while remaining:
            values: list[StoredValue]
            self._responsiveness.note_request()
            try:
                values = await self._store.load_values(
                    [item.key for item in remaining], _first_deadline_s(remaining)
                )
                self._responsiveness.note_response()
            except CarryError as error:
                values = [error] * len(remaining)
            expired_s = time.monotonic() + DEADLINE_TICK_S
            waiting: list[BatchItem] = []
            for item, value in zip(remaining, values, strict=True):
                loaded[item] = value
                if not isinstance(value, StoreUnavailable):
                    continue
                if item.job.deadline_s > expired_s:
                    waiting.append(item)
                elif self._responsiveness.is_unresponsive():
                    item.job.resolve(value)
                else:
                    item.job.resolve(DeadlineExceeded("the deadline expired before it was loaded"))
            # if no deadline expired, the store itself gave up
            remaining = [] if len(waiting) == len(remaining) else waiting
        return [loaded[item] for item in items]

    def _cached(self, item: BatchItem) -> BaseStream | None:
        """The cached state of the stream, if the chunk certainly continues it.

        Never for a dry run, which no commit would verify.
        """
        if item.chunk.dry_run:
            return None
        copy = self._cache.get(item.key)
        if copy is None or not is_continuation(item.chunk, copy.head, copy.feed):
            return None
        if self._blocks is not None and self._is_closed(decode_stream(copy.value)):
            return None
        return copy

    def _usable(self, chunk: Chunk, stored: StreamState | Tombstone | None) -> StreamState | None:
        """The stored stream if the chunk can continue it; None if the stream has to start over.

        Raises:
            StateIncompatible: another version of the model wrote its state.
            StateDamaged: it holds an impossible number of waiting rows.
        """
        if stored is None or isinstance(stored, Tombstone):
            return None
        if self._served.is_compatible(stored):
            self._check_waiting(stored)
            return stored
        if self._reset or (chunk.starts_over and chunk.epoch is None):
            return None
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


def _first_deadline_s(items: Iterable[BatchItem]) -> float | None:
    """The earliest deadline of the items; None if none of them has one."""
    deadline_s = min(item.job.deadline_s for item in items)
    return None if deadline_s == math.inf else deadline_s
