"""A store behind Redis Sentinel: failovers, and what its address may be."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Coroutine, Generator, Iterator
from itertools import count
from typing import Any

import pytest
import redis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.core.values import StreamState
from service.store.base import Committed, Store
from service.store.codec import encode_state
from service.store.redis import sentinel_router
from service.store.redis.address import Address
from service.store.redis.outcomes import ServerReply
from service.store.redis.pipelined_connection import RedisServer
from service.store.redis.redis_store import RedisStore
from service.store.redis.router import Topology
from service.store.redis.sentinel_router import SentinelRouter
from service.store.settings import StoreSettings
from tests.support.sentinels import NAME, PASSWORD, Monitored, monitored
from tests.support.servers import (
    KINDS,
    WAIT_S,
    opened,
    rejection,
    start_store,
    until,
    until_async,
)
from tests.support.streams import Commit, Streams, columns, committed, key, load

STREAMS = 8
KEYS = StoreSettings("").keys


@pytest.fixture(scope="module", params=KINDS)
def servers(request: pytest.FixtureRequest) -> Iterator[Monitored]:
    """The last two tests that use them swap their roles, after which the old primary cannot be
    demoted, and stop the Sentinel."""
    with monitored(request.param, "--rename-command", "SLAVEOF", "") as running:
        yield running


@pytest.fixture(autouse=True)
def sentinels_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than a busy machine suspends them."""
    monkeypatch.setattr(sentinel_router, "MAX_TIMEOUT_S", 60.0)


async def test_start_and_readiness_need_a_primary_that_a_sentinel_knows(servers: Monitored) -> None:
    async with opened(servers.url) as store:
        check = await store.monitor.check()
        assert check.ok, check.detail
        assert f"/{NAME}/0 accepts commits" in check.detail
    other = servers.url.replace(f"/{NAME}/", "/other/")
    await rejection(lambda: start_store(other, store_wait_s=2), "does not know the primary 'other'")
    wrong = servers.url.replace(PASSWORD, "wrong")
    error = await rejection(lambda: start_store(wrong, store_wait_s=2), "invalid username-password")
    assert "wrong" not in str(error)


