"""A store behind Sentinels, which fail it over, as a thing that breaks."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from tests.faults.history import Loss
from tests.faults.stores import DOWN_S, NO_REWRITE, SERVES_S, ReplicatedStore
from tests.faults.traffic import Traffic
from tests.support.sentinels import NAME, Sentinel, has_replica
from tests.support.servers import RealServer, until


class MonitoredServer(RealServer):
    """A server with a file of its configuration, which Sentinels rewrite: it restarts in the role
    that it had."""

    announced_port: int

    def arguments(self) -> Sequence[str]:
        file = self.folder / "server.conf"
        if not file.exists():
            arguments = [*super().arguments(), *NO_REWRITE, "--repl-diskless-sync-delay", "0"]
            arguments += ["--replica-announce-ip", "127.0.0.1"]
            arguments += ["--replica-announce-port", str(self.announced_port)]
            pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
            file.write_text("".join(f'{name[2:]} "{value}"\n' for name, value in pairs.items()))
        return [str(file)]


class SentinelStore(ReplicatedStore):
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
        folders = [folder / f"sentinel-{number}" for number in range(3)]
        for each in folders:
            each.mkdir()
        self._sentinels = [Sentinel("valkey", each) for each in folders]

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
            sentinel.monitor(primary.announced_port, 2)
            sentinel.start()
        self._wait_until_whole()

    def stop(self) -> None:
        for process in (*self._sentinels, *self.servers):
            process.stop()

    def ask(self, *command: str | int) -> Any:
        """The primary's reply to a command, past the proxies."""
        with self._primary().client() as client:
            return client.execute_command(*command)

    def _find_rollback(self, since_s: float, struck_s: float, ended_s: float) -> Loss:
        # the primary that was killed acts as one until the Sentinels demote it
        return Loss("lost before its replica followed", since_s, since_s)

    def _promote(self, replica: RealServer) -> None:
        until(lambda: self._sentinels[0].fails_over_to(replica), "the promotion", SERVES_S, 0.1)

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

    def _choose_primary(self, _: int) -> MonitoredServer:
        return self._primary()

    def _replica_of(self, primary: MonitoredServer) -> MonitoredServer:
        return next(server for server in self.servers if server is not primary)

    def _choose(self, pick: int) -> MonitoredServer:
        return self.servers[pick % len(self.servers)]

    def _find_loss(self, what: str, since_s: float, struck_s: float) -> Loss:
        self._wait_until_whole()
        return Loss(f"a server was {what}", since_s, struck_s)

    def _wait_until_whole(self) -> None:
        """Wait until one server follows the other, and all Sentinels know both."""

        def is_whole() -> bool:
            primaries = [server for server in self.servers if server.is_primary()]
            return (
                len(primaries) == 1
                and has_replica(primaries[0])
                and all(server.has_complete_file() for server in self.servers)
                and all(_knows(each, primaries[0].announced_port) for each in self._sentinels)
            )

        until(is_whole, "a primary with a replica", SERVES_S)
        self._down = []


def _knows(sentinel: Sentinel, primary_port: int) -> bool:
    """Whether a Sentinel names this primary and has a replica of it that is up."""
    try:
        return sentinel.primary_port() == primary_port and sentinel.knows_replica()
    except redis.RedisError:
        return False
