"""Error replies, provoked on real servers: which error a caller gets, and that
nothing is lost or duplicated. Each error is retryable, and the same commits succeed afterwards.

NOSCRIPT is in `test_server_checks`, LOADING in `test_store_faults`, OOM and WRONGTYPE in the
contract, MOVED, ASK, TRYAGAIN and CLUSTERDOWN in `test_cluster`, UNBLOCKED in `test_durability`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import redis

from service.core.errors import StoreRefused
from service.store.base import CommitResult, Committed, Store
from tests.support.proxy import LossyPath
from tests.support.servers import RealServer, becomes, opened, rejection, until
from tests.support.streams import (
    OpenStore,
    Streams,
    assert_replayable,
    assert_stored,
    columns,
    committed,
    key,
    load,
)


@contextmanager
def configured(server: RealServer, **options: str | int) -> Iterator[None]:
    """Options set, and put back."""
    with server.client() as client:
        names = {name.replace("_", "-"): value for name, value in options.items()}
        before = {name: client.config_get(name)[name] for name in names}
        for name, value in names.items():
            client.config_set(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                client.config_set(name, value)


@contextmanager
def demoted(server: RealServer) -> Iterator[None]:
    server.ask("REPLICAOF", "127.0.0.1", 1)
    try:
        yield
    finally:
        server.ask("REPLICAOF", "NO", "ONE")


@contextmanager
def unsaved(server: RealServer) -> Iterator[None]:
    """A snapshot fails, because a directory has its file name."""
    (server.folder / "dump.rdb").mkdir()
    with server.client() as client, configured(server, save="3600 1"):
        client.bgsave()
        until(lambda: not client.info("persistence")["rdb_bgsave_in_progress"], "its end")
        try:
            yield
        finally:
            (server.folder / "dump.rdb").rmdir()
            client.bgsave()
            until(lambda: not client.info("persistence")["rdb_bgsave_in_progress"], "its end")


@pytest.mark.parametrize(
    ("trouble", "word"),
    [
        (demoted, "READONLY"),
        (unsaved, "MISCONF"),
        (lambda server: configured(server, min_replicas_to_write=1), "NOREPLICAS"),
    ],
    ids=["readonly", "misconf", "noreplicas"],
)
async def test_commits_are_rejected_until_the_fault_ends(
    store: Store,
    streams: Streams,
    server: RealServer,
    trouble: Callable[[RealServer], AbstractContextManager[None]],
    word: str,
) -> None:
    """With the server's message; reads succeed."""
    first = streams.creation(key("a"))
    await committed(store, first)
    second, new = streams.next(first), streams.creation(key("b"))
    with trouble(server):
        for result in await store.commit(columns(second, new)):
            assert isinstance(result, StoreRefused), result
            assert word in result.detail
            assert result.retryable
            assert result.facts["retry_after_s"] > 0
        await assert_replayable(store, first)
        assert await load(store, [key("b")]) == [None]
    await committed(store, second, new)
    await assert_stored(store, second, new)


async def test_busy_is_retried_until_the_timeout(
    open_on: OpenStore, streams: Streams, server: RealServer
) -> None:
    """Another client's script does not end: calls wait, and name the reason at their timeout."""
    store, first = await open_on(store_wait_s=60), streams.creation(key("a"))
    await committed(store, first)
    second, third = streams.next(first), streams.creation(key("b"))

    async def create_another() -> list[CommitResult]:
        nonlocal third
        third = streams.creation(key(f"{third.key.stream}b"))
        return await store.commit(columns(third), time.monotonic() + 1)

    def spin() -> None:
        with server.client() as client, pytest.raises(redis.RedisError):
            client.eval("while true do end", 0)

    with configured(server, lua_time_limit=1):
        spinning = asyncio.create_task(asyncio.to_thread(spin))
        await asyncio.to_thread(until, lambda: server.refuses("BUSY"), "a busy server")
        try:
            await rejection(create_another, "BUSY")
            check = await store.monitor.check()
            assert not check.ok
            waiting = asyncio.create_task(store.commit(columns(second)))
            _, still = await asyncio.wait({waiting}, timeout=0.05)
            assert still
        finally:
            with server.client() as client:
                client.script_kill()
        await spinning
        assert await waiting == [Committed()]
    assert await store.load([third.key]) == [None]
    await committed(store, third)


async def test_a_truncated_reply_is_retried(own_server: RealServer, streams: Streams) -> None:
    async with (
        LossyPath.to(own_server.socket, own_server.folder) as path,
        opened(path.url, store_wait_s=20) as store,
    ):
        commits = [streams.creation(key(f"s{i}")) for i in range(20)]
        await committed(store, *commits)
        path.halves = True
        for _ in range(3):
            commits = [streams.next(commit) for commit in commits]
            path.losses = 1
            await committed(store, *commits)
            assert path.losses == 0
        await assert_stored(store, *commits)


async def test_reconnect_backs_off(own_server: RealServer, streams: Streams) -> None:
    """One connection retries with exponential backoff and jitter, however many callers wait."""
    async with (
        LossyPath.to(own_server.socket, own_server.folder) as path,
        opened(path.url, store_wait_s=60) as store,
    ):
        await committed(store, streams.creation(key("known")))
        path.dead, path.losses, path.accepted = True, 1, 0
        began_s = time.monotonic()
        commits = [columns(streams.creation(key(f"s{i}"))) for i in range(200)]
        calls = [asyncio.create_task(store.commit(commit)) for commit in commits]
        await becomes(lambda: path.accepted >= 10, "attempts")
        waited_s = time.monotonic() - began_s
        # Backoff of 5 to 10 ms that doubles up to 250 to 500 ms.
        assert path.accepted <= 8 + waited_s / 0.25
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