async def test_a_connection_to_a_replica_is_rejected(
    servers: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Sentinel that is partitioned may still call it the primary."""
    replica = servers.replica_port

    async def discover_replica(_: SentinelRouter) -> Topology:
        address = Address("127.0.0.1", replica)
        return Topology((address,), (address,), (), "replica")

    monkeypatch.setattr(SentinelRouter, "_discover", discover_replica)
    await rejection(
        lambda: start_store(servers.url, store_wait_s=0.5),
        f"127.0.0.1:{replica} is not a primary",
    )


async def test_a_primary_that_a_sentinel_considers_down_is_not_connected_to(
    servers: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(servers.url, store_wait_s=60) as store:
        monkeypatch.setattr(Sentinel, "check_master_state", lambda *_: False)

        async def is_known_to_be_down() -> bool:
            return "considers down" in (await store.monitor.check()).detail

        await until_async(is_known_to_be_down, "the Sentinel's answer")
        servers.primary.ask("CLIENT", "KILL", "TYPE", "normal")
        await rejection(
            lambda: store.load([key("a")], time.monotonic() + 1), r"considers the primary .* down"
        )


async def test_close_ends_a_watcher_that_lost_its_cancellation(
    servers: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Python 3.12, if a call completes at the same time."""
    has_begun, cancellations = asyncio.Event(), list[None]()

    async def read_topology(_: SentinelRouter) -> None:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancellations.append(None)
            if len(cancellations) > 1:
                raise

    monkeypatch.setattr(sentinel_router, "CHECK_INTERVAL_S", 0)
    async with asyncio.timeout(60), opened(servers.url):
        monkeypatch.setattr(SentinelRouter, "_read_topology", read_topology)
        await has_begun.wait()
    assert len(cancellations) == 2


async def test_reading_the_primary_closes_its_connections_wherever_it_is_cancelled(
    servers: Monitored,
) -> None:
    router = SentinelRouter(StoreSettings(servers.url, store_wait_s=WAIT_S))

    async def is_unconnected() -> bool:
        connections = servers.sentinel.ask("CLIENT", "LIST").splitlines()
        return len(connections) == 1  # that of the question

    for suspension in count():
        task = asyncio.create_task(cancelled_at(suspension, router.layout()))
        await asyncio.wait([task])
        await until_async(is_unconnected, f"the end of connections cancelled at {suspension}")
        if not task.cancelled() and not task.result():
            break
    assert suspension > 1
    await router.close()


async def cancelled_at(suspension: int, work: Coroutine[Any, Any, Any]) -> bool:
    """Await `work`, and cancel the task as it suspends there for the nth time; returns whether it
    was cancelled, and ended nevertheless, as may be before Python 3.12."""

    @types.coroutine
    def steps() -> Generator[Any, Any, bool]:
        error: BaseException | None = None
        for index in count():
            try:
                awaited = work.send(None) if error is None else work.throw(error)
            except StopIteration:
                return index > suspension
            if index == suspension:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                error = yield awaited
            except BaseException as thrown:
                error = thrown

    return await steps()


async def test_an_error_while_connections_to_sentinels_are_closed_is_ignored(
    servers: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Sentinel that is suspended after its reply does not answer the end of TLS."""
    close = Sentinel.aclose

    async def time_out(sentinels: Sentinel) -> None:
        await close(sentinels)
        raise RedisTimeoutError("Timed out closing connection after 1.0")

    monkeypatch.setattr(Sentinel, "aclose", time_out)
    async with opened(servers.url) as store:
        assert (await store.monitor.check()).ok


async def test_a_connection_that_fails_while_the_store_is_closed_starts_no_task(
    servers: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = RedisServer.close

    async def fail_and_close(server: RedisServer) -> None:
        router.handle_disconnect()
        await close(server)

    monkeypatch.setattr(RedisServer, "close", fail_and_close)
    async with opened(servers.url) as store:
        assert isinstance(store, RedisStore)
        router = store._router
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_close_ends_connections_to_a_server_that_was_just_replaced(
    servers: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Address("127.0.0.1", servers.replica_port)

    async def discover_replica(_: SentinelRouter) -> Topology:
        return Topology((other,), (other,), (), "replica")

    router = SentinelRouter(StoreSettings(servers.url, store_wait_s=WAIT_S))
    (server,) = (await router.layout()).servers
    assert await server.read("PING") == b"PONG"
    assert isinstance(await router.execute_one("GET", "any"), ServerReply)
    monkeypatch.setattr(SentinelRouter, "_discover", discover_replica)
    # neither suspends: the task that closes the connections is cancelled before it begins
    await router.layout()
    await router.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_commits_and_listings_follow_a_failover_of_a_primary_that_is_up(
    servers: Monitored, streams: Streams
) -> None:
    """Sentinel leaves it writable for eight seconds, here for good; then its writes are lost. What
    it owes a reply is sent to the new primary, long before the connection counts as unresponsive.
    """
    async with opened(servers.url, store_wait_s=180) as store:
        names = {f"s{index}" for index in range(STREAMS)}
        commits = [streams.creation(key(name)) for name in names]
        await committed(store, *commits)
        page = await store.streams("flights", "", None, 2)
        assert page.cursor is not None
        assert until(servers.is_whole, "the replica in step")
        servers.primary.pause()
        owed = asyncio.create_task(store.commit(columns(streams.next(commits[0]))))
        try:
            await asyncio.to_thread(servers.fail_over)
            async with asyncio.timeout(60):
                assert await owed == [Committed()]
        finally:
            servers.primary.resume()
        with servers.replica.client() as new:
            await until_async(lambda: reaches(new, store, streams), "a commit on the new primary")
        found = {each.stream for each in page.keys}
        while page.cursor is not None:
            page = await store.streams("flights", "", page.cursor, 2)
            found |= {each.stream for each in page.keys}
        assert found == names


async def reaches(server: redis.Redis, store: Store, streams: Streams) -> bool:
    """Whether the next commit of a stream is written to a server."""
    (before,) = await load(store, [key("s0")])
    assert isinstance(before, StreamState)
    new = streams.after(before)
    await store.commit(columns(Commit(key("s0"), before.head, new, None)))
    return server.get(KEYS.state(key("s0"))) == encode_state(new)


async def test_connections_to_the_last_known_primary_open_while_no_sentinel_answers(
    servers: Monitored, streams: Streams
) -> None:
    """A Sentinel is asked for as long as a readiness check may take, and none answers."""
    primary = servers.replica if servers.has_failed_over() else servers.primary
    async with opened(servers.url, store_wait_s=30) as store:
        await committed(store, streams.creation(key("known")))
        servers.sentinel.pause()
        primary.ask("CLIENT", "KILL", "TYPE", "normal")
        check = await store.monitor.check()
        assert check.ok, check.detail
        assert check.degraded
        assert "Sentinel" in check.detail
        (state,) = await load(store, [key("known")])
        assert isinstance(state, StreamState)
        assert (await store.streams("flights", "", None, 100)).keys
