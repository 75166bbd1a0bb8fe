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
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import redis

from service.core.values import StreamKey
from service.store.embedded.valkey_process import server_arguments, server_binary
from service.store.keys import KeySpace
from tests.faults.history import Loss
from tests.faults.network import MODEL
from tests.faults.traffic import FaultProxy, Traffic
from tests.support.cluster import PRIMARIES, Cluster, ClusterNode
from tests.support.proxy import Connection, Target
from tests.support.sentinels import NAME, has_replica, start_sentinel, write_configuration
from tests.support.servers import RealServer, free_port, until
from tests.support.service import Service

WORKERS: Final = ("a", "b")
SERVES_S: Final = 60.0
DOWN_S: Final = 0.2
LATE_WRITES_S: Final = 3.0
"""With `everysec` a server postpones writes to its file while a sync is in progress, for up to two
seconds: a SIGKILL may take them."""
EXPIRY_S: Final = 5.0
SENTINEL_DOWN_AFTER_MS: Final = 4000
"""Longer than a busy machine suspends the proxies: a failover that no fault caused is no fault."""
LAG_S: Final = 0.5  # how far a replica that runs may be behind its primary
STALE_S: Final = 3.0
"""How long a primary that was stopped may act as one before it learns of the promotion."""
_ERRORS: Final = (redis.RedisError, OSError, ValueError, KeyError, TypeError, psutil.Error)
"""While a server is down, or its record is incomplete."""
_NO_REWRITE: Final = ("--auto-aof-rewrite-percentage", "0")
"""A rewrite would replace files while they are copied."""


class Store:
    """A store of one or several servers, and proxies to each: one for each of `owners`, names of
    processes. Without a name, the owner of each connection is looked up, which takes milliseconds.
    """

    def __init__(
        self,
        servers: Sequence[RealServer | ClusterNode],
        traffic: Traffic,
        owners: Sequence[str | None] = (None,),
    ):
        self.servers = servers
        self.proxies = [
            FaultProxy(partial(_address, server), traffic.watch_store, owner)
            for server in servers
            for owner in owners
        ]
        self._down: list[RealServer | ClusterNode] = []
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
        while True:
            try:
                for key in pair:
                    self.ask("PEXPIRE", key, 1)
                until(lambda: not self.ask("EXISTS", *pair), "the expiry", EXPIRY_S)
                return
            except (*_ERRORS, AssertionError):
                # unavailable, or a failover has lost it
                time.sleep(0.05)

    def kill(self, pick: int, _: float) -> Loss | None:
        """Kill a server; a primary is down for less than it takes to be voted out, mostly."""
        server, struck_s = self._choose(pick), time.monotonic()
        server.kill()
        time.sleep(DOWN_S)
        server.start()
        return self._find_loss("killed", struck_s)

    def pause(self, pick: int, seconds: float) -> Loss | None:
        """Stop a server; where that is a primary, and for long, its replica is promoted."""
        server, struck_s = self._choose(pick), time.monotonic()
        with suspension(server._process):
            time.sleep(seconds)
        return self._find_loss("stopped", struck_s)

    def _abort_connections(self, server: RealServer | ClusterNode, replica: int) -> None:
        """End the connections of a replica's process to a server: what was sent would otherwise be
        read from the socket when the replica continues."""
        for connection in list(self.proxies[self.servers.index(server)].connections):
            if has_connection(replica, connection):
                self._loop.call_soon_threadsafe(connection.abort)

    def fill(self, _: int, seconds: float) -> None:
        """Keep the memory of all servers full for a while."""
        for size in (1, 0):
            for server in self.servers:
                with server.client() as client:
                    client.config_set("maxmemory", size)
            time.sleep(seconds * size)


class EmbeddedValkey(RealServer):
    """The Valkey of one `carry serve`, which starts it again after a kill."""

    def __init__(self, folder: Path, models: Path, settings: dict[str, str]):
        self.kind, self.owner = "valkey", Service(folder, models)
        self.folder = self.owner.data_dir
        self._settings = settings
        self._killed = 0

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
        self.configure(_NO_REWRITE[0][2:], 0)

    def stop(self) -> None:
        if self.owner.process is not None and not self.owner.ended():
            self.owner.stop()
        elif self.owner.process is not None:
            with contextlib.suppress(*_ERRORS):
                self._process.kill()

    def _is_back(self) -> bool:
        with contextlib.suppress(*_ERRORS):
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

    def prepare_rollback(self, _: int) -> float:
        """Copy the append-only file; the moment before which nothing can be lost. The server keeps
        writing: the copy is a prefix of the file, as a crash would leave it."""
        while True:
            asked_s = time.monotonic()
            if self.ask("INFO", "persistence")["aof_buffer_length"] == 0:
                break
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

    def _find_loss(self, what: str, struck_s: float) -> Loss | None:
        if what != "killed" or self.server.kind == "redis":
            return None
        return Loss(what, struck_s - LATE_WRITES_S, struck_s)


