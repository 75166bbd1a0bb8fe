"""The real store with failures on demand, and a look at what it holds behind its back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from typing import Any

import redis

from service.core.errors import CarryError
from service.core.values import Check, StoredReply, StreamHead, StreamKey, StreamPage, StreamState
from service.store.base import (
    CommitColumns,
    CommitResult,
    Store,
    StoredValue,
)
from service.store.codec import TOMBSTONE_PREFIX, decode_state, encode_state
from service.store.keys import KeySpace
from tests.support.streams import Commit, rows


class StoredStates(MutableMapping[StreamKey, StreamState]):
    """The streams a server holds, read and written without the store."""

    def __init__(self, client: redis.Redis, keys: KeySpace):
        self._client = client
        self._keys = keys

    def __getitem__(self, key: StreamKey) -> StreamState:
        value = self._client.get(self._keys.state(key))
        found = None if value is None else decode_state(value)
        if not isinstance(found, StreamState):
            raise KeyError(key)
        return found

    def __setitem__(self, key: StreamKey, state: StreamState) -> None:
        self._client.set(self._keys.state(key), encode_state(state))

    def __delitem__(self, key: StreamKey) -> None:
        self._client.delete(*self._keys.pair(key))

    def __iter__(self) -> Iterator[StreamKey]:
        names = self._client.keys("*:s:*")
        values = self._client.mget(names) if names else []
        held = zip(names, values, strict=True)
        found = (
            self._keys.parse(name.decode())
            for name, value in held
            if not value.startswith(TOMBSTONE_PREFIX)
        )
        return iter([key for key in found if key is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def forget_replies(self) -> None:
        """Drop every kept reply, as their short life would."""
        for key in self:
            self._client.delete(self._keys.reply(key))


class FaultyPart:
    """A capability of a store whose methods may be replaced, or fail."""

    def __init__(self, part: Any, fail: Callable[[], None], **replaced: Any):
        self._part, self._fail, self._replaced = part, fail, replaced

    def __getattr__(self, name: str) -> Any:
        self._fail()
        return self._replaced.get(name) or getattr(self._part, name)


class FaultyStore:
    """A `Store` that passes everything on, except what a test has it fail."""

    def __init__(self, store: Store, states: StoredStates):
        self.states = states
        self.away: Exception | None = None
        """Raised by every call while it is set."""
        self.damaged: dict[StreamKey, CarryError] = {}
        """Answers of `load` for some streams."""
        self.on_commit: Callable[[Commit], CommitResult | None] | None = None
        """May answer a commit in the store's place."""
        self.on_delete: Callable[[StreamKey], CommitResult | None] = lambda _: None
        """May answer a deletion in the store's place."""
        self.check: Check | None = None
        """Answers the monitor's `check` in the store's place."""
        self.held: asyncio.Event | None = None
        """While it exists and is not set, loads do not start and commits are not answered."""
        self.holds = 0
        """How many calls were held so far."""
        self._store = store
        self.keys = FaultyPart(store.keys, self._fail)
        self.monitor = FaultyPart(store.monitor, lambda: None, check=self._check)
        self.outputs = store.outputs
        self.usage = store.usage
        self.rates = store.rates
        self.models = store.models
        self.histories = FaultyPart(store.histories, self._fail)
        self.alarms = FaultyPart(store.alarms, self._fail)
        self.topics = FaultyPart(store.topics, self._fail)

    async def start(self) -> None:
        await self._store.start()

    async def close(self) -> None:
        await self._store.close()

    async def _check(self) -> Check:
        return await self._store.monitor.check() if self.check is None else self.check

    def shard(self, key: StreamKey) -> Hashable:
        return self._store.shard(key)

    async def load(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[StoredValue]:
        self._fail()
        await self._held()
        values = await self._store.load(keys, deadline_s)
        return [self.damaged.get(key, value) for key, value in zip(keys, values, strict=True)]

    async def load_with_reply(
        self, key: StreamKey, deadline_s: float = math.inf
    ) -> tuple[StreamState | None, StoredReply | None]:
        self._fail()
        return await self._store.load_with_reply(key, deadline_s)

    async def commit(
        self, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        self._fail()
        if self.on_commit is None:
            results_of_all = await self._store.commit(commits, deadline_s)
            await self._held()
            return results_of_all
        answers = [self.on_commit(commit) for commit in rows(commits)]
        passed = commits.select([at for at, answer in enumerate(answers) if answer is None])
        results = iter(await self._store.commit(passed, deadline_s))
        await self._held()
        return [next(results) if answer is None else answer for answer in answers]

    async def delete(
        self, key: StreamKey, expected: StreamHead | None = None, deadline_s: float = math.inf
    ) -> CommitResult:
        self._fail()
        answer = self.on_delete(key)
        return await self._store.delete(key, expected, deadline_s) if answer is None else answer

    async def delete_many(self, keys: Sequence[StreamKey]) -> list[CommitResult]:
        return [await self.delete(key) for key in keys]

    async def streams(
        self, model: str | None, prefix: str, cursor: str | None, limit: int
    ) -> StreamPage:
        self._fail()
        return await self._store.streams(model, prefix, cursor, limit)

    async def _held(self) -> None:
        if self.held is not None:
            self.holds += 1
            await self.held.wait()

    def _fail(self) -> None:
        if self.away is not None:
            raise self.away
