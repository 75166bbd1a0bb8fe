"""Redis and Valkey servers for tests, each on a unix socket in its own directory.

Valkey is the embedded binary with the embedded options; Redis is the `redis-server` that is
on the PATH; its tests are skipped if there is none. No server listens on a port.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.core.errors import OutcomeUnknown, StoreUnavailable
from service.store.base import Store
from service.store.embedded import server_arguments, server_binary
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.needs import find_program

KINDS = ("valkey", "redis")
DEADLINE_S = 120.0
"""How long a test waits for a condition: on a busy machine a process starts for half a minute."""
WAIT_S = 60.0
_POLL_S = 0.005


def until(
    condition: Callable[[], Any],
    what: str = "the condition",
    within_s: float = DEADLINE_S,
    poll_s: float = _POLL_S,
) -> Any:
    """Poll until `condition` returns a true value, and return it; fail after a timeout."""
    deadline_s = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() >= deadline_s:
            raise AssertionError(f"{what} was not met within {within_s} s")
        time.sleep(poll_s)
    return value


async def until_async(condition: Callable[[], Awaitable[Any]], what: str = "the condition") -> Any:
    """Poll like `until`, without blocking the event loop."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (value := await condition()):
        if time.monotonic() >= deadline_s:
            raise AssertionError(f"{what} was not met within {DEADLINE_S} s")
        await asyncio.sleep(_POLL_S)
    return value


async def rejection(attempt: Callable[[], Awaitable[Any]], reason: str) -> StoreUnavailable:
    """The rejection of what a store does with a short deadline. It is tried until the rejection
    names the reason: a server that a busy machine suspends until the deadline names none."""

    async def rejected() -> StoreUnavailable | None:
        try:
            result = await attempt()
        except StoreUnavailable as error:
            return error if re.search(reason, str(error)) else None
        assert result is not None, f"expected {reason}"
        assert isinstance(result[0], OutcomeUnknown), f"expected {reason}, got {result}"
        return None

    error: StoreUnavailable = await until_async(rejected, f"a rejection with {reason}")
    return error


async def becomes(condition: Callable[[], Any], what: str) -> None:
    """Poll like `until_async`, a condition that awaits nothing."""

    async def holds() -> Any:
        return condition()

    await until_async(holds, what)


def written(client: redis.Redis) -> None:
    """Wait until the server has written all acknowledged commands to its file."""
    until(lambda: client.info("persistence")["aof_buffer_length"] == 0, "the file's write")


def server_program(kind: str) -> str:
    """The path of the embedded Valkey, or of the `redis-server` on the PATH; skips without it."""
    return str(server_binary()) if kind == "valkey" else find_program("redis-server")


