"""The stores under test as things that break: killed, stopped, filled, put back in time.

Real servers, started and reached as the service's users do: the embedded Valkey through a
`carry serve` of its own, a Redis with an append-only file; the cluster is in `cluster_store`.
Blocking calls; the injector runs them in threads. A fault that may roll back acknowledged chunks
returns between which moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.core.values import StreamKey
from service.store.codec import KeySpace
from tests.faults.network import MODEL
from tests.faults.proxy import Connection, Proxy, Target, Watcher
from tests.faults.records import Loss
from tests.support.servers import RealServer, until
from tests.support.service import Service

SERVES_S: Final = 60.0
LATE_WRITES_S: Final = 3.0
"""With `everysec` a server postpones writes to its file while a sync is in progress, for up to two
seconds: a SIGKILL may take them."""

DOWN_S: Final = 0.2
ONE_BYTE: Final = "1"
ERRORS: Final = (redis.RedisError, OSError, ValueError)


class HasPid(Protocol):
    """A worker, as far as a store looks at it."""

    @property
    def pid(self) -> int | None:
        """Its process."""


class Store(ABC):
    """A store and the proxies to it.

    `kill` kills a server and starts it some moments later, `pause` stops and continues one, `fill`
    keeps its memory full for a while. `prepare_rollback` returns the moment before which nothing
    can be lost, and `roll_back` sets the store back to it. All return when the store serves again,
    with the loss that they may have caused. `pick` chooses a server.
    """

    name: str

    def __init__(self, folder: Path):
        self.folder = folder
        self.keys = KeySpace("carry", 1024)
        self.proxies: list[Proxy] = []

    @abstractmethod
    async def open_proxies(
        self, watcher: Watcher, names: Sequence[str], workers: Mapping[str, HasPid]
    ) -> None:
        """Open the proxies for workers of these names, before the store is started.

        Args:
            workers: by name; filled later.
        """

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def url(self, worker: str) -> str: ...

    @abstractmethod
    def kill(self, pick: int) -> Loss | None: ...

    @abstractmethod
    def pause(self, seconds: float, pick: int) -> Loss | None: ...

    @abstractmethod
    def fill(self, seconds: float) -> None: ...

    @abstractmethod
    def prepare_rollback(self, pick: int) -> float: ...

    @abstractmethod
    def roll_back(self, since_s: float) -> Loss: ...

    @abstractmethod
    def ask(self, *command: str | int) -> Any:
        """The reply to a command about a stream's key, past the proxies."""

    def owner_of(self, connection: Connection) -> str:
        """The worker that made a connection; empty where none did."""
        return connection.proxy.owner

    def expire(self, stream: str) -> None:
        """Let a stream's keys expire now; returns when they have expired."""
        pair = self.keys.pair(StreamKey(MODEL, stream))
        while True:
            try:
                for key in pair:
                    self.ask("PEXPIRE", key, 1)
                until(lambda: not self.ask("EXISTS", *pair), "the expiry")
                return
            except ERRORS:
                time.sleep(0.05)


