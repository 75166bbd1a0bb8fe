"""Redis Cluster: redirects, failover, resharding and unavailable nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis
from redis.crc import key_slot

from service.core.errors import (
    CarryError,
    NotDurable,
    OutcomeUnknown,
    StoreRefused,
    StoreUnavailable,
)
from service.store.base import Committed, Conflicted, Store
from service.store.redis import monitor
from service.store.redis.redis_store import RedisStore
from service.store.settings import Durability, StoreSettings
from tests.service.store.test_history import keep, ranges, read
from tests.support.cluster import NODE_TIMEOUT_MS, Cluster, ClusterNode
from tests.support.servers import emptied, opened, rejection, until, until_async
from tests.support.streams import (
    Commit,
    Streams,
    assert_replayable,
    assert_stored,
    columns,
    committed,
    key,
    load,
    same_reply,
    same_stream,
)

PARTITIONS = 16


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The shared one, empty. Tests put back what they change."""
    return emptied(shared_cluster)


@pytest.fixture
async def store(cluster: Cluster) -> AsyncIterator[Store]:
    async with opened(cluster.url, partitions=PARTITIONS, store_wait_s=20) as running:
        yield running


def names(url: str, stream: str) -> tuple[str, str]:
    """A stream's keys."""
    return StoreSettings(url, partitions=PARTITIONS).keys.pair(key(stream))


class SlotMigration:
    """Migration of a slot from its node to another, step by step."""

    def __init__(self, cluster: Cluster, name: str):
        self.cluster = cluster
        self.slot = key_slot(name.encode())
        at = cluster.owner(name)
        self.source, self.target = cluster.primaries[at], cluster.primaries[at - 1]

    def start(self) -> None:
        self._set_slot(self.target, "IMPORTING", self.source.name)
        self._set_slot(self.source, "MIGRATING", self.target.name)

    def _set_slot(self, node: ClusterNode, state: str, of: str) -> None:
        """Set the slot's state on a node and its replicas; a busy machine may suspend those for
        longer than the node waits."""

        def set_slot() -> bool:
            try:
                return bool(node.ask("CLUSTER", "SETSLOT", self.slot, state, of))
            except redis.ResponseError as error:
                if "NOREPLICAS" not in str(error):
                    raise
                return False

        until(set_slot, "a slot's state on a node and its replicas")

    def migrate_keys(self, *found: str | bytes) -> None:
        """Migrate some keys."""
        if found:
            to = ("127.0.0.1", self.target.port, "", 0, 5000, "KEYS", *found)
            self.source.ask("MIGRATE", *to)

    def migrate_all_keys(self) -> None:
        while found := self.source.ask("CLUSTER", "GETKEYSINSLOT", self.slot, 10):
            self.migrate_keys(*found)

    def finish(self) -> None:
        """Assign the slot to its new node, on every node."""
        for node in (self.target, self.source, *self.cluster.nodes):
            try:
                self._set_slot(node, "NODE", self.target.name)
            except redis.ResponseError:
                # Replicas learn it from their primaries.
                assert node in self.cluster.replicas

    def reversed(self) -> SlotMigration:
        """The reverse migration, not started."""
        other = SlotMigration(self.cluster, "any")
        other.slot, other.source, other.target = self.slot, self.target, self.source
        return other

    def run(self) -> None:
        """Start, migrate all keys, and finish."""
        self.start()
        self.migrate_all_keys()
        self.finish()


# Migration of slots


async def test_moved_updates_the_topology_and_retries(
    store: Store, streams: Streams, cluster: Cluster
) -> None:
    """MOVED, for a commit and for a load, before the topology was read again."""
    first = streams.creation(key("a"))
    await committed(store, first)
    migration = SlotMigration(cluster, names(cluster.url, "a")[0])
    migration.run()
    try:
        second = streams.next(first)
        await committed(store, second)
        await assert_replayable(store, second)
    finally:
        migration.reversed().run()
    async with opened(cluster.url, partitions=PARTITIONS) as other:
        assert await other.load([key("none")]) == [None]
    await assert_stored(store, second)


