"""The six-node cluster as something that breaks: nodes are killed, stopped, fail over.

Every node announces the port of a path instead of its own, so all that workers ask of it passes
there; whose a connection is, its port says. Replicas follow their primaries through the paths
too, and are left alone there.

Replication is asynchronous: every fault that may cause a promotion may lose the last writes.
With `replicated` durability a chunk is acknowledged only when the replica has it: then only a
promotion of a replica that was stopped could take any, and such a chunk was not acknowledged.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import redis

from tests.faults.proxy import Connection, Proxy, Target, Watcher
from tests.faults.records import Loss
from tests.faults.stores import DOWN_S, ERRORS, ONE_BYTE, SERVES_S, HasPid, Store
from tests.support.cluster import Cluster, ClusterNode
from tests.support.servers import until

LAG_S: Final = 0.5
"""How far a replica that runs may be behind its primary."""

STALE_S: Final = 3.0
"""How long a primary that was stopped may act as one before it learns of the promotion."""


class ClusterStore(Store):
    """Three primaries and their replicas.

    Args:
        strict: chunks are acknowledged when the replica has them.
    """

    name = "cluster"

    def __init__(self, folder: Path, *, strict: bool):
        super().__init__(folder)
        self._home = Path(tempfile.mkdtemp(prefix="carry-faults-"))
        self._cluster = Cluster("valkey", self._home, ("--auto-aof-rewrite-percentage", "0"))
        self._strict = strict
        self._workers: Mapping[str, HasPid] = {}
        self._stopped: ClusterNode | None = None
        self._old_primary: ClusterNode | None = None
        self._away: set[ClusterNode] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open_proxies(
        self, watcher: Watcher, names: Sequence[str], workers: Mapping[str, HasPid]
    ) -> None:
        self._workers = workers
        self._loop = asyncio.get_running_loop()
        for node in self._cluster.nodes:
            proxy = Proxy(self._to(node), watcher)
            await proxy.open()
            self.proxies.append(proxy)
            node._options = (*node._options, "--cluster-announce-port", str(proxy.port))

    def start(self) -> None:
        self._cluster.form()

    def stop(self) -> None:
        for node in self._cluster.nodes:
            if node._process is not None and node._process.poll() is None:
                node.resume()
        self._cluster.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def url(self, worker: str) -> str:
        addresses = (f"127.0.0.1:{proxy.port}" for proxy in self.proxies[:3])
        return f"redis+cluster://{','.join(addresses)}"

    def owner_of(self, connection: Connection) -> str:
        """By the process that has the other end of the connection; looked up once."""
        if connection.owner is None:
            connection.owner = next(
                (name for name, worker in self._workers.items() if _has(worker.pid, connection)), ""
            )
        return connection.owner

    def ask(self, *command: str | int) -> Any:
        for node in self._cluster.nodes:
            if node in self._away:
                continue
            try:
                return node.ask(*command)
            except redis.exceptions.MovedError:
                continue
        raise OSError("no node that serves has the key")

    def kill(self, pick: int) -> Loss | None:
        """A primary, down for less than it takes to be voted out, mostly."""
        node = self._primary(pick)
        killed_s = time.monotonic()
        self._away = {node}
        node.kill()
        time.sleep(DOWN_S)
        node.start()
        return self._loss_once_whole("a primary was killed", killed_s)

    def pause(self, seconds: float, pick: int) -> Loss | None:
        """A primary; when it is stopped for long, its replica takes its place."""
        node = self._primary(pick)
        stopped_s = time.monotonic()
        self._away = {node}
        node.pause()
        time.sleep(seconds)
        node.resume()
        return self._loss_once_whole("a primary was stopped", stopped_s)

    def fill(self, seconds: float) -> None:
        self._cluster.configure("maxmemory", ONE_BYTE)
        time.sleep(seconds)
        self._cluster.configure("maxmemory", "0")

    def fail_over(self, pick: int) -> Loss | None:
        """A primary is killed, its replica takes its place, and it comes back as a replica."""
        node = self._primary(pick)
        replica = self._replica_of(node)
        killed_s = time.monotonic()
        self._away = {node}
        node.kill()
        until(lambda: _role(replica) == "master", "the promotion", SERVES_S)
        node.start()
        return self._loss_once_whole("a primary was lost", killed_s)

    def prepare_rollback(self, pick: int) -> float:
        """Stop the replica of a primary that is to be lost, and end its connection to it: what
        the primary sent would otherwise be read from the socket when the replica continues."""
        self._old_primary = self._primary(pick)
        self._stopped = self._replica_of(self._old_primary)
        since_s = time.monotonic() - LAG_S
        self._away = {self._old_primary, self._stopped}
        self._stopped.pause()
        pid = self._stopped._process.pid
        self._loop.call_soon_threadsafe(self._cut_off, self._old_primary, pid)
        return since_s

    def roll_back(self, since_s: float) -> Loss:
        """Kill the primary, continue its replica, which is promoted with the data it had."""
        killed_s = time.monotonic()
        self._old_primary.kill()
        ended_s = time.monotonic()
        replica = self._stopped
        replica.resume()
        until(lambda: _role(replica) == "master", "the promotion", SERVES_S)
        self._old_primary.start()
        self._wait_until_whole()
        return Loss("lossy failover", since_s, killed_s, ended_s, time.monotonic())

    def _cut_off(self, primary: ClusterNode, pid: int) -> None:
        """End a process's connections to a node."""
        proxy = self.proxies[self._cluster.nodes.index(primary)]
        for connection in list(proxy.connections):
            if _has(pid, connection):
                connection.abort()

    def _wait_until_whole(self) -> None:
        until(self._is_whole, "a whole cluster", SERVES_S)
        self._away = set()

    def _loss_once_whole(self, what: str, struck_s: float) -> Loss | None:
        until_s = time.monotonic() + STALE_S
        self._wait_until_whole()
        if self._strict:
            return None
        return Loss(what, struck_s - LAG_S, struck_s, until_s, time.monotonic())

    def _is_whole(self) -> bool:
        try:
            self._cluster.wait_until_synced()
        except (AssertionError, *ERRORS):
            return False
        return True

    def _primary(self, pick: int) -> ClusterNode:
        primaries = [node for node in self._cluster.nodes if _role(node) == "master"]
        return primaries[pick % len(primaries)]

    def _replica_of(self, primary: ClusterNode) -> ClusterNode:
        name = primary.name
        for node in self._cluster.nodes:
            if node is not primary:
                line = next(
                    line
                    for line in node.ask("CLUSTER", "NODES").decode().splitlines()
                    if "myself" in line
                )
                if line.split()[3] == name:
                    return node
        raise AssertionError(f"node {primary.port} has no replica")

    @staticmethod
    def _to(node: ClusterNode) -> Any:
        target: Target = ("127.0.0.1", node.port)
        return lambda: target


def _role(node: ClusterNode) -> str:
    try:
        return str(node.facts("replication")["role"])
    except ERRORS:
        return ""


def _has(pid: int | None, connection: Connection) -> bool:
    """Whether a process has the other end of a connection."""
    if pid is None:
        return False
    port = connection.front.get_extra_info("peername")[1]
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(each.laddr and each.laddr.port == port for each in connections)
