"""A primary with a replica, both monitored by a Sentinel, on the loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.store.embedded import server_binary
from tests.support.servers import RealServer, free_port, real_server, until

NAME = "main"
PASSWORD = "of-the-sentinels"
DOWN_AFTER_MS = 1000
"""How long a server may be silent before a failover; a busy machine suspends a process for less."""


class Monitored:
    """Two servers and their Sentinel.

    Attributes:
        primary, replica: the servers' roles at the start.
        sentinel: the process of the Sentinel.
        url: names a Sentinel that does not run before the one that does.
    """

    def __init__(
        self,
        primary: RealServer,
        replica: RealServer,
        replica_port: int,
        port: int,
        sentinel: subprocess.Popen[bytes],
    ):
        self.primary, self.replica, self.sentinel = primary, replica, sentinel
        self.replica_port, self._port = replica_port, port
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{port}"
        self.url = f"redis+sentinel://{hosts}/{NAME}/0?sentinel_password={PASSWORD}"

    def ask(self, *command: Any) -> Any:
        """The Sentinel's reply to a command."""
        options: dict[str, Any] = {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
        with redis.Redis(port=self._port, password=PASSWORD, **options) as client:
            return client.execute_command(*command)

    def answers(self) -> bool:
        """Whether the Sentinel answers."""
        try:
            return bool(self.ask("PING"))
        except redis.RedisError:
            return False

    def is_whole(self) -> bool:
        """Whether the Sentinel knows the replica, which follows the primary."""
        replicas = self.ask("SENTINEL", "REPLICAS", NAME)
        return len(replicas) == 1 and b"ok" in replicas[0] and has_replica(self.primary)

    def has_failed_over(self) -> bool:
        """Whether the Sentinel names the server that was the replica at the start."""
        _, port = self.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
        return int(port) == self.replica_port


def has_replica(server: RealServer) -> bool:
    """Whether a replica has a write of the server."""
    try:
        with server.client() as client:
            client.set("probe", "written")
            return bool(client.wait(1, 1000))
    except redis.RedisError:
        return False


def write_configuration(
    folder: Path,
    port: int,
    primary_port: int,
    password: str = "",
    quorum: int = 1,
    down_after_ms: int = DOWN_AFTER_MS,
) -> None:
    """Write the configuration of a Sentinel, which stores there what it learns."""
    (folder / "sentinel.conf").write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/sentinel.log\n"
        + (f"requirepass {password}\n" if password else "")
        + f"sentinel monitor {NAME} 127.0.0.1 {primary_port} {quorum}\n"
        f"sentinel down-after-milliseconds {NAME} {down_after_ms}\n"
        f"sentinel failover-timeout {NAME} 4000\n"
    )


def start_sentinel(binary: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the Sentinel whose configuration is in a folder."""
    return subprocess.Popen(
        [binary, str(folder / "sentinel.conf"), "--sentinel"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"LC_ALL": "C", "PATH": os.defpath},
    )


@contextmanager
def monitored(kind: str, *options: str) -> Iterator[Monitored]:
    """Run the servers, the primary with further options, and the Sentinel; stop them afterwards."""
    binary = str(server_binary()) if kind == "valkey" else shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not on the PATH")
    port, replica_port, sentinel_port = free_port(), free_port(), free_port()
    common = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")
    of = ("--replicaof", f"127.0.0.1 {port}", "--port", str(replica_port))
    with (
        real_server(kind, *common, "--port", str(port), *options) as primary,
        real_server(kind, *common, *of) as replica,
    ):
        write_configuration(primary.folder, sentinel_port, port, PASSWORD)
        process = start_sentinel(binary, primary.folder)
        running = Monitored(primary, replica, replica_port, sentinel_port, process)
        try:
            until(running.answers, "the Sentinel")
            until(running.is_whole, "a monitored replica")
            yield running
        finally:
            process.kill()
            process.wait()