async def test_ask_is_followed_once_with_asking(
    store: Store, streams: Streams, cluster: Cluster
) -> None:
    """ASK: both keys of the stream have moved, but the old node still owns the slot."""
    first = streams.creation(key("a"))
    await committed(store, first)
    migration = SlotMigration(cluster, names(cluster.url, "a")[0])
    migration.start()
    migration.migrate_all_keys()
    try:
        # The new node replies NOSCRIPT: the request is resent as EVAL, with ASKING again.
        migration.target.ask("SCRIPT", "FLUSH")
        second = streams.next(first)
        await committed(store, second)
        await assert_replayable(store, second)
        assert migration.source.ask("CLUSTER", "COUNTKEYSINSLOT", migration.slot) == 0
    finally:
        migration.finish()
        migration.reversed().run()


async def test_a_history_moves_with_its_stream(
    store: Store, streams: Streams, cluster: Cluster
) -> None:
    first = streams.creation(key("a"))
    await keep(store, first)
    migration = SlotMigration(cluster, names(cluster.url, "a")[0])
    migration.start()
    migration.migrate_all_keys()
    try:
        second = streams.next(first)
        await keep(store, second)
        assert ranges(await read(store, second.new, key("a"))) == [range(4), range(4, 8)]
    finally:
        migration.finish()
        migration.reversed().run()
    third = streams.next(second)
    await keep(store, third)
    found = await read(store, third.new, key("a"))
    assert ranges(found) == [range(4), range(4, 8), range(8, 12)]
    assert await store.delete(key("a")) == Committed()


async def test_tryagain_is_retried_until_the_migration_ends(
    store: Store, streams: Streams, cluster: Cluster
) -> None:
    """TRYAGAIN: the state has moved to the new node, its reply has not."""
    first = streams.creation(key("a"))
    await committed(store, first)
    state_key, reply_key = names(cluster.url, "a")
    migration = SlotMigration(cluster, state_key)
    migration.start()
    migration.migrate_keys(state_key)
    second = streams.next(first)
    commit = asyncio.create_task(store.commit(columns(second)))
    load = asyncio.create_task(store.load_with_reply(key("a")))
    try:
        done, _ = await asyncio.wait({commit, load}, timeout=0.1)
        assert not done
        with pytest.raises(redis.exceptions.TryAgainError):
            migration.source.ask("MGET", state_key, reply_key)
    finally:
        migration.migrate_keys(reply_key)
        migration.finish()
    assert await commit == [Committed()]
    state, reply = await load
    assert any(same_stream(state, each.new) for each in (first, second))
    assert any(same_reply(reply, each.reply) for each in (first, second))
    migration.reversed().run()


async def test_tryagain_until_the_timeout_applies_nothing(
    streams: Streams, cluster: Cluster
) -> None:
    async def only_one_is_rejected(store: Store) -> bool:
        """Unless a busy machine suspends a server until the deadline."""
        commits = columns(streams.next(first), elsewhere)
        rejected, written = await store.commit(commits, time.monotonic() + 1)
        assert isinstance(rejected, StoreUnavailable | OutcomeUnknown)
        assert "TRYAGAIN" in rejected.detail or not isinstance(rejected, StoreUnavailable)
        return isinstance(rejected, StoreUnavailable) and written in (
            Committed(),
            Conflicted(elsewhere.new.head),
        )

    async with opened(cluster.url, partitions=PARTITIONS, store_wait_s=60) as store:
        first = streams.creation(key("a"))
        elsewhere = streams.creation(key("b"))
        assert cluster.owner(names("", "b")[0]) != cluster.owner(names("", "a")[0])
        await committed(store, first)
        state_key, reply_key = names(cluster.url, "a")
        migration = SlotMigration(cluster, state_key)
        migration.start()
        migration.migrate_keys(state_key)
        try:
            await until_async(lambda: only_one_is_rejected(store))
        finally:
            migration.migrate_keys(reply_key)
            migration.finish()
        await assert_stored(store, first)
        migration.reversed().run()


