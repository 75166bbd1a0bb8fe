"""Supervises the embedded Valkey, which stores the streams if no external store is configured.

There is one server per data directory, shared by all workers, started and stopped by the service's
parent process. It survives a parent that was killed. The next service on the directory adopts it if
it is the recorded server and has the same settings; otherwise it stops it and starts a new server
on the same files. There are never two (see `data_dir`). A server that exits is restarted on the
same socket with exponential backoff, while requests wait up to the store's timeout.

    valkey = EmbeddedValkey(Path(".carry"))
    valkey.start()      # once; raises StoreRefused or StoreUnavailable
    ... valkey.url ...
    valkey.stop()       # safe to repeat, and after a failed start
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.embedded.data_dir import POLL_S, DataDirectory, ServerRecord
from service.store.embedded.valkey_process import (
    Identity,
    digest_settings,
    make_socket_path,
    read_identity,
    read_log_tail,
    remove_socket,
    request_shutdown,
    server_arguments,
    server_binary,
    signal_servers,
    spawn_server,
)

SUPERVISE_INTERVAL_S: Final = 0.1
BACKOFF_BASE_S: Final = 0.1
BACKOFF_CAP_S: Final = 10.0
BACKOFF_RESET_S: Final = 60.0
"""A server that ran this long before it exited is restarted with the shortest backoff."""

ORPHAN_TIMEOUT_S: Final = 10.0
"""How long a server of an earlier service may be unresponsive before it is stopped."""

KILL_TIMEOUT_S: Final = 10.0

SIGTERM_INTERVAL_S: Final = 1.0
"""Interval of the signals to a server that should stop: one that arrives before the server loads
its file takes effect only after the whole file is loaded."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddedStatus:
    """Status of the embedded server.

    Attributes:
        running: the process runs (it may still be loading).
        pid: its process id; None while it does not run.
        adopted: an earlier service started it.
        restarts: how often it was restarted after it exited.
        failure: why it does not run; empty while it does.
    """

    running: bool
    pid: int | None
    adopted: bool
    restarts: int
    failure: str = ""


