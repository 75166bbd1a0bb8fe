"""Consumers of a run, as processes that a supervisor starts again, and their store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode as NodeAddress
from redis.retry import Retry

from tests.faults.stores import ERRORS, NO_REWRITE
from tests.support.cluster import Cluster, ClusterNode
from tests.support.forks import COMMAND, Fork
from tests.support.servers import RealServer, until

SERVES_S: Final = 60.0
DOWN_S: Final = 0.2
STOP_S: Final = 60.0
ASKED_S: Final = 1.0
GROWTH_BYTES: Final = 64 << 20
"""A file is rewritten between faults after it has doubled and grown by this."""


class ConsumerProcess:
    """One `carry consume`, which a supervisor starts again whenever it has ended."""

    def __init__(self, name: str, folder: Path, words: list[str], settings: dict[str, str]):
        self.name, self._log = name, folder / f"{name}.log"
        self._command = [COMMAND, "consume", *words]
        inherited = {key: value for key, value in os.environ.items() if key[:6] != "CARRY_"}
        self._environment = {**inherited, **settings}
        self._process: Fork | None = None
        self.is_wanted = True

    def supervise(self) -> None:
        """Start the process if it has ended and is wanted."""
        if self.is_wanted and (self._process is None or self._process.poll() is not None):
            with self._log.open("ab") as output:
                self._process = Fork(self._command, self._environment, [output] * 3)

    def pid(self) -> int | None:
        """The process, if one was started."""
        return self._process and self._process.pid

    def signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, and wait for its end; the supervisor may start the next one meanwhile."""
        if (process := self._process) is not None:
            process.kill()
            process.wait()

    def terminate(self) -> bool:
        """Terminate it; whether it ended in time."""
        if (process := self._process) is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return False
        return True

    def lines(self, word: str) -> list[str]:
        """The lines of its log that contain a word."""
        text = self._log.read_text() if self._log.exists() else ""
        return [line for line in text.splitlines() if word in line]


class ServerStore:
    """One server on a unix socket, with an append-only file: a kill loses nothing."""

    may_lose_writes = False

    def __init__(self, kind: str, folder: Path):
        self.server = RealServer(kind, folder, *NO_REWRITE)
        self.servers = [self.server]
        self.url = self.server.url
        self._files, self._copy = folder / "appendonlydir", folder / "copy"
        self._appended = AppendOnlyFiles(self.servers)

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def connect(self) -> Any:
        """A client of the store."""
        return self.server.client()

    def choose(self, _: int) -> RealServer:
        """The server that is to break."""
        return self.server

    def count_failovers(self) -> int:
        """How many failovers there were."""
        return 0

    def wait_until_whole(self) -> None:
        """Wait until the store serves, and its file is short."""
        until(self.server.answers, "the store", SERVES_S)
        self._appended.wait_until_short()

    def prepare_rollback(self, _: int) -> None:
        """Copy the files: a prefix of what they hold in the end, as a crash would leave it."""
        until(lambda: self.server.ask("INFO", "persistence")["aof_buffer_length"] == 0, "a write")
        shutil.copytree(self._files, self._copy)

    def roll_back(self) -> None:
        """Kill the server, put the copy back, and start it."""
        self.server.kill()
        shutil.rmtree(self._files)
        self._copy.rename(self._files)
        self.server.start()


class ClusterStore:
    """Three primaries and their replicas: a replica that is promoted may lack the last writes."""

    may_lose_writes = True

    def __init__(self, _: str, folder: Path):
        self._cluster = Cluster("valkey", folder, NO_REWRITE)
        self.servers, self.url = self._cluster.nodes, self._cluster.url
        self.start, self.stop = self._cluster.form, self._cluster.stop
        self._appended = AppendOnlyFiles(self.servers)

    def connect(self) -> Any:
        """A client of the store."""
        nodes = [NodeAddress("127.0.0.1", node.port) for node in self.servers]
        retry = Retry(NoBackoff(), 0)
        return redis.RedisCluster(startup_nodes=nodes, protocol=2, socket_timeout=10, retry=retry)

    def choose(self, pick: int) -> ClusterNode:
        """The primary that is to break."""
        primaries = [node for node in self.servers if node.is_primary()]
        return primaries[pick % len(primaries)]

    def count_failovers(self) -> int | None:
        """A number that grows with each failover; None while no node tells it."""
        for node in self.servers:
            with suppress(*ERRORS), redis.Redis(port=node.port, socket_timeout=ASKED_S) as client:
                return int(client.cluster("INFO")["cluster_current_epoch"])
        return None

    def wait_until_whole(self) -> None:
        """Wait until every replica is in sync, and all files are short."""

        def is_whole() -> bool:
            with suppress(AssertionError, *ERRORS):
                self._cluster.wait_until_synced()
                return True
            return False

        until(is_whole, "a whole cluster", 2 * SERVES_S)
        self._appended.wait_until_short()

    def fail_over(self, pick: int) -> None:
        """Kill a primary until its replica is promoted."""
        primary = self.choose(pick)
        replica = self._cluster.replica_of(primary)
        primary.kill()
        until(replica.is_primary, "the promotion", SERVES_S)
        primary.start()

    def prepare_rollback(self, pick: int) -> None:
        """Stop the replica of a primary that is to be lost."""
        primary = self.choose(pick)
        replica = self._cluster.replica_of(primary)
        self._broken = primary, replica
        replica.pause()
        # its process would read from the socket what was sent meanwhile
        primary.ask("CLIENT", "KILL", "TYPE", "replica")

    def roll_back(self) -> None:
        """Kill the primary: its replica is promoted with what it had."""
        primary, replica = self._broken
        primary.kill()
        replica.resume()
        until(replica.is_primary, "the promotion", SERVES_S)
        primary.start()


class AppendOnlyFiles:
    """The append-only files of servers, which read all of them when they start.

    Most of a file is states that were overwritten since. And a node that was in sync with another
    primary has its data in no file until it has rewritten it: a kill before would lose all of it.
    """

    def __init__(self, servers: Sequence[RealServer]):
        self._servers = servers
        self._rewritten_bytes = dict.fromkeys(servers, 0)

    def wait_until_short(self) -> None:
        """Rewrite those that are long; wait until none is being rewritten."""
        for server in self._servers:
            until(partial(self._is_short, server), "a short file", SERVES_S, 0.05)

    def _is_short(self, server: RealServer) -> bool:
        with suppress(*ERRORS):
            facts = server.ask("INFO", "persistence")
            if facts["aof_rewrite_in_progress"] or facts["aof_rewrite_scheduled"]:
                self._rewritten_bytes[server] = 0
                return False
            size = int(facts["aof_current_size"])
            least = self._rewritten_bytes[server] or size
            self._rewritten_bytes[server] = least
            if size < 2 * least + GROWTH_BYTES:
                return True
            server.ask("BGREWRITEAOF")
        return False


def suspend(send_signal: Callable[[int], None], seconds: float) -> None:
    """Stop a process for a while."""
    send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    send_signal(signal.SIGCONT)
