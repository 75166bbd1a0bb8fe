"""Readiness of the store, on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from service.core.values import Check
from service.store.base import Store
from service.store.open import open_store
from service.store.redis import monitor
from service.store.settings import StoreSettings
from tests.support.cluster import NODE_TIMEOUT_MS, Cluster
from tests.support.servers import RealServer, opened, real_server, until, until_async
from tests.support.streams import OpenStore, Streams, committed, key

PARTITIONS = 16


async def store_check(store: Store) -> Check:
    return await store.monitor.check()


async def test_full_store_is_not_ready(store: Store, server: RealServer) -> None:
    server.configure("maxmemory", 1)
    try:
        check = await store_check(store)
        assert not check.ok
        assert f"{server.url} refuses commits: OOM" in check.detail
    finally:
        server.configure("maxmemory", 0)
    assert (await store_check(store)).ok


async def test_memory_ratio_is_observed(store: Store, server: RealServer) -> None:
    limit = 64 * 2**20
    assert store.monitor.telemetry.memory_ratio == 0
    server.configure("maxmemory", limit)
    try:
        await store_check(store)
        with server.client() as client:
            info = client.info("memory")
        # the server does not count what an append-only file and replicas buffer
        used = info["used_memory"] - info["mem_not_counted_for_evict"]
        assert store.monitor.telemetry.memory_ratio == pytest.approx(used / limit, rel=0.2)
    finally:
        server.configure("maxmemory", 0)
    await store_check(store)
    assert store.monitor.telemetry.memory_ratio == 0


@pytest.mark.parametrize("command", ["eval", "set"])
async def test_a_store_that_denies_commits_is_not_ready(server: RealServer, command: str) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "carry", "on", ">pass", "~*", "+@all")
        try:
            store = open_store(StoreSettings(server.url.replace("unix://", "unix://carry:pass@")))
            await store.start()
            assert (await store_check(store)).ok
            client.execute_command("ACL", "SETUSER", "carry", f"-{command}")
            check = await store_check(store)
            assert not check.ok
            assert "permissions" in check.detail
            await store.close()
        finally:
            client.acl_deluser("carry")


async def test_trial_commits_expire(store: Store, server: RealServer, streams: Streams) -> None:
    await committed(store, streams.creation(key("a")))
    with server.client() as client:
        keys = client.dbsize()
        assert (await store_check(store)).ok
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
                check = await store_check(strict)
                assert not check.ok
                assert "maxmemory-policy allkeys-lru, expected noeviction" in check.detail
            assert (await store_check(lenient)).ok
        finally:
            server.configure("maxmemory-policy", "noeviction")
        assert (await store_check(strict)).ok
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

                async def is_logged() -> bool:
                    return any("allkeys-lru" in line.get("reason", "") for line in lines)

                await until_async(is_logged, "a line about the policy")
            finally:
                server.configure("maxmemory-policy", "noeviction")


async def test_concurrent_readiness_requests_share_one_check(
    store: Store, server: RealServer
) -> None:
    with server.client() as client:
        before = (
            client.info("commandstats")["cmdstat_eval"]["calls"] if await store_check(store) else 0
        )
        checks = await asyncio.gather(*(store_check(store) for _ in range(20)))
        assert all(check.ok for check in checks)
        assert client.info("commandstats")["cmdstat_eval"]["calls"] == before + 1


@pytest.fixture
def lasting_cluster(own_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that does not notice within a test that a node is unavailable."""
    own_cluster.configure("cluster-node-timeout", 60_000)
    yield own_cluster
    own_cluster.configure("cluster-node-timeout", NODE_TIMEOUT_MS)


async def test_an_unavailable_shard_does_not_fail_readiness(lasting_cluster: Cluster) -> None:
    async with opened(lasting_cluster.url, partitions=PARTITIONS, store_wait_s=1) as store:
        victim = lasting_cluster.primaries[0]
        with capture_logs() as lines:
            victim.pause()
            try:
                check = await store_check(store)
            finally:
                victim.resume()
        assert check.ok
        assert check.degraded
        assert str(victim.port) in check.detail
        down = [each for each in check.servers if each.status == "down"]
        assert len(check.servers) == len(lasting_cluster.primaries)
        assert [each.detail in check.detail for each in down] == [True]
        assert str(victim.port) in down[0].address
        (degraded,) = [line for line in lines if line["event"] == "store_degraded"]
        assert str(victim.port) in degraded["reason"]


async def test_memory_ratio_is_that_of_the_fullest_shard(lasting_cluster: Cluster) -> None:
    async with opened(lasting_cluster.url, partitions=PARTITIONS, store_wait_s=1) as store:
        fullest, other, unlimited = lasting_cluster.primaries
        used = fullest.ask("INFO", "memory")["used_memory"]
        fullest.ask("CONFIG", "SET", "maxmemory", 2 * used)
        other.ask("CONFIG", "SET", "maxmemory", 20 * used)
        try:
            await store_check(store)
            ratio = store.monitor.telemetry.memory_ratio
            assert ratio == pytest.approx(0.5, rel=0.2)
            fullest.pause()
            try:
                await store_check(store)
            finally:
                fullest.resume()
            # one that does not answer is as full as before
            assert store.monitor.telemetry.memory_ratio == ratio
        finally:
            for node in (fullest, other, unlimited):
                node.ask("CONFIG", "SET", "maxmemory", 0)


async def test_the_store_starts_with_an_unavailable_shard(lasting_cluster: Cluster) -> None:
    async with opened(lasting_cluster.url, partitions=PARTITIONS):
        pass
    victim = lasting_cluster.primaries[(lasting_cluster.owner("carry:meta") + 1) % 3]
    with capture_logs() as lines:
        victim.pause()
        try:
            async with opened(lasting_cluster.url, partitions=PARTITIONS, store_wait_s=1) as store:
                assert (await store_check(store)).ok
        finally:
            victim.resume()
    (reason,) = [line["reason"] for line in lines if line["event"] == "primary_unavailable"]
    assert str(victim.port) in reason


async def test_a_shard_that_may_evict_fails_readiness(own_cluster: Cluster) -> None:
    *_, unsafe = own_cluster.current_primaries()
    async with opened(own_cluster.url, partitions=PARTITIONS) as store:
        unsafe.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        try:
            check = await store_check(store)
            assert not check.ok
            assert not check.degraded
            assert str(unsafe.port) in check.detail
            assert sorted(each.status for each in check.servers) == ["unsafe", "up", "up"]
        finally:
            unsafe.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        assert (await store_check(store)).ok


async def test_readiness_runs_a_trial_commit_on_every_shard(own_cluster: Cluster) -> None:
    primaries = own_cluster.current_primaries()
    async with opened(own_cluster.url, partitions=PARTITIONS) as store:
        for node in primaries:
            node.ask("CONFIG", "SET", "maxmemory", "1")
        try:
            check = await store_check(store)
            assert not check.ok
            assert check.detail.count("refuses commits: OOM") == len(primaries)
        finally:
            for node in primaries:
                node.ask("CONFIG", "SET", "maxmemory", "0")
        check = await store_check(store)
        assert check.ok, check.detail


@pytest.mark.parametrize(("appendonly", "warnings"), [("no", 1), ("yes", 0)])
async def test_start_warns_of_a_server_without_an_append_only_file(
    appendonly: str, warnings: int
) -> None:
    with real_server("valkey", "--appendonly", appendonly) as server, capture_logs() as lines:
        async with opened(server.url):
            pass
        assert [line["event"] for line in lines].count("append_only_file_off") == warnings
