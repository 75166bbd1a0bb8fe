"""What a store tells its operator, on real servers: readiness, counts of streams, round trips."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from service.core.errors import StoreRefused, StoreUnavailable
from service.core.values import Check
from service.store.base import Store
from service.store.capabilities import LIVE_S
from service.store.redis import monitor
from service.store.redis.monitor import SAMPLE_KEYS
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import (
    RealServer,
    becomes,
    emptied,
    opened,
    real_server,
    until,
    until_async,
)
from tests.support.streams import Commit, OpenStore, Streams, committed, key, load, same_stream

PARTITIONS = 16
HEADER_BYTES = 96
FLOATS, INTS = 6, 2
STATE_BYTES = HEADER_BYTES + 4 * FLOATS + 8 * INTS


async def test_memory_ratio_is_observed(store: Store, server: RealServer) -> None:
    limit = 64 * 2**20
    assert store.monitor.telemetry.memory_ratio == 0
    server.configure("maxmemory", limit)
    try:
        await store.monitor.check()
        with server.client() as client:
            info = client.info("memory")
        # the server does not count what an append-only file and replicas buffer
        used = info["used_memory"] - info["mem_not_counted_for_evict"]
        assert store.monitor.telemetry.memory_ratio == pytest.approx(used / limit, rel=0.2)
    finally:
        server.configure("maxmemory", 0)
    await store.monitor.check()
    assert store.monitor.telemetry.memory_ratio == 0


async def test_an_unavailable_server_fails_the_check_at_once(own_server: RealServer) -> None:
    async with opened(own_server.url) as store:
        own_server.kill()
        for _ in range(3):
            async with asyncio.timeout(60):
                check = await store.monitor.check()
            assert not check.ok
            assert own_server.url in check.detail


@pytest.mark.parametrize("command", ["eval", "set"])
async def test_a_store_that_denies_commits_is_not_ready(server: RealServer, command: str) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "carry", "on", ">pass", "~*", "+@all")
        try:
            async with opened(server.url.replace("unix://", "unix://carry:pass@")) as store:
                assert (await store.monitor.check()).ok
                client.execute_command("ACL", "SETUSER", "carry", f"-{command}")
                check = await store.monitor.check()
                assert not check.ok
                assert "permissions" in check.detail
        finally:
            client.acl_deluser("carry")


async def test_trial_commits_expire(store: Store, server: RealServer, streams: Streams) -> None:
    await committed(store, streams.creation(key("a")))
    with server.client() as client:
        keys = client.dbsize()
        assert (await store.monitor.check()).ok
        assert (await store.streams("flights", "", None, 10)).streams == ("a",)
        await asyncio.to_thread(until, lambda: client.dbsize() == keys, "the probe's end")


async def test_enabling_eviction_after_start_fails_readiness(
    open_on: OpenStore, server: RealServer
) -> None:
    strict, lenient = await open_on(), await open_on(allow_eviction=True)
    with capture_logs() as lines:
        server.configure("maxmemory-policy", "allkeys-lru")
        try:
            for _ in range(2):
                check = await strict.monitor.check()
                assert not check.ok
                assert "maxmemory-policy allkeys-lru, expected noeviction" in check.detail
            assert (await lenient.monitor.check()).ok
        finally:
            server.configure("maxmemory-policy", "noeviction")
        assert (await strict.monitor.check()).ok
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("store_degraded", "error"),
        ("store_recovered", "info"),
    ]


async def test_the_store_is_checked_periodically(
    server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "RECHECK_INTERVAL_S", 0.01)
    with capture_logs() as lines:
        async with opened(server.url):
            server.configure("maxmemory-policy", "allkeys-lru")
            try:
                await becomes(
                    lambda: any("allkeys-lru" in line.get("reason", "") for line in lines),
                    "a line about the policy",
                )
            finally:
                server.configure("maxmemory-policy", "noeviction")


async def test_concurrent_readiness_requests_share_one_check(
    store: Store, server: RealServer
) -> None:
    with server.client() as client:
        assert (await store.monitor.check()).ok
        before = client.info("commandstats")["cmdstat_eval"]["calls"]
        checks = await asyncio.gather(*(store.monitor.check() for _ in range(20)))
        assert all(check.ok for check in checks)
        assert client.info("commandstats")["cmdstat_eval"]["calls"] == before + 1


async def test_an_unavailable_shard_fails_only_its_own_streams(
    own_cluster: Cluster, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are served, readiness is degraded, and further stores start."""
    at = (own_cluster.owner("carry:meta") + 1) % 3
    victim, url = own_cluster.primaries[at], own_cluster.url
    keys = StoreSettings(url, partitions=PARTITIONS).keys
    used = victim.ask("INFO", "memory")["used_memory"]
    async with opened(url, partitions=PARTITIONS, store_wait_s=60) as store:
        commits = [streams.creation(key(f"alone-{i}")) for i in range(12)]
        await committed(store, *commits)
        lost = [c.key for c in commits if own_cluster.owner(keys.state(c.key)) == at]
        assert 0 < len(lost) < len(commits)

        async def others_are_loaded() -> bool:
            """Until a deadline by which a busy machine may suspend others, too."""
            states = await load(store, [c.key for c in commits], time.monotonic() + 1)
            for commit, state in zip(commits, states, strict=True):
                if isinstance(state, StoreUnavailable):
                    continue
                assert commit.key not in lost
                assert same_stream(state, commit.new)
            return sum(isinstance(state, StoreUnavailable) for state in states) == len(lost)

        async def degraded_check() -> Check | None:
            """Of which one server is down, not another one that a busy machine suspends."""
            check = await store.monitor.check()
            return check if sum(each.status == "down" for each in check.servers) == 1 else None

        async def is_later_store_ready() -> bool:
            with suppress(StoreUnavailable):
                async with opened(url, partitions=PARTITIONS, store_wait_s=5) as later:
                    return (await later.monitor.check()).ok
            return False

        victim.configure("maxmemory", 2 * used)
        own_cluster.primaries[at - 1].configure("maxmemory", 20 * used)
        await store.monitor.check()
        ratio = store.monitor.telemetry.memory_ratio
        assert ratio == pytest.approx(0.5, rel=0.2), "that of the fullest shard"
        monkeypatch.setattr(monitor, "PROBE_TIMEOUT_S", 1.0)
        with capture_logs() as lines:
            victim.pause()
            try:
                check = await until_async(degraded_check, "a check with one server down")
                await until_async(others_are_loaded, "the streams of the other shards")
                await until_async(is_later_store_ready, "another store")
            finally:
                victim.resume()
                own_cluster.configure("maxmemory", 0)
        assert (check.ok, check.degraded) == (True, True)
        (down,) = [each for each in check.servers if each.status == "down"]
        assert len(check.servers) == len(own_cluster.primaries)
        assert str(victim.port) in down.address
        assert down.detail in check.detail
        # one that does not answer is as full as before
        assert store.monitor.telemetry.memory_ratio == ratio
        for event in ("store_degraded", "primary_unavailable"):
            reasons = [line["reason"] for line in lines if line["event"] == event]
            assert any(str(victim.port) in reason for reason in reasons)


