"""The stores under test, as things that break: real servers, reached as the service's users do.

Calls block; the injector runs them in threads. They return when the store serves again. Those that
inject a fault take `pick`, which chooses a server, and `seconds`, and return the moments between
which acknowledged chunks may have been rolled back, if any.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import redis

from service.core.values import StreamKey
from service.store.keys import KeySpace
from tests.faults.history import Loss
from tests.faults.network import MODEL
from tests.faults.traffic import FaultProxy, Traffic
from tests.support.cluster import PRIMARIES, Cluster, ClusterNode
from tests.support.proxy import Connection, Target
from tests.support.servers import RealServer, until
from tests.support.service import Service

WORKERS: Final = ("a", "b")
SERVES_S: Final = 60.0
DOWN_S: Final = 0.2
LATE_WRITES_S: Final = 30.0
"""With `everysec` a server postpones writes to its file while a sync is in progress, for up to two
seconds, and for longer if a busy machine suspends it: a SIGKILL may take them."""
EXPIRY_S: Final = 5.0
LONGEST_EXPIRY_S: Final = 120.0  # it is tried again while the store is unavailable
PROMOTED_AFTER_S: Final = 0.6  # how long a primary is stopped until its replica is promoted
ERRORS: Final = (redis.RedisError, OSError, ValueError, KeyError, TypeError, psutil.Error)
"""While a server is down, or its record is incomplete."""
NO_REWRITE: Final = ("--auto-aof-rewrite-percentage", "0")
"""A rewrite would replace files while they are copied."""


class Store:
    """A store of one or several servers, and proxies to each: one for each of `owners`, names of
    processes. Without a name, the owner of each connection is looked up, which takes milliseconds.
    """

    def __init__(
        self,
        servers: Sequence[RealServer],
        traffic: Traffic,
        owners: Sequence[str | None] = (None,),
    ):
        self.servers = servers
        self.proxies = [
            FaultProxy(partial(_address, server), traffic.watch_store, owner)
            for server in servers
            for owner in owners
        ]
        self._down: list[RealServer] = []
        self._loop = asyncio.get_running_loop()

    def ask(self, *command: str | int) -> Any:
        """The reply to a command, past the proxies."""
        for server in self.servers:
            if server not in self._down:
                with contextlib.suppress(redis.exceptions.MovedError), server.client() as client:
                    return client.execute_command(*command)
        raise OSError("no server that serves has the key")

    def expire(self, stream: str) -> None:
        """Let a stream's keys expire now; returns when they have expired."""
        pair = KeySpace("carry", 1024).pair(StreamKey(MODEL, stream))

        def has_expired() -> bool:
            try:
                for key in pair:
                    self.ask("PEXPIRE", key, 1)
                until(lambda: not self.ask("EXISTS", *pair), "the expiry", EXPIRY_S)
            except (*ERRORS, AssertionError):
                # unavailable, or a failover has lost it
                return False
            return True

        until(has_expired, f"the expiry of {stream}", LONGEST_EXPIRY_S, 0.05)

    def kill(self, pick: int, _: float) -> Loss | None:
        """Kill a server; a primary comes back before its replica would be promoted."""
        server = self._choose(pick)
        since_s, struck_s = self._find_safe_moment(), time.monotonic()
        server.kill()
        time.sleep(DOWN_S)
        server.start()
        return self._find_loss("killed", since_s, struck_s)

    def _abort_connections(self, server: RealServer, replica: int) -> None:
        """End the connections of a replica's process to a server: what was sent would otherwise be
        read from the socket when the replica continues."""
        for connection in list(self.proxies[self.servers.index(server)].connections):
            if has_connection(replica, connection):
                self._loop.call_soon_threadsafe(connection.abort)

    def fill(self, _: int, seconds: float) -> None:
        """Keep the memory of all servers full for a while."""
        for size in (1, 0):
            for server in self.servers:
                server.configure("maxmemory", size)
            time.sleep(seconds * size)


