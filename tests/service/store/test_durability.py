"""Durability levels (docs/explanation/guarantees.md) on real servers."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.core.delivery import chunk_digest, evaluate_chunk
from service.core.errors import NotDurable, PositionAhead, StoreRefused
from service.core.values import Check, Chunk, Steps
from service.store.base import Store
from service.store.embedded import EmbeddedValkey
from service.store.keys import KeySpace
from service.store.settings import Durability
from tests.support.cluster import Cluster, ClusterNode
from tests.support.servers import KINDS, opened, real_server, until, until_async
from tests.support.streams import (
    Streams,
    assert_stored,
    columns,
    committed,
    key,
    load,
    same_stream,
)

ALWAYS = ("--appendfsync", "always")
PARTITIONS = 16


# The disk


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_acknowledges_before_fsync_is_rejected(kind: str) -> None:
    with real_server(kind, *ALWAYS) as server:
        for name, wrong, right in (
            ("appendfsync", "everysec", "always"),
            ("no-appendfsync-on-rewrite", "yes", "no"),
            ("appendonly", "no", "yes"),
        ):
            async with opened(server.url, durability=Durability.FSYNC) as store:
                check = await store.monitor.check()
                assert check.ok
                server.configure(name, wrong)
                expected = rf"{name} {wrong}; CARRY_DURABILITY=fsync expects {name} {right}"
                with pytest.raises(StoreRefused, match=expected):
                    async with opened(server.url, durability=Durability.FSYNC):
                        pass
                check = await store.monitor.check()
                assert not check.ok
                assert name in check.detail
                server.configure(name, right)


async def test_the_embedded_valkey_fsyncs_if_configured(tmp_path: Path, streams: Streams) -> None:
    first = streams.creation(key("a"))
    for fsync in (False, True):
        valkey = EmbeddedValkey(tmp_path, fsync=fsync)
        valkey.start()
        try:
            if not fsync:
                with pytest.raises(StoreRefused, match="appendfsync everysec"):
                    async with opened(valkey.url, durability=Durability.FSYNC):
                        pass
                async with opened(valkey.url) as store:
                    await committed(store, first)
            else:
                async with opened(valkey.url, durability=Durability.FSYNC) as store:
                    await assert_stored(store, first)
        finally:
            valkey.stop()


@pytest.fixture(scope="session")
def noting_syncs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that notes what a server's disk has."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("preload") / "last_fsync.so"
    source = Path(__file__).parents[2] / "support" / "last_fsync.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("kind", KINDS)
async def test_acknowledged_commits_survive_a_machine_crash(
    kind: str, noting_syncs: Path, tmp_path: Path, streams: Streams
) -> None:
    """Files are truncated to their length at the last fsync before the last reply."""
    notes = tmp_path / "notes"
    preload = {"LD_PRELOAD": str(noting_syncs), "LAST_FSYNC_LOG": str(notes)}
    with real_server(kind, *ALWAYS, environment=preload) as server:
        async with opened(server.url, durability=Durability.FSYNC) as store:
            last = [streams.creation(key(f"s{i}")) for i in range(10)]
            for _ in range(30):
                await committed(store, *last)
                last = [streams.next(commit) for commit in last]
            acknowledged = notes.read_text()
        server.kill()
        on_disk = _as_synced(acknowledged)
        files = sorted((server.folder / "appendonlydir").glob("*.aof"))
        assert any(file.stat().st_size > 0 for file in files)
        for file in files:
            with file.open("r+b") as cut:
                cut.truncate(on_disk[str(file)])
        server.start()
        async with opened(server.url) as store:
            found = await load(store, [commit.key for commit in last])
            for stream, commit in zip(found, last, strict=True):
                assert stream.head == commit.expected


def _as_synced(notes: str) -> dict[str, int]:
    """How much of each file the disk had."""
    lines = (line.split(" ", 1) for line in notes.splitlines())
    return {path: int(size) for size, path in lines}


# Replicas


@asynccontextmanager
async def replicated(cluster: Cluster, **settings: Any) -> AsyncIterator[Store]:
    async with opened(
        cluster.url, durability=Durability.REPLICATED, partitions=PARTITIONS, **settings
    ) as store:
        yield store


@contextmanager
def paused(*nodes: ClusterNode) -> Iterator[None]:
    for node in nodes:
        node.pause()
    try:
        yield
    finally:
        for node in nodes:
            node.resume()


async def test_missing_replicas_are_logged_and_fail_readiness(
    own_cluster: Cluster,
) -> None:
    async with replicated(own_cluster, store_wait_s=5) as store:
        check = await store.monitor.check()
        assert check.ok
        assert "replicas" not in check.detail

        async def check_without_replicas(primaries: int) -> Check | None:
            """Once so many primaries have noticed the end of their replicas."""
            check = await store.monitor.check()
            return check if check.detail.count("0 replicas, expected 1") == primaries else None

        try:
            own_cluster.replicas[1].kill()
            check = await until_async(lambda: check_without_replicas(1), "one without replicas")
            assert check.ok, "the streams of the other shards are served"
            own_cluster.replicas[0].kill()
            own_cluster.replicas[2].kill()
            check = await until_async(lambda: check_without_replicas(3), "all without replicas")
            assert not check.ok
        finally:
            for replica in own_cluster.replicas:
                replica.restore()


async def test_an_interrupted_wait_confirms_nothing(own_cluster: Cluster, streams: Streams) -> None:
    """UNBLOCKED, as a primary says that becomes a replica; and a connection that is cut then, whose
    successor has written nothing that a WAIT would wait for."""
    async with replicated(own_cluster, store_wait_s=30) as store:
        first = streams.creation(key("a"))
        await committed(store, first)
        node = own_cluster.primaries[own_cluster.owner(_tag("a"))]
        with paused(*own_cluster.replicas):
            for broken_off in (("UNBLOCK", "{id}", "ERROR"), ("KILL", "ID", "{id}")):
                second = streams.next(first)
                commit = asyncio.create_task(store.commit(columns(second)))
                waiting = await asyncio.to_thread(until, lambda: _waiting(node), "a WAIT")
                node.ask("CLIENT", *(word.format(id=waiting) for word in broken_off))
                (result,) = await commit
                assert isinstance(result, NotDurable)
                first = second


def _waiting(node: ClusterNode) -> str | None:
    """The id of a client that is blocked in WAIT."""
    with node.client() as client:
        blocked = [each["id"] for each in client.client_list() if "b" in each["flags"]]
    return blocked[0] if blocked else None


def _tag(stream: str) -> str:
    return KeySpace("carry", PARTITIONS).state(key(stream))


# Memory


async def test_after_a_lossy_failover_the_client_is_ahead(
    own_cluster: Cluster, streams: Streams
) -> None:
    """A lagging replica is promoted: its stream is at an older position."""
    async with opened(own_cluster.url, partitions=PARTITIONS, store_wait_s=20) as store:
        first = streams.creation(key("a"))
        await committed(store, first)
        at = own_cluster.owner(_tag("a"))
        primary, replica = own_cluster.primaries[at], own_cluster.replicas[at]
        written = primary.replication_offset()
        await asyncio.to_thread(until, lambda: replica.has_in_file(written), "the replica's file")
        replica.kill()
        second = streams.next(first)
        await committed(store, second)
        primary.kill()
        replica.start()
        own_cluster.promote(replica)
        (found,) = await load(store, [key("a")])
        assert same_stream(found, first.new)
        steps = Steps(second.new.feed, 2, rows=np.ones((2, 3), np.float32))
        chunk = Chunk(key("a"), steps, chunk_digest(None, steps), second.new.head.position)
        with pytest.raises(PositionAhead) as caught:
            evaluate_chunk(chunk, found)
        assert caught.value.facts["expected"] == first.new.head.position
        # Another continuation is committed; the state of the old primary is lost.
        other = streams.next(first)
        await committed(store, other)
        primary.start()
        await asyncio.to_thread(own_cluster.wait_until_synced)
        await assert_stored(store, other)