async def test_every_shard_is_checked(own_cluster: Cluster) -> None:
    primaries = own_cluster.primaries
    async with opened(own_cluster.url, partitions=PARTITIONS) as store:
        for node in primaries:
            node.configure("maxmemory", "1")
        try:
            check = await store.monitor.check()
            assert not check.ok
            assert check.detail.count("refuses commits: OOM") == len(primaries)
        finally:
            for node in primaries:
                node.configure("maxmemory", "0")
        unsafe = primaries[-1]
        unsafe.configure("maxmemory-policy", "allkeys-lru")
        try:
            check = await store.monitor.check()
            assert (check.ok, check.degraded) == (False, False)
            assert str(unsafe.port) in check.detail
            assert sorted(each.status for each in check.servers) == ["unsafe", "up", "up"]
        finally:
            unsafe.configure("maxmemory-policy", "noeviction")
        check = await store.monitor.check()
        assert check.ok, check.detail


@pytest.mark.parametrize(("appendonly", "warnings"), [("no", 1), ("yes", 0)])
async def test_start_warns_of_a_server_without_an_append_only_file(
    appendonly: str, warnings: int
) -> None:
    with real_server("valkey", "--appendonly", appendonly) as server, capture_logs() as lines:
        async with opened(server.url):
            pass
        assert [line["event"] for line in lines].count("append_only_file_off") == warnings


