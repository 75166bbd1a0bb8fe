"""The service's own Valkey, for when no store is given.

One server per data directory, shared by all workers, started and stopped by the service's
parent process. It outlives a parent that was killed, and the next service on the directory
takes it over if it is the server that was recorded and has the same settings; otherwise it
is ended, and a new one goes on with its files. There are never two (see `data_dir`). A
server that dies is started again on the same socket, with growing pauses, while requests
wait in the stores' patience.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.embedded.data_dir import POLL_S, DataDirectory, ServerRecord
from service.store.embedded.valkey_process import (
    Identity,
    ask,
    ask_to_end,
    end_at_once,
    log_tail,
    new_socket_path,
    remove_socket,
    server_arguments,
    server_binary,
    settings_digest,
    spawn,
)

WATCH_S: Final = 0.1
FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 10.0
STEADY_S: Final = 60.0
"""A server that ran this long before it died is started again without a longer pause."""

LEFT_BEHIND_S: Final = 10.0
"""How long a server that was left behind may be silent before it is ended."""

KILLED_S: Final = 10.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddedStatus:
    """How the embedded server is doing.

    Attributes:
        running: it lives (it may still be loading).
        pid: its process, None while there is none.
        adopted: it was left behind by an earlier service.
        restarts: how often it was started again after it died.
        trouble: why it does not run, empty while it does.
    """

    running: bool
    pid: int | None
    adopted: bool
    restarts: int
    trouble: str = ""


class EmbeddedValkey:
    """The embedded server of one data directory; `start` and `stop` from one thread.

    Args:
        data_dir: its folder, made where it is missing.
        maxmemory_bytes: memory beyond which commits are refused; 0 for no limit.
        fsync: whether the disk has every commit before it is acknowledged.
        runtime_dir: where the socket's folder is made; None for a temporary directory.
        start_timeout_s: how long a server may be silent while it starts; loading a large
            file counts as an answer.
        stop_timeout_s: how long it may take to write out its file before it is killed.
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
        self._watcher: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address for stores; the same for as long as the service runs.

        Raises:
            StoreUnavailable: it was not started.
        """
        if self._socket is None:
            raise StoreUnavailable("the embedded Valkey is not started")
        return f"unix://{self._socket}"

    def status(self) -> EmbeddedStatus:
        """How it is doing; from any thread."""
        return self._status

    def start(self) -> None:
        """Take the directory, adopt or start its server, and keep it running.

        Returns when the server has loaded its file and answers.

        Raises:
            StoreRefused: another service has the directory, or it cannot be used.
            StoreUnavailable: the server does not start; the message ends with its log.
        """
        self._directory.acquire()
        try:
            binary = server_binary()
            settings = settings_digest(binary, self._arguments(""))
            adopted = self._adopt(settings)
            if adopted is None:
                self._socket = new_socket_path(self._runtime_dir)
                self._launch(binary, settings, restarts=0)
        except BaseException:
            self.stop()
            raise
        self._stopping.clear()
        self._watcher = threading.Thread(
            target=self._supervise, args=(binary, settings), name="carry-valkey", daemon=True
        )
        self._watcher.start()

    def stop(self) -> None:
        """Let the server write out its file and end, and give the directory back."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        try:
            if self._socket is not None:
                self._end(self._socket)
                remove_socket(self._socket)
                self._directory.forget_record()
                log.info("valkey_stopped", data_dir=str(self._directory.path))
        finally:
            self._socket = None
            self._status = EmbeddedStatus(False, None, False, self._status.restarts)
            self._directory.release()

    def _adopt(self, settings: str) -> Identity | None:
        """Take over the server that lives on the directory, or see that none does."""
        record = self._directory.read_record()
        if not self._directory.has_server():
            if record is not None:
                remove_socket(record.socket)
            return None
        found = self._answer_of(record)
        if (
            record is not None
            and found is not None
            and found.directory == self._directory.path
            and record.run_id in (None, found.run_id)
            and record.settings == settings
        ):
            self._socket = record.socket
            self._await_ready(found.pid)
            self._note_running(settings, found, adopted=True, restarts=0)
            log.info("valkey_adopted", pid=found.pid, socket=record.socket)
            return found
        log.warning(
            "valkey_left_behind",
            pid=found.pid if found else None,
            reason="it has other settings" if found else "it does not answer",
        )
        if found is not None and found.directory != self._directory.path:
            raise StoreRefused(
                f"{self._directory.path}/valkey.json names a server of {found.directory}; "
                "remove that file"
            )
        self._end(record.socket if record else None)
        if record is not None:
            remove_socket(record.socket)
        return None

    def _answer_of(self, record: ServerRecord | None) -> Identity | None:
        """What a server that was left behind says; it may just be starting or ending."""
        if record is None:
            return None
        deadline_s = time.monotonic() + min(LEFT_BEHIND_S, self._start_timeout_s)
        while (found := ask(record.socket)) is None:
            if time.monotonic() >= deadline_s or not self._directory.has_server():
                return None
            time.sleep(POLL_S)
        return found

    def _launch(self, binary: Path, settings: str, *, restarts: int) -> None:
        """Start a server on the present socket and wait until it serves."""
        socket, directory = self._socket, self._directory
        if socket is None:
            raise StoreUnavailable("the embedded Valkey is not started")
        fd = directory.wait_for_server_lock(KILLED_S)
        if fd is None:
            raise StoreUnavailable(f"another Valkey still works on {directory.path}")
        try:
            Path(socket).parent.mkdir(mode=0o700, exist_ok=True)
            # Recorded before it is started, so that no server is ever without a record.
            directory.write_record(ServerRecord(socket, settings))
            self._child = spawn(binary, self._arguments(socket), fd, directory.log_path)
        except OSError as error:
            raise StoreUnavailable(f"Valkey cannot be started: {error}") from error
        finally:
            os.close(fd)
        identity = self._await_ready(self._child.pid)
        self._note_running(settings, identity, adopted=False, restarts=restarts)
        log.info("valkey_started", pid=identity.pid, socket=socket, data_dir=str(directory.path))

    def _arguments(self, socket: str) -> list[str]:
        return server_arguments(
            self._directory.path, socket, self._maxmemory_bytes, fsync=self._fsync
        )

    def _await_ready(self, pid: int) -> Identity:
        """Wait until the server has loaded and answers."""
        socket = self._socket or ""
        deadline_s = time.monotonic() + self._start_timeout_s
        while True:
            identity = ask(socket)
            if identity is not None and not identity.loading and identity.pid == pid:
                return identity
            if identity is not None:
                deadline_s = time.monotonic() + self._start_timeout_s
            ended = not self._lives()
            if ended or self._stopping.is_set() or time.monotonic() >= deadline_s:
                what = "ended" if ended else f"did not answer within {self._start_timeout_s:g} s"
                raise StoreUnavailable(
                    f"the embedded Valkey on {self._directory.path} {what}; its log ends:\n"
                    + log_tail(self._directory.log_path)
                )
            time.sleep(POLL_S)

    def _note_running(
        self, settings: str, identity: Identity, *, adopted: bool, restarts: int
    ) -> None:
        self._directory.write_record(
            ServerRecord(self._socket or "", settings, identity.pid, identity.run_id)
        )
        self._status = EmbeddedStatus(True, identity.pid, adopted, restarts)

    def _lives(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return self._directory.has_server()

    def _supervise(self, binary: Path, settings: str) -> None:
        """Start the server again whenever it died; runs in its own thread."""
        pause_s, began_s = FIRST_PAUSE_S, time.monotonic()
        while not self._stopping.wait(WATCH_S):
            if self._lives():
                continue
            if time.monotonic() - began_s >= STEADY_S:
                pause_s = FIRST_PAUSE_S
            restarts = self._status.restarts + 1
            code = self._child.returncode if self._child is not None else None
            trouble = f"it ended with status {code}"
            self._status = EmbeddedStatus(False, None, False, restarts, trouble)
            log.error("valkey_died", status=code, restarts=restarts, pause_s=pause_s)
            if self._stopping.wait(pause_s):
                return
            pause_s, began_s = min(MAX_PAUSE_S, 2 * pause_s), time.monotonic()
            try:
                self._launch(binary, settings, restarts=restarts)
            except (CarryError, OSError) as error:
                self._status = EmbeddedStatus(False, None, False, restarts, str(error))
                log.error("valkey_not_started", reason=str(error))
                self._kill_silent()

    def _kill_silent(self) -> None:
        """A server that lives and does not serve would keep the next one from starting."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def _end(self, socket: str | None) -> None:
        """End the directory's server: by asking, then by SIGTERM, then by killing it."""
        if socket is not None:
            ask_to_end(socket)
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
        if self._ended_within(self._stop_timeout_s):
            return
        pids = end_at_once(self._directory.path)
        log.error("valkey_killed", pids=pids, waited_s=self._stop_timeout_s)
        if not self._ended_within(KILLED_S):
            raise StoreRefused(
                f"a Valkey that cannot be ended works on {self._directory.path}; stop the "
                f"process that holds {self._directory.path}/valkey.lock"
            )

    def _ended_within(self, timeout_s: float) -> bool:
        fd = self._directory.wait_for_server_lock(timeout_s)
        if fd is None:
            return False
        os.close(fd)
        if self._child is not None:
            self._child.wait()
            self._child = None
        return True
