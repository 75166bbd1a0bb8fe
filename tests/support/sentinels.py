"""A primary with a replica, both monitored by Sentinels, on the loopback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.servers import RealServer, free_port, real_server, until

NAME = "main"
PASSWORD = "of-the-sentinels"
DOWN_AFTER_MS = 60_000
"""How long a server may be silent before a failover. Tests fail over by command: a busy machine
suspends a process for seconds, and a failover that no test caused loses what it wrote."""


class Sentinel(RealServer):
    """One Sentinel, whose file of configuration holds what it learns."""

    def __init__(self, kind: str, folder: Path, password: str = ""):
        super().__init__(kind, folder)
        self.port, self._password = free_port(), password

    def monitor(self, port: int, quorum: int = 1) -> None:
        """Write the configuration, with the port of the primary; before the first start."""
        (self.folder / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"logfile {self.folder}/sentinel.log\n"
            + (f"requirepass {self._password}\n" if self._password else "")
            + f"sentinel monitor {NAME} 127.0.0.1 {port} {quorum}\n"
            f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {NAME} 4000\n"
        )

    def arguments(self) -> Sequence[str]:
        return [str(self.folder / "sentinel.conf"), "--sentinel"]

    def client(self) -> redis.Redis:
        """A client of this Sentinel."""
        retry = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.port, password=self._password, protocol=2, retry=retry)

    def primary_port(self) -> int:
        """The port of the server that it names as the primary."""
        return int(self.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)[1])

    def fails_over_to(self, replica: RealServer) -> bool:
        """Whether the server is a primary; otherwise start a failover, unless one is running. The
        Sentinel abandons one if a busy machine suspends the server for long."""
        if replica.is_primary():
            return True
        with suppress(redis.RedisError):
            self.ask("SENTINEL", "FAILOVER", NAME)
        return False

    def knows_replica(self) -> bool:
        """Whether it knows one replica, which is up."""
        replicas = self.ask("SENTINEL", "REPLICAS", NAME)
        return len(replicas) == 1 and b"ok" in replicas[0]


class Monitored:
    """Two servers and their Sentinel.

    Attributes:
        primary, replica: the servers' roles at the start.
        url: names a Sentinel that does not run before the one that does.
    """

    def __init__(
        self, primary: RealServer, replica: RealServer, replica_port: int, sentinel: Sentinel
    ):
        self.primary, self.replica, self.sentinel = primary, replica, sentinel
        self.replica_port = replica_port
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}"
        self.url = f"redis+sentinel://{hosts}/{NAME}/0?sentinel_password={PASSWORD}"

    def is_whole(self) -> bool:
        """Whether the Sentinel knows the replica, which follows the primary."""
        return self.sentinel.knows_replica() and has_replica(self.primary)

    def has_failed_over(self) -> bool:
        """Whether the Sentinel names the server that was the replica at the start."""
        return self.sentinel.primary_port() == self.replica_port

    def fail_over(self) -> None:
        """Make the Sentinel promote the replica, as if the primary were down."""
        until(lambda: self.sentinel.fails_over_to(self.replica), "the promotion", poll_s=0.1)
        until(self.has_failed_over, "the Sentinel's answer")


def has_replica(server: RealServer) -> bool:
    """Whether a replica has a write of the server."""
    try:
        with server.client() as client:
            client.set("probe", "written")
            return bool(client.wait(1, 1000))
    except redis.RedisError:
        return False


@contextmanager
def monitored(kind: str, *options: str) -> Iterator[Monitored]:
    """Run the servers, the primary with further options, and the Sentinel; stop them afterwards."""
    port, replica_port = free_port(), free_port()
    common = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")
    of = ("--replicaof", f"127.0.0.1 {port}", "--port", str(replica_port))
    with (
        real_server(kind, *common, "--port", str(port), *options) as primary,
        real_server(kind, *common, *of) as replica,
    ):
        sentinel = Sentinel(kind, primary.folder, PASSWORD)
        sentinel.monitor(port)
        running = Monitored(primary, replica, replica_port, sentinel)
        try:
            sentinel.start()
            until(running.is_whole, "a monitored replica")
            yield running
        finally:
            sentinel.stop()
