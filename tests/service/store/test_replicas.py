"""One server with two replicas: when writes and their retries are durable."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from service.core.errors import NotDurable
from service.store.base import Committed, Conflicted, Store
from service.store.settings import Durability
from tests.support.proxy import LossyPath
from tests.support.servers import RealServer, free_port, opened, real_server, until
from tests.support.streams import Streams, assert_replayable, assert_stored, columns, committed, key

Servers = tuple[RealServer, RealServer, RealServer]


@pytest.fixture(scope="module")
def replicated() -> Iterator[Servers]:
    """A primary and its replicas, all in step."""
    port = str(free_port())
    of_primary = ("--replicaof", f"127.0.0.1 {port}", "--repl-diskless-sync-delay", "0")
    with (
        real_server(
            "valkey", "--bind", "127.0.0.1", "--port", port, "--repl-diskless-sync-delay", "0"
        ) as primary,
        real_server("valkey", *of_primary) as one,
        real_server("valkey", *of_primary) as other,
    ):
        until(lambda: primary_has_acknowledged(primary, 2), "both replicas in step")
        yield primary, one, other


def primary_has_acknowledged(primary: RealServer, replicas: int) -> bool:
    """Whether a write of the primary reaches this many replicas."""
    with primary.client() as client:
        client.set("probe", "written")
        return client.wait(replicas, 1000) >= replicas


@contextmanager
def paused(*servers: RealServer) -> Iterator[None]:
    for server in servers:
        server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)


@asynccontextmanager
async def losing(servers: Servers, replicas: int) -> AsyncIterator[tuple[LossyPath, Store]]:
    """An empty store behind a path that can lose replies; the server knows its scripts."""
    primary = servers[0]
    with primary.client() as client:
        client.flushall()
    assert until(lambda: primary_has_acknowledged(primary, 2), "both replicas in step")
    settings = {"durability": Durability.REPLICATED, "replicas": replicas, "store_wait_s": 4}
    async with (
        LossyPath.to(primary.socket, primary.folder) as path,
        opened(path.url, **settings) as store,
    ):
        known = Streams(1).creation(key("known"))
        await committed(store, known)
        assert await store.delete(known.key) == Committed()
        yield path, store


@pytest.mark.parametrize(("replicas", "is_durable"), [(1, True), (2, False)])
async def test_a_write_is_durable_once_enough_replicas_acknowledge_it(
    replicated: Servers, streams: Streams, replicas: int, is_durable: bool
) -> None:
    """Until then a replay is not acknowledged either, whether its reply is stored or not."""
    async with losing(replicated, replicas) as (_, store):
        commits = [streams.creation(key(name)) for name in "ab"]
        await committed(store, *commits)
        commits = [streams.next(commit) for commit in commits]
        with paused(replicated[2]):
            results = await store.commit(columns(*commits))
            with replicated[0].client() as client:
                client.delete(*client.keys("*:r:*:b"))
            for commit, result in zip(commits, results, strict=True):
                if is_durable:
                    assert result == Committed()
                    assert (await store.load_with_reply(commit.key))[0] is not None
                    continue
                assert isinstance(result, NotDurable)
                assert result.retryable
                assert result.facts["retry_after_s"] > 0
                with pytest.raises(NotDurable):
                    await store.load_with_reply(commit.key)
            # they were applied nevertheless, as reads may show
            await assert_stored(store, *commits)
            deleted = await store.delete(key("known"))
        assert isinstance(deleted, Conflicted if is_durable else NotDurable)
        await assert_replayable(store, commits[0])
        await committed(store, *(streams.next(commit) for commit in commits))


async def test_a_retried_write_is_acknowledged_once_its_first_attempt_is_durable(
    replicated: Servers, streams: Streams
) -> None:
    """The second attempt writes nothing, so a WAIT after it proves nothing about the first."""
    async with losing(replicated, 2) as (path, store):
        first = streams.creation(key("a"))
        await committed(store, first)
        second = streams.next(first)
        with paused(replicated[2]):
            path.losses = 1
            (result,) = await store.commit(columns(second))
            assert isinstance(result, NotDurable)
        await assert_stored(store, second)
        path.losses = 1
        third = streams.next(second)
        await committed(store, third)
        with paused(replicated[1]):
            path.losses = 1
            assert isinstance(await store.delete(key("a"), third.new.head), NotDurable)
        assert await store.load_with_reply(key("a")) == (None, None)
        assert path.losses == 0
        fourth = streams.creation(key("b"))
        await committed(store, fourth)
        path.losses = 1
        assert await store.delete(key("b"), fourth.new.head) == Committed()
