"""Faults of a server: it exits, hangs, loads, or its replies are lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
import uvloop

from service.core.errors import OutcomeUnknown, StoreRefused, StoreUnavailable
from service.core.values import StreamKey, StreamState
from service.store.base import Committed, Conflicted, Store
from service.store.redis import monitor
from service.store.redis.connections import transport_of
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.proxy import LossyPath
from tests.support.servers import RealServer, opened, until
from tests.support.streams import (
    Commit,
    Streams,
    absence,
    assert_replayable,
    assert_stored,
    columns,
    committed,
    key,
    load,
    same_reply,
    same_stream,
)


class Lossy(NamedTuple):
    """A store on a path that can lose replies, and a store beside it on a sound one."""

    path: LossyPath
    store: Store
    others: Store


@pytest.fixture
async def lossy(own_server: RealServer) -> AsyncIterator[Lossy]:
    """The server knows the scripts already."""
    async with (
        LossyPath.to(own_server.socket, own_server.folder) as path,
        opened(path.url, store_wait_s=20) as store,
        opened(own_server.url) as others,
    ):
        known = Streams(1).creation(key("known"))
        assert await store.commit(columns(known)) == [Committed()]
        assert await store.delete(known.key) == Committed()
        yield Lossy(path, store, others)


def test_a_transport_closed_by_the_loop_is_reopened(server: RealServer, streams: Streams) -> None:
    """uvloop rejects writes to a closed transport before its reader is notified."""

    async def ended_before_each_commit() -> None:
        async with opened(server.url) as store:
            commit = streams.creation(key("s"))
            assert await store.commit(columns(commit)) == [Committed()]
            for _ in range(5):
                transport_of(store._router.any_server().connection._connection).abort()
                await asyncio.sleep(0)
                commit = streams.next(commit)
                assert await store.commit(columns(commit)) == [Committed()]

    uvloop.run(ended_before_each_commit())


# Restarts


async def test_calls_wait_for_a_restarting_server(own_server: RealServer, streams: Streams) -> None:
    async with opened(own_server.url, store_wait_s=30) as store:
        first, other = streams.creation(key("a")), streams.creation(key("b"))
        assert await store.commit(columns(first, other)) == [Committed()] * 2
        own_server.kill()
        second = streams.next(first)
        calls = [
            asyncio.create_task(call)
            for call in (
                load(store, [key("b")]),
                store.commit(columns(second)),
                store.load_with_reply(key("b")),
                store.streams("flights", "", None, 10),
                store.delete(key("none")),
            )
        ]
        _, waiting = await asyncio.wait(calls, timeout=0.05)
        assert len(waiting) == len(calls)
        own_server.start()
        loaded, results, (state, reply), page, deleted = await asyncio.gather(*calls)
        assert same_stream(loaded[0], other.new)
        assert results == [Committed()]
        assert same_stream(state, other.new)
        assert same_reply(reply, other.reply)
        assert set(page.streams) == {"a", "b"}
        # It may be sent before the exit is detected: then the outcome is ambiguous.
        assert deleted in (Conflicted(None), Committed())
        await assert_stored(store, second)


async def test_calls_wait_for_a_loading_server(own_server: RealServer, streams: Streams) -> None:
    async with opened(own_server.url, store_wait_s=60) as store:
        first = streams.creation(key("a"))
        assert await store.commit(columns(first)) == [Committed()]
        with own_server.client() as client:
            for number in range(20):
                client.mset({f"{number}-{i}": bytes(20_000) for i in range(20)})
            client.bgrewriteaof()
            until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], "rewriting")
        own_server.kill()
        # Loading takes a millisecond per key, so that requests arrive while it loads.
        slow = ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
        own_server.launch(*slow)
        until(lambda: own_server.refuses("LOADING"), "a server that is loading")
        await assert_stored(store, first)
        assert await store.commit(columns(streams.next(first))) == [Committed()]


async def test_an_unavailable_server_times_out(own_server: RealServer, streams: Streams) -> None:
    store = RedisStore(StoreSettings(own_server.url + "-elsewhere", store_wait_s=0.2))
    with pytest.raises(StoreUnavailable, match="elsewhere"):
        await store.start()
    await store.close()
    async with opened(own_server.url, store_wait_s=1) as store:
        own_server.kill()
        await asyncio.sleep(0)
        calls = (
            load(store, [key("a")]),
            store.load_with_reply(key("a")),
            store.commit(columns(streams.creation(key("a")))),
            store.streams("flights", "", None, 10),
        )
        async with asyncio.timeout(60):
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, StoreUnavailable)
                assert error.facts["retry_after_s"] > 0
                assert own_server.socket in error.detail
        check = await store.monitor.check()
        assert not check.ok
        assert own_server.socket in check.detail


async def test_all_commits_to_an_unresponsive_server_have_unknown_outcomes(
    own_server: RealServer, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands are pipelined: all that were sent may be executed later."""
    monkeypatch.setattr(monitor, "PROBE_TIMEOUT_S", 0.1)
    async with opened(own_server.url, store_wait_s=60) as store:
        assert await store.commit(columns(streams.creation(key("before")))) == [Committed()]
        commits = [streams.creation(key(f"s{i}")) for i in range(6)]
        own_server.signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(60):
                end_s = time.monotonic() + 0.3
                calls = [store.commit(columns(*commits[at : at + 2]), end_s) for at in (0, 2, 4)]
                outcomes = [each for part in await asyncio.gather(*calls) for each in part]
                with pytest.raises(StoreUnavailable):
                    await store.load([key("a")], time.monotonic() + 0.1)
                assert not (await store.monitor.check()).ok
        finally:
            own_server.signal(signal.SIGCONT)
        assert all(isinstance(outcome, OutcomeUnknown) for outcome in outcomes)
        assert [outcome.facts["stream"] for outcome in outcomes] == [f"s{i}" for i in range(6)]
    async with opened(own_server.url) as store:
        for commit in commits:
            assert await store.commit(columns(commit)) in (
                [Committed()],
                [Conflicted(commit.new.head)],
            )


