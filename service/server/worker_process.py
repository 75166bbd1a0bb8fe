"""One worker process: how it starts, what its parent sees of it, and what it runs.

It is a fork of its parent, or a new interpreter. A fork has what its parent has imported, in memory
that both share until one of them changes it. The parent must not have another thread, since a lock
that it holds would stay locked in the child. A fork keeps the descriptors of its parent that it is
given, and receives no signal before it has handlers of its own: until then the parent's are
installed. A new interpreter is for a parent that has threads, and for systems other than Linux,
where some libraries do not support forks.

A worker sends a heartbeat through a pipe twice a second, and shuts down gracefully when its parent
ends, even by a kill: otherwise it would keep the port.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, NamedTuple, NoReturn

import structlog
import uvicorn

from service.server.connection_balance import WorkerLoad
from service.server.graceful_server import SIGHUP, GracefulServer, Periods
from service.telemetry.logs import flush_logs

CAN_FORK: Final = sys.platform == "linux"

HEARTBEAT_INTERVAL_S: Final = 0.5
"""Interval of the heartbeats of a worker that is ready."""

START_INTERVAL_S: Final = 0.05
"""Interval until the worker is ready: short, so that the parent soon knows that it is."""

HEARTBEAT_TIMEOUT_S: Final = 30.0
"""A worker without a heartbeat for this long counts as hung and is killed. Long enough to compile a
large network, which holds the interpreter lock."""

BACKOFF_RESET_S: Final = 60.0
"""A worker that was ready for this long before it exited is restarted without backoff."""

log = structlog.get_logger(__name__)

WithoutThreads = Callable[[], AbstractContextManager[None]]
"""Ends the other threads of a process for the time of a block, and starts them again after it."""


class WorkerConfig(NamedTuple):
    """What all workers of a pool run.

    Attributes:
        uvicorn: configuration of its server.
        listener: the socket that all of them accept from.
        periods: of the graceful shutdown.
        start_errors: errors of a start that the operator can understand without a traceback.
        without_threads: keeps this process without other threads while it forks; None starts new
            interpreters instead.
    """

    uvicorn: uvicorn.Config
    listener: socket.socket
    periods: Periods
    start_errors: tuple[type[Exception], ...] = ()
    without_threads: WithoutThreads | None = None


def start_worker(config: WorkerConfig, load: WorkerLoad) -> Worker:
    """Start a worker; from the main thread."""
    heartbeats, child_end = multiprocessing.Pipe(duplex=False)
    # Otherwise the pipe would stay open after the worker exits.
    with child_end:
        if config.without_threads is not None:
            return Worker(_fork(config, child_end, load), heartbeats, load)
        process = multiprocessing.get_context("spawn").Process(
            target=_run_worker, args=(config, child_end, load)
        )
        process.start()
        return Worker(process, heartbeats, load)


def _fork(config: WorkerConfig, heartbeats: Connection[Any, Any], load: WorkerLoad) -> BaseProcess:
    """Start a fork, which keeps only the files of this process that it uses."""
    with (config.without_threads or nullcontext)():
        kept = (0, 1, 2, config.listener.fileno(), heartbeats.fileno())
        others = {file for file in _open_files() if file[0] not in kept}
        process = multiprocessing.get_context("fork").Process(
            target=_run_fork, args=(others, config, heartbeats, load)
        )
        _mask_signals(signal.SIG_BLOCK)
        try:
            process.start()
        finally:
            _mask_signals(signal.SIG_UNBLOCK)
    return process


def _mask_signals(how: int) -> None:
    """Block the signals of the service while a process forks, or receive them; a fork does too."""
    if CAN_FORK:
        numbers = {signal.SIGTERM, signal.SIGINT, *([] if SIGHUP is None else [SIGHUP])}
        signal.pthread_sigmask(how, numbers)


def _open_files() -> set[tuple[int, int, int]]:
    """The open files of this process: descriptors, each with its device and inode."""
    files = set()
    for name in os.listdir("/proc/self/fd"):
        # not the one that the list was read from
        with suppress(OSError):
            file = os.fstat(int(name))
            files.add((int(name), file.st_dev, file.st_ino))
    return files


def _run_fork(others: set[tuple[int, int, int]], *arguments: Any) -> None:
    """Main function of a fork.

    Args:
        others: files of the parent to close, unless multiprocessing has closed one before the fork
            and used its number for a pipe of its own. The objects that own them are never deleted
            in the fork, which would close descriptors again: the frames of the parent's calls,
            below this one on the stack, refer to them.
        arguments: of `_run_worker`.
    """
    for descriptor, *_ in others & _open_files():
        os.close(descriptor)
    _run_worker(*arguments)


class Worker:
    """The parent's view of one worker process."""

    def __init__(self, process: BaseProcess, heartbeats: Connection[Any, Any], load: WorkerLoad):
        self.process = process
        self.heartbeats = heartbeats
        self.load = load
        self.is_ready = False
        self._reason = ""
        self._started_s = self._heartbeat_s = self._ready_s = time.monotonic()
        self._kill_at_s = float("inf")

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def age_s(self) -> float:
        return round(time.monotonic() - self._started_s, 3)

    def read_heartbeats(self) -> bool:
        """Read its heartbeats; returns whether it has become ready."""
        was_ready = self.is_ready
        try:
            while not self.heartbeats.closed and self.heartbeats.poll():
                report = self.heartbeats.recv()
                self._heartbeat_s = time.monotonic()
                if isinstance(report, str):
                    self._reason = report
                else:
                    self.is_ready = report
        except (EOFError, OSError):
            self.heartbeats.close()
        if was_ready or not self.is_ready:
            return False
        self._ready_s = time.monotonic()
        return True

    def is_hung(self) -> bool:
        """Whether it runs without heartbeats."""
        return not self.has_exited() and time.monotonic() - self._heartbeat_s > HEARTBEAT_TIMEOUT_S

    def was_stable(self) -> bool:
        """Whether it was ready for long enough to be restarted without backoff."""
        return self.is_ready and time.monotonic() - self._ready_s >= BACKOFF_RESET_S

    def has_exited(self) -> bool:
        return self.process.exitcode is not None

    def exit_reason(self) -> str:
        """Why it exited."""
        self.read_heartbeats()
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        return self._reason or f"the worker exited with {how}"

    def end(self, number: int, kill_after_s: float) -> None:
        """Ask it to end, by one of the signals of `GracefulServer`; `has_drained` kills it later.

        Args:
            number: SIGTERM drains after the lame-duck time, SIGINT now, SIGRETIRE retires first.
        """
        self._kill_at_s = time.monotonic() + kill_after_s
        if not self.has_exited():
            os.kill(self.pid, number)

    def has_drained(self) -> bool:
        """Whether it has exited after `end`; kills it once its time is over."""
        if self.has_exited():
            return True
        if time.monotonic() < self._kill_at_s:
            return False
        log.error("worker_killed", pid=self.pid)
        self.kill()
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _run_worker(config: WorkerConfig, heartbeats: Connection[Any, Any], load: WorkerLoad) -> None:
    """Main function of a worker process."""
    if SIGHUP is not None:
        # A closing terminal signals the whole process group; the parent decides what to do.
        signal.signal(SIGHUP, signal.SIG_IGN)
    # The constructor has configured uvicorn's loggers in the parent process only.
    config.uvicorn.configure_logging()
    server = GracefulServer(config.uvicorn, _exit_process, config.periods, load)
    _mask_signals(signal.SIG_UNBLOCK)
    threading.Thread(
        target=_send_heartbeats, args=(server, heartbeats), name="carry-heartbeat", daemon=True
    ).start()
    try:
        server.run(sockets=[config.listener])
    except config.start_errors as error:
        heartbeats.send(str(error))
        flush_logs()
        sys.exit(1)


def _exit_process() -> NoReturn:
    """Exit without waiting for threads that are still compiling."""
    flush_logs()
    os._exit(0)


def _send_heartbeats(server: GracefulServer, heartbeats: Connection[Any, Any]) -> None:
    """Send heartbeats until the parent ends, each with whether this process is ready; then stop."""
    parent = multiprocessing.parent_process()
    sentinels = [] if parent is None else [parent.sentinel]
    with suppress(OSError):
        while True:
            heartbeats.send(server.started)
            if wait(sentinels, HEARTBEAT_INTERVAL_S if server.started else START_INTERVAL_S):
                break
    # drains at once: the service that a supervisor starts next needs the port
    os.kill(os.getpid(), signal.SIGINT)