# Counts


def creation(streams: Streams, name: str, model: str, age_s: float = 0.0) -> Commit:
    """The first chunk of a stream, so long ago."""
    new = streams.first(floats=FLOATS, ints=INTS)
    new = new._replace(updated_ms=round((time.time() - age_s) * 1000))
    return Commit(key(name, model), None, new, streams.reply(new))


async def test_few_streams_are_counted_exactly(
    every_store: RealServer | Cluster, streams: Streams
) -> None:
    emptied(every_store)
    async with opened(every_store.url) as store, opened(every_store.url, namespace="two") as other:
        old_s = LIVE_S + 60
        commits = [creation(streams, f"s{n}", "flights", old_s * (n < 4)) for n in range(30)]
        await committed(store, *commits, *(creation(streams, f"s{n}", "post") for n in range(7)))
        await committed(other, *(creation(streams, f"s{n}", "flights") for n in range(5)))
        await store.delete(key("s29"))
        counts = await store.monitor.count_streams()
        assert counts == {"flights": (29, 25, 29 * STATE_BYTES), "post": (7, 7, 7 * STATE_BYTES)}


async def test_many_streams_are_estimated_from_a_sample(
    store: Store, server: RealServer, streams: Streams
) -> None:
    sizes = {"flights": 2400, "post": 600}
    for model, size in sizes.items():
        every = [creation(streams, f"s{n}", model) for n in range(size)]
        for at in range(0, size, 200):
            await committed(store, *every[at : at + 200])
    with server.client() as client:
        keys = client.dbsize()
        client.config_resetstat()
        counts = await store.monitor.count_streams()
        calls = {name: each["calls"] for name, each in client.info("commandstats").items()}
    assert keys > 2 * sum(sizes.values())
    assert calls["cmdstat_randomkey"] == SAMPLE_KEYS
    assert calls["cmdstat_getrange"] <= SAMPLE_KEYS
    assert "cmdstat_scan" not in calls
    for model, size in sizes.items():
        share = size / keys
        deviation = keys * math.sqrt(share * (1 - share) / SAMPLE_KEYS)
        streams_counted, live, state_bytes = counts[model]
        assert abs(streams_counted - size) < 5 * deviation
        assert live == pytest.approx(streams_counted)
        assert state_bytes == pytest.approx(streams_counted * STATE_BYTES)


async def test_reconnects_and_round_trips_are_counted(
    own_server: RealServer, streams: Streams
) -> None:
    async with opened(own_server.url, store_wait_s=10) as store:
        first, telemetry = streams.creation(key("a")), store.monitor.telemetry
        telemetry.round_trips_s.clear()
        before_s = time.monotonic()
        await committed(store, first)
        after_s = time.monotonic()
        assert telemetry.reconnects == 0
        assert (telemetry.is_up, telemetry.servers_up, telemetry.servers_down) == (True, 1, 0)
        assert len(telemetry.round_trips_s) == 1
        assert 0 < telemetry.round_trips_s[0] <= after_s - before_s
        own_server.kill()

        assert not (await store.monitor.check()).ok
        assert (telemetry.is_up, telemetry.servers_up, telemetry.servers_down) == (False, 0, 1)
        own_server.start()
        await committed(store, streams.next(first))
        assert telemetry.reconnects == 1

        await becomes(
            lambda: len(telemetry.round_trips_s) > 1, "the round trip after the reconnect"
        )
        assert (await store.monitor.check()).ok
        assert (telemetry.is_up, telemetry.servers_up, telemetry.servers_down) == (True, 1, 0)


async def test_an_error_reply_ends_the_timing_of_its_command(
    server: RealServer, streams: Streams
) -> None:
    async with opened(server.url) as store:
        with server.client() as client:
            client.set("carry:keys", "of another type")
        with pytest.raises(StoreRefused, match="WRONGTYPE"):
            await store.keys.read(None)
        store.monitor.telemetry.round_trips_s.clear()
        await committed(store, streams.creation(key("a")))
        assert len(store.monitor.telemetry.round_trips_s) == 1
