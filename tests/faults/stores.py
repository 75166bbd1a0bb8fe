"""The stores under test as things that break: killed, stopped, filled, put back in time.

Real servers, started and reached as the service's users do: the embedded Valkey through a
`carry serve` of its own, a Redis with an append-only file. Blocking calls; the executor runs
them in threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.domain import StreamKey
from service.state.keys import KeySpace
from tests.faults.network import MODEL
from tests.faults.path import Target
from tests.support.servers import RealServer, until
from tests.support.service import Service

PARTITIONS: Final = 1024
SERVES_S: Final = 60.0
LATE_WRITES_S: Final = 3.0
"""With `everysec` a server puts writes to its file off while a sync is under way, for up to two
seconds: a SIGKILL may take them."""

_DOWN_S: Final = 0.2
_ONE_BYTE: Final = "1"


class Store(ABC):
    """A store with one server.

    Attributes:
        kill_may_lose_s: what was acknowledged this long before a SIGKILL of the server may be
            gone afterwards; 0: nothing.
    """

    name: str
    kill_may_lose_s = 0.0

    def __init__(self, folder: Path):
        self.folder = folder
        self._keys = KeySpace("carry", PARTITIONS)

    @abstractmethod
    def start(self) -> None:
        """Start it and wait until it serves."""

    @abstractmethod
    def stop(self) -> None:
        """End it and remove what it left outside of its folder."""

    @abstractmethod
    def target(self) -> Target | None:
        """Where the server listens now."""

    @abstractmethod
    def pid(self) -> int:
        """The server's process."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL of the server, and its start some moments later; returns when it serves."""

    @abstractmethod
    def files(self) -> Path:
        """The folder of its append-only file."""

    @abstractmethod
    def roll_back(self, copy: Path) -> float:
        """End the server, put a copy of its files back, start it, wait until it serves.

        Returns:
            The moment after which the old server did nothing more.
        """

    def client(self, timeout_s: float = 30.0) -> redis.Redis:
        """A plain client past the paths."""
        return redis.Redis(
            unix_socket_path=str(self.target()),
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_s,
        )

    def serves(self) -> bool:
        """Whether it answers now."""
        try:
            with self.client(1.0) as client:
                return client.get("none") is None
        except (redis.RedisError, OSError, ValueError):
            return False

    def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        pid = self.pid()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    def fill(self, seconds: float) -> None:
        """Let its memory be full for a while."""
        with self.client() as client:
            client.config_set("maxmemory", _ONE_BYTE)
            time.sleep(seconds)
            client.config_set("maxmemory", "0")

    def copy_files(self) -> Path:
        """The append-only file as it is now. The server goes on writing: what is copied is a
        beginning of the file, as a crash would leave it."""
        copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self.folder))
        shutil.copytree(self.files(), copy / "files")
        return copy / "files"

    def expire(self, stream: str) -> None:
        """Let a stream's keys expire now; returns when they are gone."""
        pair = self._keys.pair(StreamKey(MODEL, stream))
        while True:
            try:
                with self.client() as client:
                    for key in pair:
                        client.pexpire(key, 1)
                    until(lambda: not client.exists(*pair), "the expiry")
                return
            except (redis.RedisError, OSError, ValueError):
                time.sleep(0.05)

    def _put_back(self, copy: Path) -> None:
        shutil.rmtree(self.files())
        shutil.copytree(copy, self.files())

    def _await_serving(self) -> None:
        until(self.serves, f"{self.name} serving", SERVES_S)


class RedisStore(Store):
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
        self._server.start()

    def stop(self) -> None:
        self._server.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def target(self) -> Target | None:
        return self._server.socket

    def pid(self) -> int:
        return self._server._process.pid

    def kill(self) -> None:
        self._server.kill()
        time.sleep(_DOWN_S)
        self._server.launch()
        self._await_serving()

    def files(self) -> Path:
        return self._home / "appendonlydir"

    def roll_back(self, copy: Path) -> float:
        self._server.kill()
        ended_s = time.monotonic()
        self._put_back(copy)
        self._server.launch()
        self._await_serving()
        return ended_s


class ValkeyStore(Store):
    """The embedded Valkey of one `carry serve`, which the other workers use by its socket."""

    name = "valkey"
    kill_may_lose_s = LATE_WRITES_S

    def __init__(self, folder: Path, models: Path, environment: dict[str, str]):
        super().__init__(folder)
        self.owner = Service(folder, models)
        self._environment = environment
        self._lock = threading.Lock()

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

    def kill(self) -> None:
        with self._lock:
            before = self.pid()
            os.kill(before, signal.SIGKILL)
            until(lambda: self._pid_or_none() not in (None, before), "a new Valkey", SERVES_S)
            self._await_serving()
            self._keep_file()

    def files(self) -> Path:
        return self.owner.data_dir / "appendonlydir"

    def roll_back(self, copy: Path) -> float:
        with self._lock:
            self.owner.stop()
            ended_s = time.monotonic()
            self._put_back(copy)
            self.start()
            return ended_s

    def restart_owner(self, *, kill: bool) -> None:
        """End the service that holds the Valkey, by SIGKILL (the Valkey goes on, and is taken
        over) or by SIGTERM (it ends too), and start it again."""
        with self._lock:
            if kill:
                self.owner.kill()
                time.sleep(_DOWN_S)
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


def make_store(name: str, folder: Path, models: Path, environment: dict[str, str]) -> Store:
    """The store of that name, not yet started."""
    if name == "valkey":
        return ValkeyStore(folder, models, environment)
    if name == "redis":
        return RedisStore(folder)
    raise ValueError(f"expected valkey or redis, got {name!r}")
