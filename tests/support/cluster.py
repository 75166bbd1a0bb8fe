"""Redis Cluster for tests: three primaries with one replica each, on the loopback.

The nodes of a test's cluster fail over by command alone, those of the fault tests by themselves.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from tests.support.servers import RealServer, emptied, free_port, until

NODE_TIMEOUT_MS = 600
"""Node timeout before a failover; short, for clusters that fail over by themselves."""
STABLE_TIMEOUT_MS = 60_000
"""Node timeout of clusters that fail over by command alone. A busy machine suspends a process for
seconds, and a promoted replica would lack the last acknowledged writes."""
SYNCED_S = 60.0
"""How long to wait for a whole cluster, before a new one is formed."""
FAIL_OVER_S = 20.0
"""How long to wait for a failover by command, of which an attempt takes five seconds at most."""
SLOTS = 16_384
PRIMARIES = 3
NODES = 2 * PRIMARIES
_BOUNDS = [SLOTS * index // PRIMARIES for index in range(PRIMARIES + 1)]
SHARDS = [f"{first}-{after - 1}" for first, after in pairwise(_BOUNDS)]
"""The slots of each primary."""


class ClusterNode(RealServer):
    """One server of a cluster, on a port of the loopback."""

    def __init__(self, kind: str, folder: Path, options: Sequence[str] = ()):
        super().__init__(kind, folder, *options)
        self.port, self.bus = free_port(), free_port()
        self.timeout_ms = NODE_TIMEOUT_MS
        folder.mkdir()

    def arguments(self) -> Sequence[str]:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "logfile": self.folder / "server.log",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "no",
            "cluster-enabled": "yes",
            "cluster-port": self.bus,
            "cluster-node-timeout": self.timeout_ms,
            "cluster-replica-validity-factor": 0,
            "repl-ping-replica-period": 1,
            "repl-diskless-sync-delay": 0,
            "repl-timeout": 5,
            "maxmemory-policy": "noeviction",
        }
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]

    def client(self) -> redis.Redis:
        """A client of this node alone."""
        return redis.Redis(port=self.port, protocol=2, retry=Retry(NoBackoff(), 0))

    @property
    def name(self) -> str:
        """The node's id."""
        return self.ask("CLUSTER", "MYID").decode()


