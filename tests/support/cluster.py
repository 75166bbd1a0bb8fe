"""Redis Cluster for tests: three primaries with one replica each, on the loopback.

The node timeout is short, so that a failover takes about a second.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from tests.support.servers import RealServer, emptied, free_port, until

NODE_TIMEOUT_MS = 600
"""Node timeout before a failover; short, for tests that wait for one."""
STABLE_TIMEOUT_MS = 60_000
"""Node timeout if no test stops a node. A busy machine may suspend a process for a second, and a
promoted replica would lack the last acknowledged writes."""
SLOTS = 16_384
PRIMARIES = 3


class ClusterNode(RealServer):
    """One server of a cluster, on a port of the loopback."""

    def __init__(self, kind: str, folder: Path, options: Sequence[str] = ()):
        super().__init__(kind, folder, *options)
        self.port, self.bus = free_port(), free_port()
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
            "cluster-node-timeout": NODE_TIMEOUT_MS,
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
    """A cluster of three primaries, and their replicas in the same order."""

    def __init__(self, kind: str, folder: Path, options: Sequence[str]):
        self.kind = kind
        nodes = [ClusterNode(kind, folder / str(n), options) for n in range(2 * PRIMARIES)]
        self.primaries, self.replicas = nodes[:PRIMARIES], nodes[PRIMARIES:]
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.primaries)
        self.url = f"redis+cluster://{hosts}"

    @property
    def nodes(self) -> list[ClusterNode]:
        """All six nodes."""
        return [*self.primaries, *self.replicas]

    def current_primaries(self) -> list[ClusterNode]:
        """The nodes that are primaries now: a busy machine suspends one until its replica is
        promoted."""
        return [node for node in self.nodes if node.is_primary()]

    def form(self) -> None:
        """Start the nodes and form a cluster."""
        for node in self.nodes:
            node.start()
        for index, node in enumerate(self.primaries):
            first, after = (SLOTS * i // PRIMARIES for i in (index, index + 1))
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self.nodes[0].bus)
        until(lambda: all(self._knows_all(node) for node in self.nodes), "all nodes met")
        for primary, replica in zip(self.primaries, self.replicas, strict=True):
            replica.ask("CLUSTER", "REPLICATE", primary.name)
        self.wait_until_synced()

    def wait_until_synced(self) -> None:
        """Wait until every node sees a complete cluster and every replica is in sync."""
        until(lambda: all(self._is_whole(node) for node in self.nodes), "a whole cluster")

    def _knows_all(self, node: ClusterNode) -> bool:
        lines = node.ask("CLUSTER", "NODES").decode().splitlines()
        return len(lines) == len(self.nodes) and not any("handshake" in each for each in lines)

    def _is_whole(self, node: ClusterNode) -> bool:
        if b"cluster_state:ok" not in node.ask("CLUSTER", "INFO"):
            return False
        if node.ask("CLUSTER", "NODES").count(b"slave") < PRIMARIES:
            return False
        facts = node.ask("INFO", "replication")
        if facts["role"] == "slave":
            return facts["master_link_status"] == "up"
        return facts["connected_slaves"] > 0 and facts["slave0"]["state"] == "online"

    def replica_of(self, primary: ClusterNode) -> ClusterNode:
        """The replica that follows a primary now."""
        lines = [each.split() for each in primary.ask("CLUSTER", "NODES").decode().splitlines()]
        (name,) = (line[0] for line in lines if line[3] == primary.name)
        return next(node for node in self.nodes if node.name == name)

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


@contextmanager
def real_cluster(kind: str = "valkey", *options: str) -> Iterator[Cluster]:
    """Run a cluster; stop and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="carry-test-"))
    cluster = Cluster(kind, folder, options)
    try:
        cluster.form()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """One cluster per test run, for tests that do not change it; empty it before use."""
    with real_cluster() as running:
        # Set once the cluster is up: with a longer timeout, nodes gossip less often.
        running.configure("cluster-node-timeout", STABLE_TIMEOUT_MS)
        yield running


@pytest.fixture(scope="session")
def breakable_cluster() -> Iterator[Cluster]:
    """A cluster whose nodes may be stopped; each test restarts them."""
    with real_cluster() as running:
        yield running


@pytest.fixture
def own_cluster(breakable_cluster: Cluster) -> Cluster:
    """The cluster whose nodes may be stopped, emptied."""
    empty: Cluster = emptied(breakable_cluster)
    return empty