class EmbeddedValkey(RealServer):
    """The Valkey of one `carry serve`, which starts it again after a kill."""

    def __init__(self, folder: Path, models: Path, settings: dict[str, str]):
        self.kind, self.owner = "valkey", Service(folder, models)
        self.folder = self.owner.data_dir
        self._settings = settings
        self._killed = 0
        self._configured = {}

    @property
    def socket(self) -> str:
        return str(json.loads((self.folder / "valkey.json").read_text())["socket"])

    @property
    def _process(self) -> psutil.Process:
        return psutil.Process(self.owner.valkey_pid())

    def kill(self) -> None:
        self._killed = self._process.pid
        os.kill(self._killed, signal.SIGKILL)

    def start(self) -> None:
        if self.owner.process is None or self.owner.ended():
            self.owner.start(**self._settings)
        until(self._is_back, "the Valkey", SERVES_S)
        self.configure(NO_REWRITE[0][2:], 0)

    def stop(self) -> None:
        if self.owner.process is not None and not self.owner.ended():
            self.owner.stop()
        elif self.owner.process is not None:
            with contextlib.suppress(*ERRORS):
                self._process.kill()

    def _is_back(self) -> bool:
        with contextlib.suppress(*ERRORS):
            return self._process.pid != self._killed and self.answers()
        return False


class SingleStore(Store):
    """One server on a unix socket.

    `redis-server` writes each command to its file before it answers: a kill loses nothing. The
    embedded Valkey postpones writes while a sync is in progress, for up to two seconds.
    """

    def __init__(self, server: RealServer, traffic: Traffic):
        super().__init__([server], traffic, WORKERS)
        self.server, self.start, self.stop = server, server.start, server.stop
        self._file, self._copy = server.folder / "appendonlydir", server.folder / "copy"

    def url_for(self, worker: str) -> str:
        """The address for a worker."""
        return f"redis://127.0.0.1:{self.proxies[WORKERS.index(worker)].port}"

    def pause(self, _: int, seconds: float) -> None:
        """Stop the server."""
        with suspension(self.server.signal):
            time.sleep(seconds)

    def prepare_rollback(self, _: int) -> float:
        """Copy the append-only file; the moment before which nothing can be lost. The server keeps
        writing: the copy is a prefix of the file, as a crash would leave it."""

        def written_s() -> float:
            asked_s = time.monotonic()
            is_written = self.ask("INFO", "persistence")["aof_buffer_length"] == 0
            return asked_s if is_written else 0.0

        asked_s: float = until(written_s, "a written file", poll_s=0)
        shutil.copytree(self._file, self._copy)
        return asked_s

    def roll_back(self, since_s: float) -> Loss:
        """End the server, put the copy back, start it."""
        struck_s = time.monotonic()
        self.stop()
        ended_s = time.monotonic()
        shutil.rmtree(self._file)
        self._copy.rename(self._file)
        self.start()
        return Loss("rolled back", since_s, struck_s, ended_s)

    def kill_owner(self, _: int, __: float) -> None:
        """Kill the service that holds the Valkey, which keeps running; the next takes it over."""
        self.server.owner.kill()
        time.sleep(DOWN_S)
        self.start()

    def terminate_owner(self, _: int, __: float) -> None:
        """Terminate the service that holds the Valkey, which ends too."""
        self.stop()
        self.start()

    def _choose(self, _: int) -> RealServer:
        return self.server

    def _find_safe_moment(self) -> float:
        asked_s = time.monotonic()
        is_written = self.ask("INFO", "persistence")["aof_buffer_length"] == 0
        return asked_s if is_written else asked_s - LATE_WRITES_S

    def _find_loss(self, what: str, since_s: float, struck_s: float) -> Loss | None:
        return None if self.server.kind == "redis" else Loss(what, since_s, struck_s)


