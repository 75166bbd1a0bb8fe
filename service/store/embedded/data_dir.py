"""Data directory of an embedded Valkey: its two locks and the record of its server.

    lock           held by the service while it runs; contains its pid
    valkey.lock    held by the Valkey process, whichever service started it
    valkey.json    the server that was started last: pid, run id, socket, settings
    valkey.log     the server's log
    appendonlydir  the streams

Both locks are `flock`s, which the kernel releases however a process ends. Child processes do not
inherit the first one. The second one is opened here, inherited by Valkey and then closed here, so
that it is held exactly while a server runs: there are never two servers on the same files, even if
the record is lost or the service was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import structlog

from service.core.errors import StoreRefused

POLL_S: Final = 0.01

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """Identifies the server that was started last.

    Attributes:
        socket: path of its unix socket.
        settings: digest of its options without the socket.
        pid, run_id: None from just before the server is started until it first answers.
    """

    socket: str
    settings: str
    pid: int | None = None
    run_id: str | None = None


class DataDirectory:
    """The directory and its locks; used from one thread at a time."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self._service_fd: int | None = None

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.path / "valkey.log"

    def acquire(self) -> None:
        """Lock the directory for this service.

        Raises:
            StoreRefused: another service uses it, or it cannot be written.
        """
        lock = self.path / "lock"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = _try_lock(lock)
            if fd is None:
                holder = lock.read_text().strip() or "unknown"
                raise StoreRefused(
                    f"the data directory {self.path} is in use by the service with pid {holder}; "
                    "stop it, or set CARRY_DATA_DIR to another directory"
                )
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise StoreRefused(f"the data directory {self.path} cannot be used: {error}") from error
        self._service_fd = fd

    def release(self) -> None:
        """Unlock the directory; safe to repeat."""
        if self._service_fd is not None:
            os.close(self._service_fd)
            self._service_fd = None

    def try_server_lock(self) -> int | None:
        """Try to take the server's lock, for a server to inherit.

        Returns:
            The descriptor that holds the lock; None while a server runs.
        """
        return _try_lock(self.path / "valkey.lock")

    def wait_for_server_lock(self, timeout_s: float) -> int | None:
        """Take the server's lock, waiting for a server that is shutting down; None after that."""
        deadline_s = time.monotonic() + timeout_s
        while (fd := self.try_server_lock()) is None and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return fd

    def is_server_running(self) -> bool:
        """Whether a server runs on this directory."""
        fd = self.try_server_lock()
        if fd is not None:
            os.close(fd)
        return fd is None

    def write_record(self, record: ServerRecord) -> None:
        """Write the record of a server atomically."""
        target = self.path / "valkey.json"
        temporary = target.with_suffix(".json.new")
        temporary.write_text(json.dumps(asdict(record)) + "\n")
        temporary.replace(target)

    def read_record(self) -> ServerRecord | None:
        """Read the record of the server that was started last; None if there is no valid one."""
        try:
            return ServerRecord(**json.loads((self.path / "valkey.json").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("record_unreadable", data_dir=str(self.path), reason=str(error))
            return None

    def delete_record(self) -> None:
        """Delete the record of a server that has stopped."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / "valkey.json").unlink()


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd
