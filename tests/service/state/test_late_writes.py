"""Writes that were given up and reach the store after their retry change nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.state.protocol import Commit, Committed, Conflicted, StateStore
from tests.support.lossy_path import LossyPath
from tests.support.servers import RealServer, opened
from tests.support.streams import Streams, absence, committed, key, same_stream


@asynccontextmanager
async def holding(server: RealServer) -> AsyncIterator[tuple[LossyPath, StateStore]]:
    """A store behind a path that can hold its requests."""
    async with LossyPath.to(server.socket, server.folder) as path, opened(path.url) as store:
        yield path, store


async def begun(store: StateStore, streams: Streams) -> Commit:
    """Begin the stream as a worker does: from what it loads."""
    commit = streams.creation(key("a"))._replace(expected=await absence(store, key("a")))
    await committed(store, commit)
    return commit


async def test_a_late_deletion_leaves_a_stream_that_was_begun_since(
    server: RealServer, streams: Streams
) -> None:
    async with holding(server) as (path, store):
        await committed(store, streams.creation(key("a")))
        path.holds = 1
        assert await store.delete(key("a")) == Committed()
        again = await begun(store, streams)
        assert path.held
        await path.deliver()
        (found,) = await store.load([key("a")])
        assert same_stream(found, again.new)


async def test_a_late_creation_does_not_bring_a_deleted_stream_back(
    server: RealServer, streams: Streams
) -> None:
    async with holding(server) as (path, store):
        path.holds = 1
        await committed(store, streams.creation(key("a")))
        assert await store.delete(key("a")) == Committed()
        assert path.held
        await path.deliver()
        assert await store.load_with_reply(key("a")) == (None, None)
        assert await store.delete(key("a")) == Conflicted(None)