class ClusterStore(Store):
    """Three primaries and their replicas.

    Every node announces the port of a proxy instead of its own, so all that workers ask of it
    passes there. Replicas follow their primaries through the proxies too.

    Replication is asynchronous: every fault that may cause a promotion may lose the last writes.
    With `replicated` durability a chunk is acknowledged only when the replica has it: then only a
    promotion of a replica that was stopped could lose any, and such a chunk was not acknowledged.
    """

    def __init__(self, folder: Path, traffic: Traffic, *, strict: bool):
        self._cluster = Cluster("valkey", folder, _NO_REWRITE)
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
        self._cluster.form()

    def fail_over(self, pick: int, _: float) -> Loss | None:
        """Kill a primary until its replica is promoted; it comes back as a replica."""
        node = self._choose(pick)
        replica, struck_s = self._cluster.replica_of(node), time.monotonic()
        node.kill()
        until(replica.is_primary, "the promotion", SERVES_S)
        node.start()
        return self._find_loss("lost", struck_s)

    def prepare_rollback(self, pick: int) -> float:
        """Stop the replica of a primary that is to be lost, and end its connection to it."""
        primary = self._choose(pick)
        replica = self._cluster.replica_of(primary)
        self._down = [primary, replica]
        since_s = time.monotonic() - LAG_S
        replica.pause()
        self._abort_connections(primary, replica._process.pid)
        return since_s

    def roll_back(self, since_s: float) -> Loss:
        """Kill the primary, continue its replica, which is promoted with the data it had."""
        primary, replica = self._down
        struck_s = time.monotonic()
        primary.kill()
        ended_s = time.monotonic()
        replica.resume()
        until(replica.is_primary, "the promotion", SERVES_S)
        primary.start()
        self._wait_until_whole()
        return Loss("lossy failover", since_s, struck_s, ended_s)

    def _choose(self, pick: int) -> ClusterNode:
        """A primary that is about to be down."""
        primaries = [node for node in self.servers if node.is_primary()]
        self._down = [primaries[pick % len(primaries)]]
        return self._down[0]

    def _find_loss(self, what: str, struck_s: float) -> Loss | None:
        until_s = time.monotonic() + STALE_S
        self._wait_until_whole()
        if self._strict:
            return None
        return Loss(f"a primary was {what}", struck_s - LAG_S, struck_s, until_s)

    def _wait_until_whole(self) -> None:
        def is_whole() -> bool:
            with contextlib.suppress(AssertionError, *_ERRORS):
                self._cluster.wait_until_synced()
                return True
            return False

        until(is_whole, "a whole cluster", SERVES_S)
        self._down = []


class MonitoredServer(RealServer):
    """A server with a file of its configuration, which Sentinels rewrite: it restarts in the role
    that it had."""

    announced_port: int

    def launch(self, *_: str) -> None:
        file = self.folder / "server.conf"
        if not file.exists():
            arguments = [*server_arguments(self.folder, self.socket, 0), *_NO_REWRITE]
            arguments += ["--appendfsync", "no", "--repl-diskless-sync-delay", "0"]
            arguments += ["--replica-announce-ip", "127.0.0.1"]
            arguments += ["--replica-announce-port", str(self.announced_port)]
            pairs = zip(arguments[::2], arguments[1::2], strict=True)
            file.write_text("".join(f'{name[2:]} "{value}"\n' for name, value in pairs))
        self._process = subprocess.Popen(
            [str(server_binary()), str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"LC_ALL": "C", "PATH": os.defpath},
            process_group=0,
        )

    def is_primary(self) -> bool:
        """Whether it reports the role of a primary."""
        with contextlib.suppress(*_ERRORS), self.client() as client:
            return bool(client.info("replication")["role"] == "master")
        return False


