"""The folder of an embedded Valkey: who holds it, and which server it was last given to.

    lock           held by the service for as long as it lives; contains its pid
    valkey.lock    held by the Valkey process itself, whichever service started it
    valkey.json    the server that was started last: pid, run id, socket, settings
    valkey.log     the server's own log
    appendonlydir  the streams

Both locks are `flock`s, which the kernel gives back however a process ends. The first is not
passed on to child processes. The second is opened here, passed to Valkey as it is started and
closed here again, so that it is held exactly while a server lives: there is never a second
one on the same files, whatever became of the record or of the service.
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
    """What is remembered of the server that was started last.

    Attributes:
        socket: path of its unix socket.
        settings: digest of everything it was started with, the socket apart.
        pid, run_id: None from just before it is started until it first answered.
    """

    socket: str
    settings: str
    pid: int | None = None
    run_id: str | None = None


class DataDirectory:
    """The folder and its locks; used from one thread at a time."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self._service_fd: int | None = None

    @property
    def log_path(self) -> Path:
        """The server's own log."""
        return self.path / "valkey.log"

    def acquire(self) -> None:
        """Take the folder for this service.

        Raises:
            StoreRefused: another service has it, or it cannot be written.
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
        """Give the folder back; safe to repeat."""
        if self._service_fd is not None:
            os.close(self._service_fd)
            self._service_fd = None

    def try_server_lock(self) -> int | None:
        """A descriptor that holds the server's lock, for a server about to start; None while
        a server lives."""
        return _try_lock(self.path / "valkey.lock")

    def wait_for_server_lock(self, timeout_s: float) -> int | None:
        """As `try_server_lock`, waiting for a server that is on its way out."""
        deadline_s = time.monotonic() + timeout_s
        while (fd := self.try_server_lock()) is None and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return fd

    def has_server(self) -> bool:
        """Whether a server lives on this folder."""
        fd = self.try_server_lock()
        if fd is not None:
            os.close(fd)
        return fd is None

    def write_record(self, record: ServerRecord) -> None:
        """Remember a server, whole or not at all."""
        target = self.path / "valkey.json"
        draft = target.with_suffix(".json.new")
        draft.write_text(json.dumps(asdict(record)) + "\n")
        draft.replace(target)

    def read_record(self) -> ServerRecord | None:
        """The server that was started last; None where that is not known."""
        try:
            return ServerRecord(**json.loads((self.path / "valkey.json").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("record_unreadable", data_dir=str(self.path), reason=str(error))
            return None

    def forget_record(self) -> None:
        """Drop the record of a server that has ended."""
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