class SingleStore(Store):
    """A store with one server on a unix socket; each worker has a path of its own to it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._copy = folder

    @abstractmethod
    def target(self) -> Target | None:
        """Where the server listens now."""

    @abstractmethod
    def pid(self) -> int:
        """The server's process."""

    @abstractmethod
    def files(self) -> Path:
        """The folder of its append-only file."""

    @abstractmethod
    def end(self) -> None:
        """End the server so that it stays down."""

    async def open_proxies(
        self, watcher: Watcher, names: Sequence[str], workers: Mapping[str, HasPid]
    ) -> None:
        for worker in names:
            proxy = Proxy(self.target, watcher, worker)
            await proxy.open()
            self.proxies.append(proxy)

    def url(self, worker: str) -> str:
        proxy = next(proxy for proxy in self.proxies if proxy.owner == worker)
        return f"redis://127.0.0.1:{proxy.port}"

    def client(self, timeout_s: float = 30.0) -> redis.Redis:
        """A plain client past the paths."""
        return redis.Redis(
            unix_socket_path=str(self.target()),
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_s,
        )

    def ask(self, *command: str | int) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def pause(self, seconds: float, pick: int) -> Loss | None:
        pid = self.pid()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        return None

    def fill(self, seconds: float) -> None:
        with self.client() as client:
            client.config_set("maxmemory", ONE_BYTE)
            time.sleep(seconds)
            client.config_set("maxmemory", "0")

    def prepare_rollback(self, pick: int) -> float:
        """Copy the append-only file. The server keeps writing: the copy is a prefix
        of the file, as a crash would leave it."""
        since_s = self._written_s()
        self._copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self.folder)) / "files"
        shutil.copytree(self.files(), self._copy)
        return since_s

    def roll_back(self, since_s: float) -> Loss:
        """End the server, put the copy back, start it."""
        struck_s = time.monotonic()
        self.end()
        ended_s = time.monotonic()
        shutil.rmtree(self.files())
        shutil.move(self._copy, self.files())
        self.start()
        return Loss("rolled back", since_s, struck_s, ended_s, time.monotonic())

    def _written_s(self) -> float:
        """A moment of which all that was acknowledged before it is in the file by now."""
        with self.client() as client:
            while True:
                asked_s = time.monotonic()
                if client.info("persistence")["aof_buffer_length"] == 0:
                    return asked_s

    def await_serving(self) -> None:
        """Wait until it answers."""
        until(self._serves, f"{self.name} serving", SERVES_S)

    def _serves(self) -> bool:
        try:
            with self.client(1.0) as client:
                return client.get("none") is None
        except ERRORS:
            return False


class RedisStore(SingleStore):
    """`redis-server` that writes each command to its file before it answers: a kill loses
    nothing."""

    name = "redis"

    def __init__(self, folder: Path):
        super().__init__(folder)
        # a unix socket's path must be short
        self._home = Path(tempfile.mkdtemp(prefix="carry-faults-"))
        self._server = RealServer(
            "redis", self._home, "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0"
        )

    def start(self) -> None:
        self._server.launch()
        self.await_serving()

    def stop(self) -> None:
        self._server.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def target(self) -> Target | None:
        return self._server.socket

    def pid(self) -> int:
        return self._server._process.pid

    def end(self) -> None:
        self._server.kill()

    def kill(self, pick: int) -> Loss | None:
        self._server.kill()
        time.sleep(DOWN_S)
        self.start()
        return None

    def files(self) -> Path:
        return self._home / "appendonlydir"


class ValkeyStore(SingleStore):
    """The embedded Valkey of one `carry serve`, which the other workers use by its socket."""

    name = "valkey"

    def __init__(self, folder: Path, models: Path, environment: dict[str, str]):
        super().__init__(folder)
        self.owner = Service(folder, models)
        self._environment = environment

    def start(self) -> None:
        self.owner.start(**self._environment)
        self._keep_file()

    def stop(self) -> None:
        if self.owner.process is None:
            return
        if not self.owner.ended():
            self.owner.stop()
        elif (self.owner.data_dir / "valkey.json").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid(), signal.SIGKILL)

    def target(self) -> Target | None:
        try:
            record = json.loads((self.owner.data_dir / "valkey.json").read_text())
        except (OSError, ValueError):
            return None
        return str(record["socket"])

    def pid(self) -> int:
        return self.owner.valkey_pid()

    def end(self) -> None:
        self.owner.stop()

    def kill(self, pick: int) -> Loss | None:
        before, killed_s = self.pid(), time.monotonic()
        os.kill(before, signal.SIGKILL)
        until(lambda: self._pid_or_none() not in (None, before), "a new Valkey", SERVES_S)
        self.await_serving()
        self._keep_file()
        done_s = time.monotonic()
        return Loss("killed", killed_s - LATE_WRITES_S, killed_s, done_s, done_s)

    def files(self) -> Path:
        return self.owner.data_dir / "appendonlydir"

    def restart_owner(self, *, kill: bool) -> None:
        """End the service that holds the Valkey, by SIGKILL (the Valkey keeps running, and is taken
        over) or by SIGTERM (it ends too), and start it again."""
        if kill:
            self.owner.kill()
            time.sleep(DOWN_S)
        else:
            self.owner.stop()
        self.start()

    def _pid_or_none(self) -> int | None:
        try:
            return self.pid()
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep_file(self) -> None:
        # a rewrite would replace files while they are copied
        with self.client() as client:
            client.config_set("auto-aof-rewrite-percentage", "0")
