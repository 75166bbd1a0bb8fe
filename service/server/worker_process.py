"""One worker process: what the parent sees of it, and what it runs.

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
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, NoReturn

import structlog
import uvicorn

from models.errors import ModelsError
from service.core.errors import CarryError
from service.engine.runtimes.loading import RuntimeUnavailableError
from service.server.connection_balance import WorkerLoad
from service.server.graceful_server import SIGRETIRE, GracefulServer, Periods
from service.server.process_start import SIGHUP, StartProcess, unblock_signals
from service.settings import SettingsError
from service.telemetry.logs import flush_logs

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


class Worker:
    """The parent's view of one worker process."""

    def __init__(self, process: BaseProcess, heartbeats: Connection[Any, Any], load: WorkerLoad):
        self.process = process
        self.heartbeats = heartbeats
        self.load = load
        self.is_ready = False
        self._reason = ""
        self._started_s = self._heartbeat_s = self._ready_s = time.monotonic()
        self._kill_at_s: float | None = None

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

    def terminate(self, kill_after_s: float) -> None:
        """Ask it to drain after its lame-duck time, and to exit."""
        self._kill_at_s = time.monotonic() + kill_after_s
        self.process.terminate()

    def retire(self, kill_after_s: float) -> None:
        """Ask the worker to retire: to close each connection after its next response, then exit."""
        self._kill_at_s = time.monotonic() + kill_after_s
        if not self.has_exited() and SIGRETIRE is not None:
            os.kill(self.pid, SIGRETIRE)

    def drain(self, kill_after_s: float) -> None:
        """Ask it to finish accepted requests now, and to exit."""
        self._kill_at_s = time.monotonic() + kill_after_s
        if not self.has_exited():
            os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def has_drained(self) -> bool:
        """Whether it has exited after `terminate`; kills it once its drain time is over."""
        if self.has_exited():
            return True
        if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
            log.error("worker_killed", pid=self.pid)
            self.kill()
            return True
        return False


def start_worker(
    start: StartProcess,
    config: uvicorn.Config,
    listener: socket.socket,
    periods: Periods,
    load: WorkerLoad,
) -> Worker | None:
    """Start a worker; None if no process can be started now."""
    heartbeats, child_end = multiprocessing.Pipe(duplex=False)
    # Otherwise the pipe would stay open after the worker exits.
    with child_end:
        files = (listener.fileno(), child_end.fileno())
        process = start(files, _run_worker, config, listener, child_end, periods, load)
    if process is None:
        heartbeats.close()
        return None
    return Worker(process, heartbeats, load)


def _run_worker(
    config: uvicorn.Config,
    listener: socket.socket,
    heartbeats: Connection[Any, Any],
    periods: Periods,
    worker_load: WorkerLoad,
) -> None:
    """Main function of a worker process."""
    if SIGHUP is not None:
        # A closing terminal signals the whole process group; the parent decides what to do.
        signal.signal(SIGHUP, signal.SIG_IGN)
    # The constructor has configured uvicorn's loggers in the parent process only.
    config.configure_logging()
    server = GracefulServer(config, _exit_process, periods, worker_load)
    unblock_signals()
    threading.Thread(
        target=_send_heartbeats, args=(server, heartbeats), name="carry-heartbeat", daemon=True
    ).start()
    try:
        server.run(sockets=[listener])
    except (ModelsError, CarryError, RuntimeUnavailableError, SettingsError) as error:
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
