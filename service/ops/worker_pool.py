"""Worker processes on one listening socket: started, monitored, restarted and drained.

Every worker sends a heartbeat twice a second through a pipe, and the parent also waits on the
process itself, so that an exit is noticed at once, even during start-up. A worker that exits is
restarted, with exponential backoff while it keeps failing. The pool ends on a signal, or when no
worker was ever ready: then every start would fail in the same way, and the operator should know.

    SIGTERM            every worker fails its readiness check for the lame-duck time, then drains,
                       within its time; then the pool ends
    SIGINT             the same without the lame-duck time, which a second SIGTERM ends too
    SIGHUP             rolling restart: one worker after another, each retires once its successor is
                       ready, and the next one is replaced once it has exited

One pool per process. `run` is for the main thread, `supervise` for any.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final, NoReturn

import structlog
import uvicorn

from models.errors import ModelsError
from service.core.errors import CarryError
from service.engine.runtimes.loading import RuntimeUnavailableError
from service.ops.connection_balance import NOT_ACCEPTING, WorkerLoad
from service.ops.graceful_server import SIGRETIRE, GracefulServer, Periods
from service.ops.logs import flush_logs
from service.ops.metrics import WorkerRestarts
from service.settings import SettingsError

HEARTBEAT_INTERVAL_S: Final = 0.5
"""Interval of a worker's heartbeats."""

HEARTBEAT_TIMEOUT_S: Final = 30.0
"""A worker without a heartbeat for this long counts as hung and is killed. Long enough to compile a
large network, which holds the interpreter lock."""

BACKOFF_BASE_S: Final = 1.0
BACKOFF_CAP_S: Final = 30.0
BACKOFF_RESET_S: Final = 60.0
"""A worker that was ready for this long before it exited is restarted without backoff."""

KILL_MARGIN_S: Final = 5.0
"""How long a worker may take, after its drain time, to close its store and exit."""

SIGHUP: Final[signal.Signals | None] = getattr(signal, "SIGHUP", None)
"""None on Windows."""

log = structlog.get_logger(__name__)
_spawn = multiprocessing.get_context("spawn")


class WorkersFailedError(Exception):
    """No worker was ever ready; the message is the failure of the last one."""


def on_hangup(
    stop: Callable[[int], None], restart: Callable[[], None]
) -> Callable[[int, object], None]:
    """Return a handler of SIGHUP, which a closing terminal and an operator send.

    Args:
        stop: called if the terminal was closed.
        restart: called otherwise.
    """
    had_terminal = _has_terminal()

    def handle(number: int, frame: object) -> None:
        if had_terminal and not _has_terminal():
            stop(number)
        else:
            restart()

    return handle