# Lost replies


async def test_a_retried_commit_that_finds_its_own_head_was_written(
    lossy: Lossy, streams: Streams
) -> None:
    path, store, _ = lossy
    first, other = streams.creation(key("a")), streams.creation(key("b"))
    path.losses = 1
    assert await store.commit(columns(first, other)) == [Committed(), Committed()]
    assert path.losses == 0
    # The other stream is behind the expected head.
    second, stale = streams.next(first), streams.next(streams.next(other))
    path.losses = 2
    results = await store.commit(columns(second, stale))
    assert results == [Committed(), Conflicted(other.new.head)]
    await assert_replayable(store, second)


async def test_a_retried_commit_is_resolved_by_what_others_wrote_meanwhile(
    lossy: Lossy, streams: Streams
) -> None:
    """Its own epoch: written, since no other commit can have created it. A later position of the
    same epoch, or a newer one, which may start from the state that was written (a restore):
    unknown. A rollback to an earlier position: not written, or only by the retry."""
    path, store, others = lossy

    async def create(new: StreamState) -> None:
        await others.delete(key("a"))
        expected = await absence(others, key("a"))
        await committed(others, Commit(key("a"), expected, new, None))

    first, newer = (streams.creation(key("a")) for _ in range(2))
    second = streams.next(first)
    third = streams.next(second)
    for stored, retried, meanwhile, expected in (
        (None, first, lambda: committed(others, second), Committed()),
        (first.new, second, lambda: committed(others, third), OutcomeUnknown),
        (first.new, second, lambda: create(newer.new), OutcomeUnknown),
        (first.new, third, lambda: create(first.new), Conflicted(first.new.head)),
        (first.new, second, lambda: create(first.new), Committed()),
    ):
        if stored is not None:
            await create(stored)
        path.losses, path.after_loss = 1, meanwhile
        (result,) = await store.commit(columns(retried))
        assert result == expected or type(result) is expected
        if type(result) is OutcomeUnknown:
            (found,) = await load(store, [key("a")])
            assert result.facts["position"] == found.head.position
            assert result.facts["epoch"] == found.head.epoch.hex()
    await assert_stored(store, second)
    (found,) = await load(store, [key("a")])
    path.losses, path.after_loss = 1, lambda: create(newer.new)
    assert isinstance(await store.delete(key("a"), found.head), OutcomeUnknown)


async def test_a_rejection_after_a_lost_reply_has_an_unknown_outcome(
    lossy: Lossy, own_server: RealServer, streams: Streams
) -> None:
    async def forbid() -> None:
        with own_server.client() as client:
            client.acl_setuser("default", commands=["-evalsha", "-eval"])

    path, store, _ = lossy
    path.losses, path.after_loss = 1, forbid
    (result,) = await store.commit(columns(streams.creation(key("a"))))
    assert isinstance(result, OutcomeUnknown)
    with pytest.raises(StoreRefused):
        await store.commit(columns(streams.creation(key("b"))))


async def test_a_call_ends_at_its_deadline_while_an_earlier_call_waits_longer() -> None:
    """One timer serves all calls, so a later call may have the earlier deadline."""
    store, key = (
        RedisStore(StoreSettings("redis://127.0.0.1:1", store_wait_s=60)),
        StreamKey("m", "s"),
    )
    waiting = asyncio.create_task(store.load([key], time.monotonic() + 60))
    try:
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            with pytest.raises(StoreUnavailable):
                await store.load([key], time.monotonic() + 0.02)
        assert not waiting.done()
    finally:
        waiting.cancel()
        await asyncio.wait([waiting])
        await store.close()
