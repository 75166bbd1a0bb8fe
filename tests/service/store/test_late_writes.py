"""Abandoned writes that reach the store after their retry change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.core.errors import Conflict, OutcomeUnknown, StoreUnavailable
from service.core.values import StreamKey, Tombstone
from service.store.base import Committed, Conflicted, Store
from service.store.codec import encode_state
from service.store.redis.outcomes import Outcome, ServerReply
from service.store.redis.redis_store import DELETE_ATTEMPTS, RedisStore
from service.store.settings import StoreSettings
from tests.support.proxy import LossyPath
from tests.support.servers import RealServer, opened
from tests.support.streams import (
    Commit,
    Streams,
    absence,
    assert_stored,
    columns,
    committed,
    key,
    load,
    same_stream,
)


@asynccontextmanager
async def delayed_store(server: RealServer) -> AsyncIterator[tuple[LossyPath, Store]]:
    """A store behind a path that can hold its requests."""
    async with LossyPath.to(server.socket, server.folder) as path, opened(path.url) as store:
        yield path, store


async def create_again(store: Store, streams: Streams) -> Commit:
    """A creation as a worker commits it: it expects what it has loaded."""
    commit = streams.creation(key("a"))._replace(expected=await absence(store, key("a")))
    await committed(store, commit)
    return commit


async def test_a_late_creation_does_not_restore_a_deleted_stream(
    server: RealServer, streams: Streams
) -> None:
    async with delayed_store(server) as (path, store):
        path.holds = 1
        await committed(store, streams.creation(key("a")))
        assert await store.delete(key("a")) == Committed()
        assert path.held
        await path.deliver()
        assert await store.load_with_reply(key("a")) == (None, None)
        assert await store.delete(key("a")) == Conflicted(None)


async def test_a_commit_behind_an_abandoned_one_is_not_rejected_and_then_applied(
    server: RealServer, streams: Streams
) -> None:
    """The second commit expects the first; delivered late, both would be written."""
    first = streams.creation(key("a"))
    second = streams.next(first)
    async with delayed_store(server) as (path, store):
        path.holds = 1
        abandoned = asyncio.create_task(store.commit(columns(first)))
        awaited = asyncio.create_task(store.commit(columns(second)))
        await path.holding.wait()
        abandoned.cancel()
        assert await awaited == [Committed()]
        await path.deliver()
        await assert_stored(store, second)


async def test_loads_behind_an_abandoned_commit_return_their_own_streams_after_a_reconnect(
    server: RealServer, streams: Streams
) -> None:
    """The abandoned commit is resent too: otherwise each reply would answer another command."""
    first = streams.creation(key("a"))
    others = [streams.creation(key(name)) for name in "xyz"]
    async with delayed_store(server) as (path, store):
        await committed(store, *others)
        path.holds = 1
        abandoned = asyncio.create_task(store.commit(columns(first)))
        awaited = asyncio.create_task(store.commit(columns(streams.next(first))))
        loads = [asyncio.create_task(load(store, [other.key])) for other in others]
        await path.holding.wait()
        abandoned.cancel()
        for (found,), other in zip(await asyncio.gather(*loads), others, strict=True):
            assert same_stream(found, other.new)
        assert await awaited == [Committed()]


@pytest.mark.parametrize(("repeated", "outcome"), [(False, Conflict), (True, OutcomeUnknown)])
async def test_a_deletion_that_may_have_deleted_is_not_a_conflict(
    repeated: bool, outcome: type, streams: Streams
) -> None:
    """Every attempt finds a recreated stream, after one whose reply was lost or not."""

    async def recreated(number: int) -> ServerReply:
        return ServerReply([0, encode_state(streams.first())], repeated and number == 1)

    store = Watched(StoreSettings("unix:///none"), recreated)
    assert isinstance(await store.delete(key("a")), outcome)
    assert store.tries == DELETE_ATTEMPTS


# Repeated deletions


class Watched(RedisStore):
    """A store that does something before each try to write a tombstone, which may answer it."""

    def __init__(self, settings: StoreSettings, before: Callable[[int], Awaitable[Outcome | None]]):
        super().__init__(settings)
        self._before = before
        self.tries = 0
        self.conditions: list[bytes] = []

    async def _write_tombstones(
        self, conditions: Mapping[StreamKey, bytes], deadline_s: float
    ) -> dict[StreamKey, Outcome]:
        self.tries += 1
        self.conditions += conditions.values()
        outcome = await self._before(self.tries)
        if outcome is not None:
            return dict.fromkeys(conditions, outcome)
        return await super()._write_tombstones(conditions, deadline_s)


@asynccontextmanager
async def watched(
    server: RealServer, before: Callable[[int, LossyPath], Awaitable[Outcome | None]]
) -> AsyncIterator[Watched]:
    """A store on a lossy path, and what is done before each of its tries to delete."""
    async with LossyPath.to(server.socket, server.folder) as path:
        store = Watched(StoreSettings(path.url), lambda number: before(number, path))
        await store.start()
        try:
            yield store
        finally:
            await store.close()


async def test_a_retried_deletion_that_finds_its_tombstone_succeeds(
    server: RealServer, streams: Streams
) -> None:
    async def lose_the_second(number: int, path: LossyPath) -> None:
        path.losses = number == 2

    async with watched(server, lose_the_second) as store:
        await committed(store, streams.creation(key("a")))
        assert await store.delete(key("a")) == Committed()
        assert store.tries == 3
        assert await store.load_with_reply(key("a")) == (None, None)


async def test_an_interrupted_deletion_has_an_unknown_outcome(
    server: RealServer, streams: Streams
) -> None:
    async def lose_the_second_and_break_off(number: int, path: LossyPath) -> Outcome | None:
        path.losses = number == 2
        return StoreUnavailable("no answer") if number == 3 else None

    async with watched(server, lose_the_second_and_break_off) as store:
        await committed(store, streams.creation(key("a")))
        assert isinstance(await store.delete(key("a")), OutcomeUnknown)
        store.tries = 2
        with pytest.raises(StoreUnavailable):
            await store.delete(key("a"))


@pytest.mark.parametrize("held", [1, 2])
async def test_no_late_attempt_of_a_deletion_deletes_a_later_stream(
    server: RealServer, streams: Streams, held: int
) -> None:
    async def hold_one(number: int, path: LossyPath) -> None:
        path.holds = number == held
        paths.append(path)

    paths: list[LossyPath] = []
    async with watched(server, hold_one) as store:
        await committed(store, streams.creation(key("a")))
        assert await store.delete(key("a")) == Committed()
        again = await create_again(store, streams)
        assert paths[0].held
        await paths[0].deliver()
        await assert_stored(store, again)


async def test_a_late_abandoned_deletion_keeps_a_stream_that_changed(
    server: RealServer, streams: Streams
) -> None:
    holding_path: asyncio.Future[LossyPath] = asyncio.get_running_loop().create_future()

    async def hold_the_second(number: int, path: LossyPath) -> None:
        if number == 2:
            path.holds = 1
            holding_path.set_result(path)

    async with watched(server, hold_the_second) as store:
        first = streams.creation(key("a"))
        await committed(store, first)
        deletion = asyncio.create_task(store.delete(key("a")))
        path = await holding_path
        await path.holding.wait()
        deletion.cancel()
        # On the next connection, no request is pending behind the deletion.
        assert await load(store, [key("b")]) == [None]
        second = streams.next(first)
        await committed(store, second)
        await path.deliver()
        await assert_stored(store, second)


# Concurrent writers


async def test_a_stream_under_constant_writes_is_deleted(
    server: RealServer, store: Store, streams: Streams
) -> None:
    """After repeated conflicts the deletion compares the epoch only, and only that stream's."""
    last = streams.creation(key("a"))
    await committed(store, last, streams.creation(key("b")))

    async def move_on(*_: Any) -> None:
        nonlocal last
        last = streams.next(last)
        await committed(store, last)

    async with watched(server, move_on) as busy:
        assert await busy.delete_many([key("a"), key("b")]) == [Committed()] * 2
        assert [len(condition) for condition in busy.conditions] == [0, 0, 24, 24, 24, 8]
    assert all(isinstance(each, Tombstone) for each in await load(store, [key("a"), key("b")]))
