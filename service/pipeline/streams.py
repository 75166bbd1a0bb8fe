"""Streams as a whole: read, listed, forgotten, restored and forked.

All of it reads the store, never the cache; what a write replaces is dropped from the cache first.
Nothing is computed here and no chunk is applied. Each call stands by itself, beside whatever chunks
are under way: the store decides which of two writes was first.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from models.spec.state import State
from service.core.delivery import start_epoch, state_changed, stream_exists, stream_facts
from service.core.errors import CarryError, Conflict, StateDamaged, StreamNotFound
from service.core.values import (
    FIRST_TAG,
    Feed,
    Precondition,
    StreamHead,
    StreamKey,
    StreamPage,
    StreamState,
    Tombstone,
)
from service.engine.state_cache import StateCache
from service.pipeline.chunk_batch import incompatible
from service.pipeline.served_model import ServedModel
from service.store.base import Commit, Committed, StateStore

CONCURRENT_DELETES: Final = 32
"""Concurrent deletions of a prefix; few enough that chunks hardly wait behind them."""

BEGIN_ATTEMPTS: Final = 4
"""Attempts of a restore or fork, each of which may conflict with another writer."""


class Streams:
    """The streams of several models in one store.

    Args:
        model: the served model of a name; raises ModelNotFound.
        cache: what chunks under way keep; whatever is written here is dropped from it.
        now_ms: wall clock in epoch milliseconds, for the time of commits.

    Every method may raise ModelNotFound and what the store raises, besides what it names.
    """

    def __init__(
        self,
        model: Callable[[str], ServedModel],
        store: StateStore,
        cache: StateCache,
        *,
        now_ms: Callable[[], int],
    ):
        self._model = model
        self._store = store
        self._cache = cache
        self._now_ms = now_ms

    async def read(
        self,
        key: StreamKey,
        deadline_s: float = math.inf,
        precondition: Precondition | None = None,
    ) -> StreamState:
        """The stream as the store has it.

        Raises:
            StreamNotFound, StateDamaged, StoreUnavailable
            StateChanged: it is not in the state that the precondition names.
        """
        self._model(key.model)
        found = await self._stored(key, deadline_s)
        if precondition is not None:
            _check_precondition(key, found, precondition)
        if not isinstance(found, StreamState):
            raise StreamNotFound(
                f"model {key.model!r} has no stream {key.stream!r}",
                **stream_facts(key.stream, None),
            )
        return found

    async def page(self, model: str, prefix: str, cursor: str | None, limit: int) -> StreamPage:
        """A page of the model's streams whose names begin with `prefix`."""
        return await self._store.streams(self._model(model).name, prefix, cursor, limit)

    async def delete(self, key: StreamKey, precondition: Precondition | None = None) -> None:
        """Forget a stream.

        Raises:
            StreamNotFound: there is none.
            StateChanged: it is not in the state that the precondition names.
        """
        self._model(key.model)
        expected: StreamHead | None = None
        if precondition is not None:
            expected = _check_precondition(key, await self._stored(key), precondition)
        self._cache.drop(key)
        result = await self._store.delete(key, expected)
        if isinstance(result, CarryError):
            raise result
        if isinstance(result, Committed):
            return
        if precondition is not None:
            raise state_changed(key.stream, result.stored)
        raise StreamNotFound(
            f"model {key.model!r} has no stream {key.stream!r}", **stream_facts(key.stream, None)
        )

    async def delete_prefix(self, model: str, prefix: str) -> int:
        """Forget every stream whose name begins with `prefix`; how many there were.

        Safe to repeat; what was forgotten before a failure stays so.

        Raises:
            OutcomeUnknown, NotDurable: the first stream whose deletion is not certain.
        """
        deleted, cursor = 0, None
        while True:
            page = await self.page(model, prefix, cursor, 500)
            for first in range(0, len(page.streams), CONCURRENT_DELETES):
                some = page.streams[first : first + CONCURRENT_DELETES]
                keys = [StreamKey(model, stream) for stream in some]
                for key in keys:
                    self._cache.drop(key)
                deletions = map(self._store.delete, keys)
                for result in await asyncio.gather(*deletions, return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result
                    deleted += isinstance(result, Committed)
            cursor = page.cursor
            if cursor is None:
                return deleted

    async def restore(
        self,
        key: StreamKey,
        *,
        feed: Feed,
        position: int,
        fingerprint: bytes,
        state: State,
        precondition: Precondition | None,
    ) -> StreamState:
        """Write a state that `read` gave, under a new epoch.

        Raises:
            StateIncompatible: the state is of another version of the model.
            StreamExists: there is a stream and no precondition.
            StateChanged: it is not in the state that the precondition names.
        """
        served = self._model(key.model)
        source = StreamState(
            StreamHead(b"", FIRST_TAG, position), feed, fingerprint, None, self._now_ms(), state
        )
        if fingerprint != served.fingerprint:
            raise incompatible(served, key.stream, source)
        return await self._begin(key, source, precondition)

    async def fork(self, key: StreamKey, to: str, precondition: Precondition | None) -> StreamState:
        """Begin stream `to` from the present state of `key`, under a new epoch.

        Raises:
            StreamNotFound, StateIncompatible, StreamExists, StateChanged
        """
        served = self._model(key.model)
        source = await self.read(key)
        if source.fingerprint != served.fingerprint:
            raise incompatible(served, key.stream, source)
        return await self._begin(StreamKey(key.model, to), source, precondition)

    async def _begin(
        self, key: StreamKey, source: StreamState, precondition: Precondition | None
    ) -> StreamState:
        for _ in range(BEGIN_ATTEMPTS):
            new = start_epoch(source, fingerprint=source.fingerprint, now_ms=self._now_ms())
            expected = await self._replaceable_head(key, precondition)
            self._cache.drop(key)
            (result,) = await self._store.commit([Commit(key, expected, new, None)])
            if isinstance(result, CarryError):
                raise result
            if isinstance(result, Committed):
                return new
        raise Conflict(
            f"stream {key.stream!r} was replaced by others {BEGIN_ATTEMPTS} times in a row",
            stream=key.stream,
        )

    async def _replaceable_head(
        self, key: StreamKey, precondition: Precondition | None
    ) -> StreamHead | None:
        """The head that a restore or fork has to expect in order to replace what is stored.

        A damaged state is deleted first, if it is still the one that was read.

        Raises:
            StreamExists, StateChanged: the stream must not be replaced.
            StateDamaged: it is unknown whether the precondition names this state.
        """
        was_damaged = False
        try:
            found = await self._stored(key)
        except StateDamaged as damaged:
            if precondition is not None and not precondition.any_state:
                raise
            result = await self._store.delete(key, damaged.head)
            if isinstance(result, CarryError):
                raise result from None
            found = await self._stored(key)
            was_damaged = True
        if isinstance(found, StreamState) and precondition is None:
            raise stream_exists(key.stream, found.head)
        if precondition is not None and not was_damaged:
            return _check_precondition(key, found, precondition)
        return found.head if found else None

    async def _stored(
        self, key: StreamKey, deadline_s: float = math.inf
    ) -> StreamState | Tombstone | None:
        until_s = None if math.isinf(deadline_s) else deadline_s
        (found,) = await self._store.load([key], until_s)
        if isinstance(found, CarryError):
            raise found
        return found


def _check_precondition(
    key: StreamKey, found: StreamState | Tombstone | None, precondition: Precondition
) -> StreamHead:
    head = found.head if isinstance(found, StreamState) else None
    if head is None or not precondition.holds(head):
        raise state_changed(key.stream, head)
    return head