class ReplicatedStore(Store):
    """Primaries and replicas: a replica is promoted where its primary is down, and may lack the
    last writes."""

    def pause(self, pick: int, seconds: float) -> Loss | None:
        """Stop a server; where that is a primary, and for long, its replica is promoted."""
        server = self._choose(pick)
        replica = self._replica_of(server) if server.is_primary() else None
        since_s, struck_s = self._find_safe_moment(), time.monotonic()
        with suspension(server.signal):
            time.sleep(seconds)
            if replica is not None and seconds >= PROMOTED_AFTER_S:
                self._promote(replica)
        return self._find_loss("stopped", since_s, struck_s)

    def fail_over(self, pick: int, _: float) -> Loss | None:
        """Kill a primary until its replica is promoted; it comes back as a replica."""
        primary = self._choose_primary(pick)
        replica = self._replica_of(primary)
        since_s, struck_s = self._find_safe_moment(), time.monotonic()
        primary.kill()
        self._promote(replica)
        primary.start()
        return self._find_loss("lost", since_s, struck_s)

    def prepare_rollback(self, pick: int) -> float:
        """Stop the replica of a primary that is to be lost, and end its connection to it."""
        primary = self._choose_primary(pick)
        replica, since_s = self._replica_of(primary), self._find_safe_moment()
        self._down = [primary, replica]
        replica.pause()
        self._abort_connections(primary, replica.pid)
        return since_s

    def roll_back(self, since_s: float) -> Loss:
        """Kill the primary, continue its replica, which is promoted with the data it had."""
        primary, replica = self._down
        struck_s = time.monotonic()
        primary.kill()
        ended_s = time.monotonic()
        replica.resume()
        self._promote(replica)
        primary.start()
        self._wait_until_whole()
        return self._find_rollback(since_s, struck_s, ended_s)

    def _find_safe_moment(self) -> float:
        """The moment until which the replicas have all that was acknowledged."""
        since_s = time.monotonic()
        for primary in [server for server in self.servers if server.is_primary()]:
            has_all = partial(self._replica_of(primary).has_in_file, primary.replication_offset())
            until(has_all, "a replica in step", SERVES_S)
        return since_s

    def _find_rollback(self, since_s: float, struck_s: float, ended_s: float) -> Loss:
        return Loss("lossy failover", since_s, struck_s, ended_s)


class ClusterStore(ReplicatedStore):
    """Three primaries and their replicas.

    Its nodes promote a replica by command alone: a busy machine suspends a primary for longer than
    a short node timeout, and a failover that no fault caused is no fault.

    Every node announces the port of a proxy instead of its own, so all that workers ask of it
    passes there. Replicas follow their primaries through the proxies too.

    Replication is asynchronous: every fault that may cause a promotion may lose the last writes.
    With `replicated` durability a chunk is acknowledged only when the replica has it: then only a
    promotion of a replica that was stopped could lose any, and such a chunk was not acknowledged.
    """

    def __init__(self, folder: Path, traffic: Traffic, *, strict: bool):
        self._cluster = Cluster("valkey", folder, NO_REWRITE)
        super().__init__(self._cluster.nodes, traffic)
        self._strict = strict
        self.stop = self._cluster.stop

    def url_for(self, _: str) -> str:
        """The address for workers."""
        addresses = (f"127.0.0.1:{proxy.port}" for proxy in self.proxies[:PRIMARIES])
        return f"redis+cluster://{','.join(addresses)}"

    def start(self) -> None:
        for node, proxy in zip(self.servers, self.proxies, strict=True):
            node.options = (*node.options, "--cluster-announce-port", str(proxy.port))
        self._cluster.form_stable()

    def _choose(self, pick: int) -> ClusterNode:
        """A primary that is about to be down."""
        primaries = [node for node in self.servers if node.is_primary()]
        self._down = [primaries[pick % len(primaries)]]
        return self._down[0]

    _choose_primary = _choose

    def _replica_of(self, primary: ClusterNode) -> ClusterNode:
        return self._cluster.replica_of(primary)

    def _promote(self, replica: RealServer) -> None:
        self._cluster.promote(replica)

    def _find_loss(self, what: str, since_s: float, struck_s: float) -> Loss | None:
        self._wait_until_whole()
        return None if self._strict else Loss(f"a primary was {what}", since_s, struck_s)

    def _wait_until_whole(self) -> None:
        def is_whole() -> bool:
            with contextlib.suppress(AssertionError, *ERRORS):
                self._cluster.wait_until_synced()
                return True
            return False

        until(is_whole, "a whole cluster", SERVES_S)
        self._down = []


@contextmanager
def suspension(send_signal: Callable[[int], None]) -> Iterator[None]:
    """Stop a process, and continue it afterwards."""
    send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        send_signal(signal.SIGCONT)


def has_connection(pid: int | None, connection: Connection) -> bool:
    """Whether a process has the other end of a connection."""
    port = connection.front.get_extra_info("peername")[1]
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections(kind="tcp4")
        return any(each.laddr and each.laddr.port == port for each in connections)
    return False


def _address(server: RealServer) -> Target:
    return ("127.0.0.1", server.port) if isinstance(server, ClusterNode) else server.socket