class EmbeddedValkey:
    """The embedded server of one data directory; `start` and `stop` from one thread.

    Args:
        data_dir: its directory; created if missing.
        maxmemory_bytes: memory limit beyond which commits are rejected; 0 for none.
        fsync: whether every commit is synced to disk before it is acknowledged.
        runtime_dir: parent of the socket's directory; None for a temporary directory.
        start_timeout_s: how long a starting server may be unresponsive; a reply that it is
            loading restarts the timeout.
        stop_timeout_s: how long it may take to flush its file before it is killed.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        maxmemory_bytes: int = 0,
        fsync: bool = False,
        runtime_dir: Path | None = None,
        start_timeout_s: float = 30.0,
        stop_timeout_s: float = 30.0,
    ):
        self._directory = DataDirectory(data_dir)
        self._maxmemory_bytes = maxmemory_bytes
        self._fsync = fsync
        self._runtime_dir = runtime_dir
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._socket: str | None = None
        self._child: subprocess.Popen[Any] | None = None
        self._status = EmbeddedStatus(running=False, pid=None, adopted=False, restarts=0)
        self._stopping = threading.Event()
        self._restarting = threading.Lock()
        self._binary, self._settings = Path(), ""
        self._backoff_s, self._restarted_s = BACKOFF_BASE_S, -BACKOFF_RESET_S
        self._supervisor: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address for stores; it does not change while the service runs.

        Raises:
            StoreUnavailable: the server was not started.
        """
        if self._socket is None:
            raise StoreUnavailable("the embedded Valkey is not started")
        return f"unix://{self._socket}"

    def status(self) -> EmbeddedStatus:
        """The current status; safe from any thread."""
        return self._status

    def start(self) -> None:
        """Lock the directory, adopt or start its server, and supervise it.

        Returns when the server has loaded its file and answers.

        Raises:
            StoreRefused: another service uses the directory, or it cannot be used.
            StoreUnavailable: the server does not start; the message ends with its log.
        """
        self._directory.acquire()
        try:
            self._binary = server_binary()
            self._settings = digest_settings(self._binary, self._arguments(""))
            if self._adopt() is None:
                self._socket = make_socket_path(self._runtime_dir)
                self._start_server(0)
        except BaseException:
            self.stop()
            raise
        self._start_supervisor()

    @contextmanager
    def without_thread(self) -> Iterator[bool]:
        """Do not supervise the server during the block, which may then fork this process.

        Yields whether the supervising thread has ended; it does not while it restarts the server.
        """
        if not self._restarting.acquire(blocking=False):
            yield False
            return
        try:
            self._end_supervisor()
            yield True
        finally:
            self._start_supervisor()
            self._restarting.release()

    def stop(self) -> None:
        """Stop the server after it has flushed its file, and unlock the directory."""
        self._end_supervisor()
        try:
            if self._socket is not None:
                self._stop_server(self._socket)
                remove_socket(self._socket)
                self._directory.delete_record()
                log.info("valkey_stopped", data_dir=str(self._directory.path))
        finally:
            self._socket = None
            self._status = EmbeddedStatus(False, None, False, self._status.restarts)
            self._directory.release()

    def _start_supervisor(self) -> None:
        self._stopping.clear()
        self._supervisor = threading.Thread(
            target=self._supervise, name="carry-valkey", daemon=True
        )
        self._supervisor.start()

    def _end_supervisor(self) -> None:
        self._stopping.set()
        if self._supervisor is not None:
            self._supervisor.join()
            self._supervisor = None

    def _adopt(self) -> Identity | None:
        """Adopt the server that runs on the directory, or stop it and return None."""
        record = self._directory.read_record()
        if not self._directory.is_server_running():
            if record is not None:
                remove_socket(record.socket)
            return None
        running = self._wait_for_identity(record)
        if (
            record is not None
            and running is not None
            and running.directory == self._directory.path
            and record.run_id in (None, running.run_id)
            and record.settings == self._settings
        ):
            self._socket = record.socket
            self._wait_until_ready(running.pid)
            self._record_running(running, adopted=True, restarts=0)
            log.info("valkey_adopted", pid=running.pid, socket=record.socket)
            return running
        log.warning(
            "valkey_not_adopted",
            pid=running.pid if running else None,
            reason="it has other settings" if running else "it is unresponsive",
        )
        if running is not None and running.directory != self._directory.path:
            raise StoreRefused(
                f"{self._directory.path}/valkey.json names a server of {running.directory}; "
                "remove that file"
            )
        self._stop_server(record.socket if record else None)
        if record is not None:
            remove_socket(record.socket)
        return None

    def _wait_for_identity(self, record: ServerRecord | None) -> Identity | None:
        """Read the identity of a running server, which may be starting or shutting down."""
        if record is None:
            return None
        deadline_s = time.monotonic() + min(ORPHAN_TIMEOUT_S, self._start_timeout_s)
        while (identity := read_identity(record.socket)) is None:
            if time.monotonic() >= deadline_s or not self._directory.is_server_running():
                return None
            time.sleep(POLL_S)
        return identity

    def _start_server(self, restarts: int) -> None:
        """Start a server on the socket and wait until it serves."""
        socket, directory = self._socket, self._directory
        if socket is None:
            raise StoreUnavailable("the embedded Valkey is not started")
        fd = directory.wait_for_server_lock(KILL_TIMEOUT_S)
        if fd is None:
            raise StoreUnavailable(f"another Valkey still runs on {directory.path}")
        try:
            Path(socket).parent.mkdir(mode=0o700, exist_ok=True)
            # Written before the start, so that no server ever runs without a record.
            directory.write_record(ServerRecord(socket, self._settings))
            self._child = spawn_server(
                self._binary, self._arguments(socket), fd, directory.log_path
            )
        except OSError as error:
            raise StoreUnavailable(f"Valkey cannot be started: {error}") from error
        finally:
            os.close(fd)
        identity = self._wait_until_ready(self._child.pid)
        self._record_running(identity, adopted=False, restarts=restarts)
        log.info("valkey_started", pid=identity.pid, socket=socket, data_dir=str(directory.path))

    def _arguments(self, socket: str) -> list[str]:
        return server_arguments(
            self._directory.path, socket, self._maxmemory_bytes, fsync=self._fsync
        )

    def _wait_until_ready(self, pid: int) -> Identity:
        """Wait until the server has loaded its file and answers."""
        socket = self._socket or ""
        deadline_s = time.monotonic() + self._start_timeout_s
        while True:
            identity = read_identity(socket)
            if identity is not None and not identity.loading and identity.pid == pid:
                return identity
            if identity is not None:
                deadline_s = time.monotonic() + self._start_timeout_s
            exited = not self._is_running()
            if exited or self._stopping.is_set() or time.monotonic() >= deadline_s:
                reason = "exited" if exited else f"did not answer in {self._start_timeout_s:g} s"
                raise StoreUnavailable(
                    f"the embedded Valkey on {self._directory.path} {reason}; its log ends:\n"
                    + read_log_tail(self._directory.log_path)
                )
            time.sleep(POLL_S)

    def _record_running(self, identity: Identity, *, adopted: bool, restarts: int) -> None:
        self._directory.write_record(
            ServerRecord(self._socket or "", self._settings, identity.pid, identity.run_id)
        )
        self._status = EmbeddedStatus(True, identity.pid, adopted, restarts)

    def _is_running(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return self._directory.is_server_running()

    def _supervise(self) -> None:
        """Restart the server whenever it exits; in its own thread."""
        while not self._stopping.wait(SUPERVISE_INTERVAL_S):
            # otherwise `without_thread` waits for this thread to end
            if not self._is_running() and self._restarting.acquire(blocking=False):
                try:
                    self._restart()
                finally:
                    self._restarting.release()

    def _restart(self) -> None:
        """Restart the server after a backoff, which grows while it keeps exiting."""
        if time.monotonic() - self._restarted_s >= BACKOFF_RESET_S:
            self._backoff_s = BACKOFF_BASE_S
        backoff_s, restarts = self._backoff_s, self._status.restarts + 1
        code = self._child.returncode if self._child is not None else None
        failure = f"it exited with status {code}"
        self._status = EmbeddedStatus(False, None, False, restarts, failure)
        log.error("valkey_exited", status=code, restarts=restarts, backoff_s=backoff_s)
        if self._stopping.wait(backoff_s):
            return
        self._backoff_s = min(BACKOFF_CAP_S, 2 * backoff_s)
        self._restarted_s = time.monotonic()
        try:
            self._start_server(restarts)
        except (CarryError, OSError) as error:
            self._status = EmbeddedStatus(False, None, False, restarts, str(error))
            log.error("valkey_start_failed", reason=str(error))
            self._kill_unready()

    def _kill_unready(self) -> None:
        """Kill a server that runs but does not serve: it would keep the next one from starting."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def _stop_server(self, socket: str | None) -> None:
        """Stop the directory's server: by SHUTDOWN, then by SIGTERM, then by SIGKILL."""
        if socket is not None:
            request_shutdown(socket)
        left_s = self._stop_timeout_s
        while left_s > 0:
            # found by the lock: an interrupted start may leave a process without a `Popen`
            signal_servers(self._directory.path, signal.SIGTERM)
            if self._wait_until_stopped(min(left_s, SIGTERM_INTERVAL_S)):
                return
            left_s -= SIGTERM_INTERVAL_S
        pids = signal_servers(self._directory.path, signal.SIGKILL)
        log.error("valkey_killed", pids=pids, waited_s=self._stop_timeout_s)
        if not self._wait_until_stopped(KILL_TIMEOUT_S):
            raise StoreRefused(
                f"a Valkey that cannot be stopped runs on {self._directory.path}; stop the "
                f"process that holds {self._directory.path}/valkey.lock"
            )

    def _wait_until_stopped(self, timeout_s: float) -> bool:
        fd = self._directory.wait_for_server_lock(timeout_s)
        if fd is None:
            return False
        os.close(fd)
        if self._child is not None:
            self._child.wait()
            self._child = None
        return True


def find_running(data_dir: Path) -> str | None:
    """Find the address of the server that runs on a directory; None if none does."""
    directory = DataDirectory(data_dir)
    record = directory.read_record()
    if record is not None and directory.is_server_running() and read_identity(record.socket):
        return f"unix://{record.socket}"
    return None


@contextmanager
def running_valkey(data_dir: Path, *, fsync: bool) -> Iterator[str]:
    """The address of a directory's server, which is started for the time of the block if none runs.

    Raises:
        StoreRefused, StoreUnavailable: the directory cannot be used, or its server does not start.
    """
    if (url := find_running(data_dir)) is not None:
        yield url
        return
    valkey = EmbeddedValkey(data_dir, fsync=fsync)
    valkey.start()
    try:
        yield valkey.url
    finally:
        valkey.stop()