async def test_resharding_under_load_loses_and_duplicates_nothing(
    store: Store, streams: Streams, cluster: Cluster
) -> None:
    async with writing(store, streams, 24) as done:
        for _ in range(2):
            for partition in range(0, PARTITIONS, 5):
                migration = SlotMigration(cluster, f"{{p{partition:04d}}}")
                migration.start()
                await asyncio.sleep(0)
                await asyncio.to_thread(migration.migrate_all_keys)
                await asyncio.to_thread(migration.finish)
                await done.wait_for_more(60)
                await asyncio.to_thread(migration.reversed().run)
                await done.wait_for_more(60)
    await done.check(store)


# Unavailable nodes


class Writers:
    """Writers of streams, and what was acknowledged to them."""

    def __init__(self) -> None:
        self.last: dict[str, Commit] = {}
        self.count = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def wait_for_more(self, commits: int) -> None:
        """Wait for this many more commits."""
        goal = self.count + commits
        while self.count < goal:
            await asyncio.sleep(0.001)
            for task in self.tasks:
                if task.done():
                    task.result()

    async def check(self, store: Store) -> None:
        """Every stream is where it was last acknowledged, bit by bit."""
        await assert_stored(store, *self.last.values())


@asynccontextmanager
async def writing(store: Store, streams: Streams, count: int) -> AsyncIterator[Writers]:
    """Writers, each with a stream of its own, that write until the end of the block."""
    writers, stop = Writers(), asyncio.Event()

    async def write(name: str) -> None:
        commit = streams.creation(key(name))
        while not stop.is_set():
            (result,) = await store.commit(columns(commit))
            while result != Committed():
                # A client retries: the chunk is re-evaluated and answered from the stored reply.
                assert isinstance(result, NotDurable | OutcomeUnknown | Conflicted), result
                try:
                    state, _ = await store.load_with_reply(commit.key)
                except NotDurable:
                    continue
                if state is not None and state.head == commit.new.head:
                    break
                assert (None if state is None else state.head) == commit.expected
                (result,) = await store.commit(columns(commit))
            writers.last[name] = commit
            writers.count += 1
            commit = streams.next(commit)

    async with asyncio.TaskGroup() as group:
        writers.tasks = [group.create_task(write(f"w{i}")) for i in range(count)]
        yield writers
        stop.set()


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "by command"])
async def test_failover_keeps_every_acknowledged_replicated_commit(
    own_cluster: Cluster, streams: Streams, *, is_lost: bool
) -> None:
    """`replicated` with all replicas: the new primary has every acknowledged commit."""
    durably = {"durability": Durability.REPLICATED, "replicas": 1}
    async with opened(own_cluster.url, partitions=PARTITIONS, store_wait_s=20, **durably) as store:
        victim, heir = own_cluster.primaries[0], own_cluster.replicas[0]
        async with writing(store, streams, 16) as done:
            await done.wait_for_more(300)
            if is_lost:
                victim.kill()
                await asyncio.to_thread(own_cluster.promote, heir)
                victim.start()
            else:
                await asyncio.to_thread(own_cluster.fail_over, heir)
            await done.wait_for_more(300)
        await done.check(store)
        await asyncio.to_thread(own_cluster.wait_until_synced)
        check = await store.monitor.check()
        assert check.ok, check.detail


async def test_pending_requests_of_a_lost_node_move_to_the_new_primary(
    own_cluster: Cluster, streams: Streams
) -> None:
    """Requests sent before and after the loss succeed although the node does not return."""
    victim, heir = own_cluster.primaries[0], own_cluster.replicas[0]
    async with opened(own_cluster.url, partitions=PARTITIONS, store_wait_s=20) as store:
        commits = [streams.creation(key(f"s{i}")) for i in range(12)]
        await committed(store, *commits)
        written = victim.replication_offset()
        await asyncio.to_thread(until, lambda: heir.has_in_file(written), "the replica in step")
        ours = [c for c in commits if own_cluster.owner(names("", c.key.stream)[0]) == 0]
        assert len(ours) > 1
        sent, *unsent = (streams.next(commit) for commit in ours)
        victim.pause()
        owed = [asyncio.create_task(store.commit(columns(sent)))]
        await asyncio.sleep(0)
        victim.kill()
        owed += [asyncio.create_task(store.commit(columns(commit))) for commit in unsent]
        loading = asyncio.create_task(load(store, [commit.key for commit in commits]))
        await asyncio.to_thread(own_cluster.promote, heir)
        assert await asyncio.gather(*owed) == [[Committed()]] * len(ours)
        assert not any(isinstance(found, CarryError) for found in await loading)