class RealServer:
    """One server process that can be killed and restarted on its files.

    The server leaves the sync of its file to the kernel (`appendfsync no`), which keeps every
    acknowledged write after SIGKILL. With `everysec`, writes wait up to two seconds for a sync.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        *options: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        prepare: Callable[[], None] | None = None,
    ):
        self.kind, self.folder, self.options = kind, folder, options
        self.socket = str(folder / "server.sock")
        self.url = f"unix://{self.socket}"
        self._environment = {"LC_ALL": "C", "PATH": os.defpath, **environment}
        self._prepare = prepare
        self._process: subprocess.Popen[bytes] | None = None
        self._configured: dict[str, str] = {}

    def arguments(self) -> Sequence[str]:
        """The command-line options that come before its own."""
        return [*server_arguments(self.folder, self.socket), "--appendfsync", "no"]

    def launch(self, *options: str) -> None:
        """Start the process with additional options; returns immediately."""
        self._process = subprocess.Popen(
            [server_program(self.kind), *self.arguments(), *self.options, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment,
            process_group=0,
            preexec_fn=self._prepare,
        )

    @property
    def pid(self) -> int:
        """The running process."""
        return self._process.pid

    def start(self, *options: str) -> None:
        """Start the process with additional options, and wait until it serves."""
        self.launch(*options)
        until(lambda: self.answers() or self._process.poll() is not None, f"{self.kind} answering")
        assert self._process.poll() is None, f"{self.kind} ended with {self._process.returncode}"

    def client(self) -> redis.Redis:
        """A client of this server, to inspect what the store wrote."""
        return redis.Redis(
            unix_socket_path=self.socket, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=10
        )

    def ask(self, *command: Any) -> Any:
        """The reply to one command."""
        with self.client() as client:
            return client.execute_command(*command)

    def answers(self) -> bool:
        """Whether the server serves commands."""
        try:
            return bool(self.ask("PING"))
        except redis.RedisError:
            return False

    def refuses(self, word: str) -> bool:
        """Whether the server answers with an error that contains a word."""
        try:
            self.ask("GET", "any")
        except redis.RedisError as error:
            return word.lower() in str(error).lower()
        return False

    def is_primary(self) -> bool:
        """Whether the server answers, as a primary."""
        try:
            return bool(self.ask("INFO", "replication")["role"] == "master")
        except redis.RedisError:
            return False

    def replication_offset(self) -> int:
        """How much a primary has written; WAIT tells it only for the connection that wrote."""
        return int(self.ask("INFO", "replication")["master_repl_offset"])

    def has_complete_file(self) -> bool:
        """Whether a kill loses nothing: the server's file contains all acknowledged commands.

        After a full resynchronisation a replica's file is that of before, until it is rewritten.
        """
        facts = self.ask("INFO", "persistence")
        is_rewriting = facts["aof_rewrite_in_progress"] or facts["aof_rewrite_scheduled"]
        return facts["aof_enabled"] and not is_rewriting and facts["aof_buffer_length"] == 0

    def has_in_file(self, offset: int) -> bool:
        """Whether the server follows a primary, and its file contains what that wrote until the
        offset."""
        facts = self.ask("INFO", "replication")
        is_behind = facts["role"] == "master" or facts["slave_repl_offset"] < offset
        is_synced = not is_behind and facts["master_link_status"] == "up"
        return is_synced and self.has_complete_file()

    def configure(self, name: str, value: str | int) -> None:
        """Run CONFIG SET; `restore` undoes it."""
        with self.client() as client:
            self._configured.setdefault(name, client.config_get(name)[name])
            client.config_set(name, value)

    def restore(self) -> None:
        """Repair what a failed test left: the server runs, with its options."""
        if self._process.poll() is None:
            self.resume()
        else:
            self.start()
        while self._configured:
            name, value = self._configured.popitem()
            self.ask("CONFIG", "SET", name, value)

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def pause(self) -> None:
        """Send SIGSTOP: the server becomes unresponsive."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL, also to the child that rewrites the file, and wait for the exit."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Kill the process, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PORTS = range(12_000 + _WORKER, 32_000, _WORKERS)
"""Ports below the ephemeral range: an outgoing connection could take an ephemeral port between
the check that it is free and the start of its server. Parallel test workers have disjoint ports,
so that none takes the port of a server that another one restarts."""
_used_ports: set[int] = set()


def free_port() -> int:
    """A free port of the loopback; no port is returned twice."""
    for port in random.sample(PORTS, 1_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _used_ports:
            _used_ports.add(port)
            return port
    raise AssertionError(f"no port in {PORTS} is free")


@contextmanager
def real_server(kind: str, *options: str, **process: Any) -> Iterator[RealServer]:
    """Run a server, with further arguments of `RealServer`; stop and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="carry-test-"))
    server = RealServer(kind, folder, *options, **process)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def emptied(running: Any) -> Any:
    """Restore a server or cluster, delete all its keys and scripts, and return it."""
    running.restore()
    with running.client() as client:
        client.flushall()
        client.script_flush()
    return running


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[Store]:
    """Open and start a store; close it afterwards. By default it waits for longer than a busy
    machine suspends its server: after a third of the time it reconnects and sends again."""
    store = RedisStore(StoreSettings(url, **{"store_wait_s": WAIT_S, **settings}))
    try:
        await store.start()
        yield store
    finally:
        await store.close()


async def start_store(url: str, **settings: Any) -> None:
    """Open and start a store, and close it."""
    async with opened(url, **settings):
        pass


@pytest.fixture(scope="session", params=KINDS)
def shared_server(request: pytest.FixtureRequest) -> Iterator[RealServer]:
    """One server of each kind per test run; use `server`, which empties it."""
    with real_server(request.param) as running:
        yield running


@pytest.fixture
def server(shared_server: RealServer) -> RealServer:
    """An empty server of each kind. Tests that change its options restore them."""
    return emptied(shared_server)


@pytest.fixture(params=KINDS)
def own_server(request: pytest.FixtureRequest) -> Iterator[RealServer]:
    """A server of each kind that the test may kill, stop or damage.

    It writes each command to its file before it replies. With `everysec` it may delay the write
    for up to two seconds while an fsync runs, and lose it to a SIGKILL.
    """
    with real_server(request.param) as running:
        yield running