class Cluster:
    """A cluster of three primaries, and their replicas in the same order.

    Attributes:
        primaries, replicas: the nodes' roles after `form` and `restore`.
    """

    def __init__(self, kind: str, folder: Path, options: Sequence[str]):
        self.kind = kind
        self._folder, self._options = folder, options
        self._use_new_nodes()

    def _use_new_nodes(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="nodes-", dir=self._folder))
        nodes = [ClusterNode(self.kind, folder / str(n), self._options) for n in range(NODES)]
        self.primaries, self.replicas = nodes[:PRIMARIES], nodes[PRIMARIES:]

    @property
    def nodes(self) -> list[ClusterNode]:
        """All six nodes."""
        return [*self.primaries, *self.replicas]

    @property
    def url(self) -> str:
        """Names the primaries."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.primaries)
        return f"redis+cluster://{hosts}"

    def form(self) -> None:
        """Start the nodes and form a cluster."""
        for node in self.nodes:
            node.start()
        for node, slots in zip(self.primaries, SHARDS, strict=True):
            node.ask("CLUSTER", "ADDSLOTSRANGE", *slots.split("-"))
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", SHARDS.index(slots) + 1)
        until(self._have_met, "all nodes met", poll_s=0.1)
        for primary, replica in zip(self.primaries, self.replicas, strict=True):
            replica.ask("CLUSTER", "REPLICATE", primary.name)
        self.wait_until_synced()

    def form_stable(self) -> None:
        """Form a cluster whose nodes fail over by command alone."""
        self.form()
        # Not before: with a longer timeout nodes gossip less often.
        for node in self.nodes:
            node.timeout_ms = STABLE_TIMEOUT_MS
            node.ask("CONFIG", "SET", "cluster-node-timeout", STABLE_TIMEOUT_MS)
        self._read_roles()

    def restore(self) -> None:
        """Repair a cluster that fails over by command alone, whatever a failed test left: nodes
        run, with their options, slots are where they were, replicas in sync. Where that fails, form
        a new one.
        """
        try:
            for node in self.nodes:
                node.restore()
            self._read_roles()
        except (AssertionError, redis.RedisError):
            self.stop()
            self._use_new_nodes()
            self.form_stable()

    def _read_roles(self) -> None:
        """Wait until the cluster is whole, and read which nodes are primaries of which slots."""
        self.wait_until_synced()
        shards = _shards(self.nodes[0])
        assert sorted(slots for slots, _ in shards) == sorted(SHARDS), "slots are elsewhere"
        roles = {slots: [self._node(name) for name in names] for slots, names in shards}
        self.primaries = [roles[slots][0] for slots in SHARDS]
        self.replicas = [roles[slots][1] for slots in SHARDS]

    def wait_until_synced(self) -> None:
        """Wait until all nodes know the same complete cluster, every replica is in sync, and a kill
        of any node loses nothing."""
        until(self._is_whole, "a whole cluster", SYNCED_S)

    def _is_whole(self) -> bool:
        views = [_shards(node) for node in self.nodes]
        return (
            all(view == views[0] for view in views)
            and [len(names) for _, names in views[0]] == [2] * PRIMARIES
            and all(_is_synced(node) for node in self.nodes)
        )

    def _have_met(self) -> bool:
        """Whether all nodes know each other; those that do not meet: one that is suspended for
        longer than the node timeout is forgotten."""
        lacking = [node for node in self.nodes if not self._knows_all(node)]
        for node in lacking:
            for other in self.nodes:
                if other is not node:
                    node.ask("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus)
        return not lacking

    def _knows_all(self, node: ClusterNode) -> bool:
        lines = node.ask("CLUSTER", "NODES").decode().splitlines()
        return len(lines) == len(self.nodes) and not any("handshake" in each for each in lines)

    def _node(self, name: str) -> ClusterNode:
        return next(node for node in self.nodes if node.name == name)

    def replica_of(self, primary: ClusterNode) -> ClusterNode:
        """The replica that follows a primary now."""
        shards = _shards(primary)
        (replica,) = (names[1] for _, names in shards if names[0] == primary.name)
        return self._node(replica)

    def promote(self, replica: ClusterNode) -> None:
        """Make a replica a primary, as nodes with a short timeout do once its primary is lost."""
        replica.ask("CLUSTER", "FAILOVER", "TAKEOVER")
        until(replica.is_primary, "the replica's promotion")

    def fail_over(self, replica: ClusterNode) -> None:
        """Swap a replica's role with its primary's, which hands it the last writes."""
        replica.ask("CLUSTER", "FAILOVER")
        with suppress(AssertionError):
            until(replica.is_primary, "the replica's promotion", within_s=FAIL_OVER_S)
            return
        # its primary or a voter was suspended for longer than an attempt takes
        self.promote(replica)

    def owner(self, key: str) -> int:
        """Index of the primary that owns a key initially."""
        slot = key_slot(key.encode())
        return next(i for i in range(PRIMARIES) if slot < SLOTS * (i + 1) // PRIMARIES)

    def client(self) -> redis.RedisCluster:
        """A client of the cluster, to inspect what the store wrote."""
        return redis.RedisCluster(host="127.0.0.1", port=self.primaries[0].port, protocol=2)

    def configure(self, name: str, value: str | int) -> None:
        """Run CONFIG SET on every node."""
        for node in self.nodes:
            node.configure(name, value)

    def stop(self) -> None:
        """Kill every node."""
        for node in self.nodes:
            node.stop()


def _shards(node: ClusterNode) -> list[tuple[str, list[str]]]:
    """The shards that a node knows, ordered: slots, name of the primary, names of its replicas."""
    lines = [each.split() for each in node.ask("CLUSTER", "NODES").decode().splitlines()]
    return sorted(
        (" ".join(line[8:]), [line[0], *sorted(other[0] for other in lines if other[3] == line[0])])
        for line in lines
        if len(line) > 8
    )


def _is_synced(node: ClusterNode) -> bool:
    """Whether a node serves, as a replica or with one, and its file is complete."""
    if b"cluster_state:ok" not in node.ask("CLUSTER", "INFO"):
        return False
    facts = node.ask("INFO", "replication")
    if facts["role"] == "slave":
        is_synced = facts["master_link_status"] == "up"
    else:
        is_synced = facts["connected_slaves"] > 0 and facts["slave0"]["state"] == "online"
    return is_synced and node.has_complete_file()


@contextmanager
def real_cluster(kind: str = "valkey", *options: str) -> Iterator[Cluster]:
    """Run a cluster; stop and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="carry-test-"))
    cluster = Cluster(kind, folder, options)
    try:
        cluster.form_stable()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """One cluster per test run, for tests that do not change it; empty it before use."""
    with real_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def breakable_cluster() -> Iterator[Cluster]:
    """A cluster whose nodes may be stopped."""
    with real_cluster() as running:
        yield running


@pytest.fixture
def own_cluster(breakable_cluster: Cluster) -> Cluster:
    """The cluster whose nodes may be stopped, whole and empty whatever the last test did to it."""
    empty: Cluster = emptied(breakable_cluster)
    return empty