async def test_requests_wait_for_the_majority_and_recover(
    own_cluster: Cluster, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLUSTERDOWN from the remaining node; then the cluster recovers."""
    monkeypatch.setattr(monitor, "PROBE_TIMEOUT_S", 0.1)
    down = [own_cluster.primaries[i] for i in (1, 2)] + own_cluster.replicas
    left = own_cluster.primaries[0]
    async with opened(own_cluster.url, partitions=PARTITIONS, store_wait_s=60) as store:
        first = streams.creation(key("on-the-node-that-is-left"))
        while own_cluster.owner(names("", first.key.stream)[0]) != 0:
            first = streams.creation(key(first.key.stream + "-"))
        await committed(store, first)
        left.configure("cluster-node-timeout", NODE_TIMEOUT_MS)
        for node in down:
            node.pause()
        try:
            await asyncio.to_thread(until, lambda: _refuses(left, "CLUSTERDOWN"), "CLUSTERDOWN")
            second = streams.next(first)
            error = await rejection(
                lambda: store.commit(columns(second), time.monotonic() + 1), "CLUSTERDOWN"
            )
            assert error.retryable
            assert error.facts["retry_after_s"] > 0
            check = await store.monitor.check()
            assert not check.ok
            waiting = asyncio.create_task(store.commit(columns(second)))
            await asyncio.wait({waiting}, timeout=0.05)
        finally:
            for node in down:
                node.resume()
        assert await waiting == [Committed()]


def _refuses(node: ClusterNode, word: str) -> bool:
    try:
        node.ask("GET", "{p0000}")
    except redis.RedisError as error:
        return word.lower() in f"{type(error).__name__} {error}".lower()
    return False


# Nodes and addresses


async def test_a_listing_restarts_after_a_slot_moved(
    store: Store, streams: Streams, cluster: Cluster
) -> None:
    await committed(store, *(streams.creation(key(f"s{i}"), floats=1) for i in range(40)))
    cursor, names_, moved = None, set[str](), False
    while True:
        page = await store.streams("flights", "", cursor, 5)
        names_ |= set(page.streams)
        if page.cursor is None:
            break
        if not moved and page.cursor.split(".")[1] == "2":
            # From a node that is not scanned yet to one that is.
            order = sorted(cluster.primaries, key=lambda node: node.name)
            slot = next(
                slot
                for partition in range(PARTITIONS)
                if cluster.primaries[cluster.owner(f"{{p{partition:04d}}}")] is order[2]
                and (slot := key_slot(b"{p%04d}" % partition))
            )
            migration = SlotMigration(cluster, "any")
            migration.slot, migration.source, migration.target = slot, order[2], order[0]
            migration.run()
            moved = True
        cursor = page.cursor
    migration.reversed().run()
    assert moved
    assert names_ == {f"s{i}" for i in range(40)}


async def test_one_available_startup_node_is_enough(cluster: Cluster, streams: Streams) -> None:
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster.replicas[1].port}"
    async with opened(url, partitions=PARTITIONS) as store:
        await committed(store, streams.creation(key("a")))
    store = RedisStore(StoreSettings("redis+cluster://127.0.0.1:1", store_wait_s=0.2))
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        await store.start()
    await store.close()


async def test_a_cluster_node_that_may_evict_is_rejected(cluster: Cluster) -> None:
    for node in (cluster.primaries[1], cluster.replicas[2]):
        node.configure("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(StoreRefused, match=rf"{node.port}.*allkeys-lru"):
                async with opened(cluster.url, partitions=PARTITIONS):
                    pass
        finally:
            node.configure("maxmemory-policy", "noeviction")
