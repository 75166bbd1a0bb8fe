"""Stream administration: read, list, delete, restore, fork and rewind streams.

Reads go to the store, never to the cache; writes invalidate the cached state first. Each call is
independent of the chunks in flight: the store decides which of two writes comes first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Final

from structlog.contextvars import bound_contextvars

from models.spec.state import State
from service.access.caller import DESCRIBE, Caller, Verb
from service.access.limits import StreamQuota
from service.core.delivery import (
    check_stored,
    start_epoch,
    state_changed,
    stream_conflict,
    stream_exists,
    stream_not_found,
)
from service.core.errors import CarryError, StateDamaged
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
from service.engine.compute import Compute
from service.pipeline.model_versions import ModelVersions
from service.pipeline.recorder import Audit, no_audit
from service.pipeline.rewarm import Rewarming
from service.pipeline.rewind import History, choose_history, copy_history, read_histories
from service.pipeline.served_model import ServedModel
from service.pipeline.state_cache import StateCache
from service.store.base import (
    CommitColumns,
    CommitResult,
    Committed,
    Conflicted,
    Store,
    decode_value,
)
from service.store.codec import encode_state, pack_head
from service.store.history import HistoryCopy

DELETE_BATCH_STREAMS: Final = 100
"""Streams of a prefix that are deleted together; few enough that chunks hardly wait behind them."""

DELETE_PAGE_STREAMS: Final = 1000
MAX_DELETE_PAGES: Final = 20
"""Pages that a deletion with a limit reads, each of at most 100,000 keys of the store."""

CREATE_ATTEMPTS: Final = 4
"""Attempts of a restore or fork; each may meet a version conflict with another writer."""


class StreamAdministration:
    """The streams of several models in one store.

    Each method first checks that the caller may do it, and counts it for the caller's limits. What
    a caller with a quota creates or deletes counts for the quota.

    Args:
        versions: returns the versions of a model; raises ModelNotFound.
        cache: the state cache of the chunk batches; writes invalidate its entries.
        compute: runs the networks over the events of a history.
        now_ms: wall clock in epoch milliseconds, for the time of commits.
        audit: records what was changed.

    Besides the documented errors, every method may raise Forbidden, LimitExceeded, ModelNotFound
    and the store's errors.
    """

    def __init__(
        self,
        versions: Callable[[str], ModelVersions],
        store: Store,
        cache: StateCache,
        rewarming: Rewarming,
        compute: Compute,
        *,
        now_ms: Callable[[], int],
        audit: Audit = no_audit,
    ):
        self._audit = audit
        self._compute = compute
        self._versions = versions
        self._store = store
        self._cache = cache
        self._rewarming = rewarming
        self._now_ms = now_ms

    @contextmanager
    def _use(
        self, caller: Caller, verbs: Iterable[Verb], model: str, stream: str
    ) -> Iterator[None]:
        """Admit a call, and name its caller in the lines of the audit log."""
        with caller.admit(verbs, model, stream), bound_contextvars(**caller.audit_names()):
            yield

    async def read(
        self,
        caller: Caller,
        key: StreamKey,
        deadline_s: float = math.inf,
        precondition: Precondition | None = None,
    ) -> StreamState:
        """Read a stream from the store; its state's values are not to be shown.

        Raises:
            StreamNotFound, StateDamaged, StoreUnavailable
            StateChanged: the precondition names another state.
        """
        with self._use(caller, DESCRIBE, key.model, key.stream):
            return await self.load(key, deadline_s, precondition)

    async def load(
        self,
        key: StreamKey,
        deadline_s: float = math.inf,
        precondition: Precondition | None = None,
    ) -> StreamState:
        """Read a stream for a use case that has checked its caller; raises what `read` does."""
        self._versions(key.model)
        stored = await self._load(key, deadline_s)
        check_stored(key, stored, precondition)
        if not isinstance(stored, StreamState):
            raise stream_not_found(key)
        return stored

    async def read_state(
        self,
        caller: Caller,
        key: StreamKey,
        precondition: Precondition | None = None,
        version: ServedModel | None = None,
    ) -> StreamState:
        """Read a stream whose state's values are to be shown.

        Args:
            version: the version whose state is read; None for the one that wrote it.

        Raises:
            StreamNotFound, StateDamaged, StoreUnavailable, StateChanged: as `read`.
            StateIncompatible: another version of the model wrote the state.
        """
        with self._use(caller, (Verb.READ_STATE,), key.model, key.stream):
            return await self.load_compatible(key, math.inf, precondition, version)

    async def load_compatible(
        self,
        key: StreamKey,
        deadline_s: float = math.inf,
        precondition: Precondition | None = None,
        version: ServedModel | None = None,
    ) -> StreamState:
        """Read a stream with a state that a version can continue: a loaded one that wrote it, or
        the given one, by the policy for changes of models; as `load`.

        Args:
            version: None for the one that wrote the state.

        Raises:
            StateIncompatible: another version of the model wrote the state.
        """
        record = await self.load(key, deadline_s, precondition)
        versions = self._versions(key.model)
        served = version or versions.writer(record.fingerprint)
        if served.is_compatible(record):
            return record
        rewarming = self._rewarming
        continued = await rewarming.load_own_state(served, versions, key, record, deadline_s)
        if continued is None:
            raise stream_not_found(key)
        check_stored(key, continued, precondition)
        return continued

    async def page(
        self, caller: Caller, model: str, prefix: str, cursor: str | None, limit: int
    ) -> StreamPage:
        """List a page of the model's streams whose names start with `prefix`."""
        with self._use(caller, (Verb.LIST,), model, prefix):
            return await self._store.streams(self._versions(model).name, prefix, cursor, limit)

    async def delete(
        self, caller: Caller, key: StreamKey, precondition: Precondition | None = None
    ) -> None:
        """Delete a stream.

        Raises:
            StreamNotFound
            StateChanged: the precondition names another state.
        """
        with self._use(caller, (Verb.DELETE,), key.model, key.stream):
            self._versions(key.model)
            expected: StreamHead | None = None
            if precondition is not None:
                expected = check_stored(key, await self._load(key), precondition)
            self._cache.drop(key)
            async with _releasing(caller.quota, [key]) as deleted:
                result = await self._store.delete(key, expected)
                is_deleted = isinstance(result, Committed)
                if is_deleted or (isinstance(result, Conflicted) and not expected):
                    deleted.append(key)
            self._record("stream_deleted", key, result)
            if isinstance(result, CarryError):
                raise result
            if isinstance(result, Conflicted):
                raise (
                    state_changed(key.stream, result.stored) if expected else stream_not_found(key)
                )

    async def delete_prefix(
        self,
        caller: Caller,
        model: str,
        prefix: str,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> tuple[int, str | None]:
        """Delete the streams whose names start with `prefix`.

        Safe to repeat after a failure; streams that were deleted before it stay deleted.

        Args:
            cursor: where an earlier call with a limit ended.
            limit: ends after about as many streams, or after MAX_DELETE_PAGES pages of the store.

        Returns:
            How many streams were deleted, and the cursor to continue from, None at the end.

        Raises:
            InvalidInput: the cursor is invalid.
            OutcomeUnknown, NotDurable: of the first stream whose deletion is not certain.
        """
        with self._use(caller, (Verb.DELETE,), model, prefix):
            self._versions(model)
            deleted, facts = 0, dict[str, str]()
            try:
                for pages in itertools.count(1):
                    count = int(min(DELETE_PAGE_STREAMS, (limit or math.inf) - deleted))
                    page = await self._store.streams(model, prefix, cursor, count)
                    for first in range(0, len(page.keys), DELETE_BATCH_STREAMS):
                        keys = page.keys[first : first + DELETE_BATCH_STREAMS]
                        for result in await self._delete_many(keys, caller.quota):
                            if isinstance(result, CarryError):
                                facts = _outcome(result)
                                raise result
                            deleted += isinstance(result, Committed)
                    cursor = page.cursor
                    if cursor is None or (
                        limit is not None and (deleted >= limit or pages == MAX_DELETE_PAGES)
                    ):
                        break
            finally:
                if deleted or facts:
                    self._audit(
                        "streams_deleted", model=model, stream=prefix, deleted=deleted, **facts
                    )
            return deleted, cursor

    async def _delete_many(
        self, keys: Sequence[StreamKey], quota: StreamQuota | None
    ) -> Sequence[CommitResult]:
        for key in keys:
            self._cache.drop(key)
        async with _releasing(quota, keys) as released:
            results = await self._store.delete_many(keys)
            pairs = zip(keys, results, strict=True)
            released += [key for key, result in pairs if not isinstance(result, CarryError)]
        return results

    async def restore(
        self,
        caller: Caller,
        key: StreamKey,
        *,
        feed: Feed,
        position: int,
        fingerprint: bytes,
        state: State,
        precondition: Precondition | None,
        since: int | None = None,
    ) -> StreamState:
        """Restore a stream from a snapshot of its state, in a new epoch.

        Raises:
            LimitExceeded: a limit or the quota is reached.
            StateIncompatible: another version of the model wrote the state.
            StreamExists: the stream exists, and there is no precondition.
            StateChanged: the precondition names another state.
        """
        with self._use(caller, (Verb.WRITE_STATE,), key.model, key.stream):
            served = self._versions(key.model).writer(fingerprint)
            head, now_ms = StreamHead(b"", FIRST_TAG, position), self._now_ms()
            source = StreamState(head, feed, fingerprint, None, now_ms, state, since)
            if fingerprint != served.fingerprint:
                raise served.incompatible(key.stream, source)
            history = HistoryCopy() if self._versions(key.model).route.keeps_history else None
            return await self._create("state_written", caller, key, source, history, precondition)

    async def fork(
        self, caller: Caller, key: StreamKey, to: str, precondition: Precondition | None
    ) -> StreamState:
        """Create stream `to` from the current state of `key`, in a new epoch, with its history.

        Raises:
            StreamNotFound, StateIncompatible, StreamExists, StateChanged, LimitExceeded
        """
        caller.check((Verb.FORK,), key.model, key.stream)
        with self._use(caller, (Verb.FORK,), key.model, to):
            source, history = await self._load_with_history(key)
            target = StreamKey(key.model, to)
            return await self._create(
                "stream_forked", caller, target, source, history, precondition
            )

    async def _load_with_history(self, key: StreamKey) -> tuple[StreamState, HistoryCopy | None]:
        """Read a stream and the history that leads to its state, empty if chunks that come all the
        time keep it from being read; None if the model keeps none."""
        for _ in range(CREATE_ATTEMPTS):
            source = await self.load_compatible(key)
            if not self._versions(key.model).route.keeps_history:
                return source, None
            history = await copy_history(self._store.histories, key, source.head)
            if history is not None:
                return source, history
        return source, HistoryCopy()

    async def replace(
        self,
        change: str,
        key: StreamKey,
        stored: StreamState | Tombstone | None,
        new: StreamState,
        history: HistoryCopy | None,
        *,
        reply: bytes = b"",
        keeps_snapshots: bool = False,
    ) -> bool:
        """Replace what is stored of a stream, and record that as a change.

        Args:
            history: that leads to the new state; None if the model keeps none.
            reply: the stored reply, encoded; empty: none.

        Returns False after a version conflict with another writer.
        """
        self._cache.drop(key)
        expected, state = pack_head(stored and stored.head), encode_state(new)
        if history is None:
            (result,) = await self._store.commit(CommitColumns([key], [expected], [state], [reply]))
        else:
            result = await self._store.histories.write(
                key, expected, state, history, reply=reply, keeps_snapshots=keeps_snapshots
            )
        self._record(change, key, result, position=new.head.position)
        if isinstance(result, CarryError):
            raise result
        return isinstance(result, Committed)

    async def _create(
        self,
        change: str,
        caller: Caller,
        key: StreamKey,
        source: StreamState,
        history: HistoryCopy | None,
        precondition: Precondition | None,
    ) -> StreamState:
        for _ in range(CREATE_ATTEMPTS):
            new = start_epoch(source, fingerprint=source.fingerprint, now_ms=self._now_ms())
            replaced = await self._load_replaceable(key, precondition)
            if caller.quota is not None and not isinstance(replaced, StreamState):
                served = self._versions(key.model).writer(source.fingerprint)
                await caller.quota.admit(key, served.state_bytes)
            if await self.replace(change, key, replaced, new, history):
                return new
        raise stream_conflict(key.stream, CREATE_ATTEMPTS)

    async def histories(
        self, caller: Caller, key: StreamKey, precondition: Precondition | None = None
    ) -> list[History]:
        """Read what is kept of a stream's past, whose events are to be shown: its history as each
        loaded version of the model reads it, the one that answers first.

        Raises:
            StreamNotFound, StateDamaged, StoreUnavailable, StateChanged: as `read`.
        """
        with self._use(caller, (Verb.READ_STATE,), key.model, key.stream):
            return await self._load_histories(key, None, precondition)

    async def rewind(
        self, caller: Caller, key: StreamKey, position: int, precondition: Precondition | None
    ) -> StreamState:
        """Take a stream back to the exact state of an earlier position, in a new epoch.

        Raises:
            StreamNotFound, StateDamaged, StoreUnavailable, StateChanged: as `read`.
            PositionUnavailable: what is kept does not lead to that position.
            Conflict: the stream kept changing.
        """
        with self._use(caller, (Verb.WRITE_STATE,), key.model, key.stream):
            for _ in range(CREATE_ATTEMPTS):
                async with self._rewarming.turn(key):
                    histories = await self._load_histories(key, position, precondition)
                    chosen = choose_history(histories, position)
                    new = start_epoch(
                        await chosen.stream_at(position, self._compute),
                        fingerprint=chosen.served.fingerprint,
                        now_ms=self._now_ms(),
                        position=position,
                    )
                    history = HistoryCopy(chosen.entries_until(position))
                    if await self.replace(
                        "stream_rewound", key, chosen.stream, new, history, keeps_snapshots=True
                    ):
                        # an output of a new epoch follows only with the next chunk
                        self._store.outputs.publish(key, 0, b"", b"")
                        return new
            raise stream_conflict(key.stream, CREATE_ATTEMPTS)

    async def _load_histories(
        self, key: StreamKey, position: int | None, precondition: Precondition | None
    ) -> list[History]:
        versions = self._versions(key.model)
        histories = await read_histories(self._store.histories, key, versions, position)
        streams: list[StreamState | None] = [history.stream for history in histories]
        for stream in streams or [None]:
            check_stored(key, stream, precondition)
            if stream is None:
                raise stream_not_found(key)
        return histories

    def _record(self, change: str, key: StreamKey, result: CommitResult, **facts: int) -> None:
        """Report a change that was made, or may have been made."""
        outcome = _outcome(result)
        if outcome or isinstance(result, Committed):
            self._audit(change, model=key.model, stream=key.stream, **facts, **outcome)

    async def _load_replaceable(
        self, key: StreamKey, precondition: Precondition | None
    ) -> StreamState | Tombstone | None:
        """Read the stored value that a restore or fork may replace.

        A damaged state is deleted first, unless it has changed since it was read.

        Raises:
            StreamExists, StateChanged: the stream must not be replaced.
            StateDamaged: it is unknown whether the precondition names this state.
        """
        was_damaged = False
        try:
            stored = await self._load(key)
        except StateDamaged as damaged:
            if precondition is not None and not precondition.any_state:
                raise
            result = await self._store.delete(key, damaged.head)
            if isinstance(result, CarryError):
                raise result from None
            stored = await self._load(key)
            was_damaged = True
        if isinstance(stored, StreamState) and precondition is None:
            raise stream_exists(key.stream, stored.head)
        if not was_damaged:
            check_stored(key, stored, precondition)
        return stored

    async def _load(
        self, key: StreamKey, deadline_s: float = math.inf
    ) -> StreamState | Tombstone | None:
        (value,) = await self._store.load([key], deadline_s)
        stored = decode_value(key, value)
        if isinstance(stored, CarryError):
            raise stored
        return stored


def _releasing(
    quota: StreamQuota | None, keys: Sequence[StreamKey]
) -> AbstractAsyncContextManager[list[StreamKey]]:
    return nullcontext([]) if quota is None else quota.releasing(keys)


def _outcome(result: CommitResult) -> dict[str, str]:
    """The code of an error after which the change may have been made; nothing otherwise."""
    if isinstance(result, CarryError) and result.needs_position:
        return {"outcome": result.code}
    return {}