class SentinelStore(Store):
    """A primary and a replica behind three Sentinels.

    Sentinels name the ports of proxies instead of the servers' own, and the replica follows its
    primary through one. Replication is asynchronous, and a primary that comes back acts as one
    until the Sentinels demote it: every fault that may cause a promotion may lose what was
    acknowledged until the replica follows again.
    """

    servers: Sequence[MonitoredServer]

    def __init__(self, folder: Path, traffic: Traffic):
        servers = [MonitoredServer("valkey", folder / name) for name in ("x", "y")]
        for server in servers:
            server.folder.mkdir()
        super().__init__(servers, traffic)
        self._sentinels = [Sentinel(folder / f"sentinel-{number}") for number in range(3)]

    def url_for(self, _: str) -> str:
        """The address for workers."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self._sentinels)
        return f"redis+sentinel://{hosts}/{NAME}"

    def start(self) -> None:
        for server, proxy in zip(self.servers, self.proxies, strict=True):
            server.announced_port = proxy.port
            server.start()
        primary, replica = self.servers
        with replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", primary.announced_port)
            client.config_rewrite()
        for sentinel in self._sentinels:
            sentinel.start(primary.announced_port)
        self._wait_until_whole()

    def stop(self) -> None:
        for process in (*self._sentinels, *self.servers):
            process.stop()

    def ask(self, *command: str | int) -> Any:
        """The primary's reply to a command, past the proxies."""
        with self._primary().client() as client:
            return client.execute_command(*command)

    def fail_over(self, _: int, __: float) -> Loss:
        """Kill the primary until its replica is promoted; it comes back as a replica."""
        primary, struck_s = self._primary(), time.monotonic()
        primary.kill()
        until(self._replica_of(primary).is_primary, "the promotion", SERVES_S)
        primary.start()
        return self._find_loss("lost", struck_s)

    def prepare_rollback(self, _: int) -> float:
        """Stop the replica of the primary that is to be lost, and end its connection to it."""
        primary = self._primary()
        replica, since_s = self._replica_of(primary), time.monotonic() - LAG_S
        self._down = [primary]
        replica.signal(signal.SIGSTOP)
        self._abort_connections(primary, replica.pid)
        return since_s

    def roll_back(self, since_s: float) -> Loss:
        """Kill the primary, continue its replica, which is promoted with the data it had."""
        [primary] = self._down
        replica = self._replica_of(primary)
        primary.kill()
        replica.signal(signal.SIGCONT)
        until(replica.is_primary, "the promotion", SERVES_S)
        primary.start()
        return self._find_loss("lost before its replica followed", since_s + LAG_S)

    def stop_sentinels(self) -> None:
        """Kill all Sentinels, and restart the primary, so that its connections break."""
        for sentinel in self._sentinels:
            sentinel.stop()
        primary = self._primary()
        primary.kill()
        time.sleep(DOWN_S)
        primary.start()

    def start_sentinels(self) -> None:
        """Start the Sentinels again; returns when they know both servers."""
        for sentinel in self._sentinels:
            sentinel.start()
        self._wait_until_whole()

    def _primary(self) -> MonitoredServer:
        primaries = [server for server in self.servers if server.is_primary()]
        if len(primaries) != 1:
            raise OSError("expected one primary; after a failover there are two for a while")
        return primaries[0]

    def _replica_of(self, primary: MonitoredServer) -> MonitoredServer:
        return next(server for server in self.servers if server is not primary)

    def _choose(self, pick: int) -> MonitoredServer:
        return self.servers[pick % len(self.servers)]

    def _find_loss(self, what: str, struck_s: float) -> Loss:
        self._wait_until_whole()
        return Loss(f"a server was {what}", struck_s - LAG_S, struck_s, time.monotonic())

    def _wait_until_whole(self) -> None:
        """Wait until one server follows the other, and all Sentinels know both."""

        def is_whole() -> bool:
            primaries = [server for server in self.servers if server.is_primary()]
            return (
                len(primaries) == 1
                and has_replica(primaries[0])
                and all(each.knows(primaries[0].announced_port) for each in self._sentinels)
            )

        until(is_whole, "a primary with a replica", SERVES_S)
        self._down = []


class Sentinel:
    """One Sentinel, in a folder of its own."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder, self.port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, primary_port: int | None = None) -> None:
        """Start the process, for the first time with the primary that it is to monitor."""
        if primary_port is not None:
            write_configuration(
                self._folder,
                self.port,
                primary_port,
                quorum=2,
                down_after_ms=SENTINEL_DOWN_AFTER_MS,
            )
        self._process = start_sentinel(str(server_binary()), self._folder)

    def stop(self) -> None:
        """Kill the process, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def knows(self, primary_port: int) -> bool:
        """Whether it names this primary and has a replica of it that is up."""
        with contextlib.suppress(*_ERRORS), redis.Redis(port=self.port, protocol=2) as client:
            _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
            replicas = client.execute_command("SENTINEL", "REPLICAS", NAME)
            return int(port) == primary_port and len(replicas) == 1 and b"ok" in replicas[0]
        return False


Stores = SingleStore | ClusterStore | SentinelStore


def make_store(
    kind: str, folder: Path, models: Path, settings: dict[str, str], traffic: Traffic
) -> Stores:
    """The store of a run, in a folder; it is not started yet."""
    match kind:
        case "valkey":
            return SingleStore(EmbeddedValkey(folder, models, settings), traffic)
        case "redis":
            redis_server = RealServer("redis", folder, *_NO_REWRITE)
            return SingleStore(redis_server, traffic)
        case "sentinel":
            return SentinelStore(folder, traffic)
    return ClusterStore(folder, traffic, strict="CARRY_DURABILITY" in settings)


@contextmanager
def suspension(process: Any) -> Iterator[None]:
    """Stop a process, and continue it afterwards."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def has_connection(pid: int | None, connection: Connection) -> bool:
    """Whether a process has the other end of a connection."""
    port = connection.front.get_extra_info("peername")[1]
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections(kind="tcp4")
        return any(each.laddr and each.laddr.port == port for each in connections)
    return False


def _address(server: RealServer | ClusterNode) -> Target:
    return server.socket if isinstance(server, RealServer) else ("127.0.0.1", server.port)