def _has_terminal() -> bool:
    """Whether the process has a controlling terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


class WorkerPool:
    """A pool of worker processes of one application.

    Args:
        config: uvicorn's configuration of a worker.
        listener: the socket that all workers accept from.
        periods: of the workers' graceful shutdown.
        size: number of workers.
        fill: the load up to which a worker is filled before the next one gets any connection.
        on_ready: called once, when the first worker is ready.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        periods: Periods,
        *,
        size: int,
        fill: int = 1,
        on_ready: Callable[[], None] = lambda: None,
    ):
        self._config = config
        self._listener = listener
        self._periods = periods
        self._kill_after_s = periods.drain_s + KILL_MARGIN_S
        self._on_ready = on_ready
        self._slots = [_Slot() for _ in range(size)]
        self._fill = fill
        # a rolling restart has one worker more that starts and one that retires
        self._loads = _spawn.RawArray("i", [NOT_ACCEPTING] * (size + 2))
        self._draining: list[_Worker] = []
        self._to_replace: deque[_Slot] = deque()
        self._was_ready = False
        self._stop = False
        self._stop_now = False
        self._replace_all = False
        self._restarts = WorkerRestarts()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            WorkersFailedError: no worker was ever ready.
        """
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        if SIGHUP is not None and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
            signal.signal(SIGHUP, on_hangup(self.stop, self.replace_all))
        self.supervise()

    def supervise(self) -> None:
        """Serve until `stop`.

        Raises:
            WorkersFailedError: no worker was ever ready.
        """
        try:
            for slot in self._slots:
                slot.worker = self._start()
            while not self._stop:
                self._wait()
                self._check_workers()
            self._drain_all()
        finally:
            for worker in self._workers():
                worker.kill()

    def stop(self, number: int, frame: object = None) -> None:
        """Handle SIGTERM or SIGINT; from a signal handler or another thread."""
        self._stop_now = self._stop or number == signal.SIGINT
        self._stop = True

    def replace_all(self) -> None:
        """Start a rolling restart; from a signal handler or another thread."""
        self._replace_all = True

    def _workers(self) -> Iterator[_Worker]:
        for slot in self._slots:
            yield from (each for each in (slot.worker, slot.replacement) if each is not None)
        yield from self._draining

    def _start(self) -> _Worker:
        used = self._used_indexes()
        index = next(index for index in range(len(self._loads)) if index not in used)
        worker_load = WorkerLoad(self._loads, index, self._fill)
        worker_load.publish(NOT_ACCEPTING)
        worker = _Worker(self._config, self._listener, self._periods, worker_load)
        log.info("worker_started", pid=worker.pid)
        return worker

    def _wait(self) -> None:
        """Wait for a heartbeat or an exit, with a short timeout, as signals do not end the wait."""
        objects: list[Any] = []
        for worker in self._workers():
            if not worker.has_exited():
                objects.append(worker.process.sentinel)
                if not worker.heartbeats.closed:
                    objects.append(worker.heartbeats)
        wait(objects, HEARTBEAT_INTERVAL_S / 2)

    def _check_workers(self) -> None:
        """Read heartbeats, kill hung workers, and restart those that exited."""
        for worker in self._workers():
            if worker.read_heartbeats():
                log.info("worker_ready", pid=worker.pid, after_s=worker.age_s())
                if not self._was_ready:
                    self._was_ready = True
                    self._on_ready()
            if worker.is_hung():
                log.error("worker_hangs", pid=worker.pid, unresponsive_s=HEARTBEAT_TIMEOUT_S)
                worker.kill()
        self._replace_next()
        for slot in self._slots:
            if slot.worker is not None and slot.worker.has_exited():
                self._schedule_restart(slot, slot.worker)
            elif slot.worker is None and self._was_ready and time.monotonic() >= slot.start_at_s:
                slot.worker = self._start()
                self._restarts.count()
        self._draining = [worker for worker in self._draining if not worker.has_drained()]
        used = self._used_indexes()
        for index in range(len(self._loads)):
            if index not in used:
                self._loads[index] = NOT_ACCEPTING

    def _used_indexes(self) -> set[int]:
        return {worker.load.index for worker in self._workers() if not worker.has_exited()}

    def _schedule_restart(self, slot: _Slot, worker: _Worker) -> None:
        """Schedule the restart of a worker that exited."""
        slot.worker = None
        slot.failures = 0 if worker.was_stable() else slot.failures + 1
        backoff_s = (
            min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** (slot.failures - 1)) if slot.failures else 0
        )
        slot.start_at_s = time.monotonic() + backoff_s
        log.error(
            "worker_ended",
            pid=worker.pid,
            was_ready=worker.is_ready,
            reason=worker.exit_reason(),
            pause_s=backoff_s,
        )
        if not self._was_ready and not any(self._workers()):
            raise WorkersFailedError(worker.exit_reason())

    def _replace_next(self) -> None:
        """Continue a rolling restart: one worker at a time, each once its replacement is ready.

        So there is at most one process more than workers.
        """
        if self._replace_all and not self._to_replace:
            self._replace_all = False
            self._to_replace = deque(self._slots)
            log.info("workers_replacing", workers=len(self._slots))
        if not self._to_replace:
            return
        slot = self._to_replace[0]
        if slot.replacement is None:
            if not self._draining:
                slot.replacement = self._start()
        elif slot.replacement.is_ready:
            if slot.worker is not None:
                slot.worker.retire(self._periods.retire_s + self._kill_after_s)
                self._draining.append(slot.worker)
            slot.worker, slot.replacement, slot.failures = slot.replacement, None, 0
            self._to_replace.popleft()
        elif slot.replacement.has_exited():
            log.error(
                "replacement_failed", reason=slot.replacement.exit_reason(), kept=len(self._slots)
            )
            slot.replacement = None
            self._to_replace.clear()

    def _drain_all(self) -> None:
        log.info("workers_stopping", workers=len(list(self._workers())))
        # The workers have their own. Once they have closed them, connections are refused, and load
        # balancers send their requests elsewhere.
        self._listener.close()
        if not self._stop_now:
            for worker in self._workers():
                worker.terminate(self._periods.lame_duck_s + self._kill_after_s)
        while not all(worker.has_drained() for worker in self._workers()):
            if self._stop_now:
                self._stop_now = False
                for worker in self._workers():
                    worker.drain(self._kill_after_s)
            self._wait()


@dataclass(eq=False, slots=True)
class _Slot:
    """One slot of the pool.

    Attributes:
        worker: None until a failed worker is restarted.
        replacement: the worker that takes over once it is ready.
        failures: consecutive exits before `BACKOFF_RESET_S`.
        start_at_s: when the worker is restarted.
    """

    worker: _Worker | None = None
    replacement: _Worker | None = None
    failures: int = 0
    start_at_s: float = 0.0


class _Worker:
    """The parent's view of one worker process."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        periods: Periods,
        load: WorkerLoad,
    ):
        self.load = load
        self.heartbeats, child_end = _spawn.Pipe(duplex=False)
        self.process = _spawn.Process(
            target=_run_worker, args=(config, listener, child_end, periods, load)
        )
        self.process.start()
        # Otherwise the pipe would stay open after the worker exits.
        child_end.close()
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
    threading.Thread(
        target=_send_heartbeats, args=(server, heartbeats), name="carry-heartbeat", daemon=True
    ).start()
    try:
        server.run(sockets=[listener])
    except (ModelsError, CarryError, RuntimeUnavailableError, SettingsError) as error:
        heartbeats.send(str(error))
        sys.exit(1)


def _exit_process() -> NoReturn:
    """Exit without waiting for threads that are still compiling."""
    flush_logs()
    os._exit(0)


def _send_heartbeats(server: GracefulServer, heartbeats: Connection[Any, Any]) -> None:
    """Send heartbeats to the parent: whether this process is ready."""
    pause = threading.Event()
    try:
        while True:
            heartbeats.send(server.started)
            pause.wait(HEARTBEAT_INTERVAL_S)
    except OSError:
        return
