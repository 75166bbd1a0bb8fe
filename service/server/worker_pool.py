"""Worker processes on one listening socket: started, monitored, restarted and drained.

The parent reads the heartbeats of every worker (`worker_process`), and also waits on the process
itself, so that an exit is noticed at once, even during start-up. A worker that exits is restarted,
with exponential backoff while it keeps failing. The pool ends on a signal, or when no worker was
ever ready: then every start would fail in the same way, and the operator should know.

    SIGTERM            every worker fails its readiness check for the lame-duck time, then drains,
                       within its time; then the pool ends
    SIGINT             the same without the lame-duck time, which a second SIGTERM ends too
    SIGHUP             rolling restart: one worker after another, each retires once its successor is
                       ready, and the next one is replaced once it has exited

One pool per process. `run` is for the main thread, `supervise` for any.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawArray
from typing import Any, Final

import structlog
import uvicorn

from service.server.connection_balance import NOT_ACCEPTING, WorkerLoad
from service.server.graceful_server import Periods
from service.server.process_start import SIGHUP, StartProcess
from service.server.worker_process import (
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    Worker,
    start_worker,
)
from service.telemetry.metrics import WorkerRestarts

BACKOFF_BASE_S: Final = 1.0
BACKOFF_CAP_S: Final = 30.0

KILL_MARGIN_S: Final = 5.0
"""How long a worker may take, after its drain time, to close its store and exit."""

log = structlog.get_logger(__name__)


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
        start: starts a process.
        size: number of workers.
        fill: the load up to which a worker is filled before the next one gets any connection.
        on_ready: called once, when the first worker is ready.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        periods: Periods,
        start: StartProcess,
        *,
        size: int,
        fill: int = 1,
        on_ready: Callable[[], None] = lambda: None,
    ):
        self._config = config
        self._listener = listener
        self._periods = periods
        self._start_process = start
        self._kill_after_s = periods.drain_s + KILL_MARGIN_S
        self._on_ready = on_ready
        self._slots = [_Slot() for _ in range(size)]
        self._fill = fill
        # a rolling restart has one worker more that starts and one that retires
        self._loads = RawArray("i", [NOT_ACCEPTING] * (size + 2))
        self._draining: list[Worker] = []
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

    def _workers(self) -> Iterator[Worker]:
        for slot in self._slots:
            yield from (each for each in (slot.worker, slot.replacement) if each is not None)
        yield from self._draining

    def _start(self) -> Worker | None:
        """Start a worker; None if no process can be started now, which is tried again soon."""
        used = self._used_indexes()
        index = next(index for index in range(len(self._loads)) if index not in used)
        worker_load = WorkerLoad(self._loads, index, self._fill)
        worker_load.publish(NOT_ACCEPTING)
        worker = start_worker(
            self._start_process, self._config, self._listener, self._periods, worker_load
        )
        if worker is not None:
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
            elif slot.worker is None and self._may_start(slot):
                slot.worker = self._start()
                if slot.worker is not None and slot.has_ended:
                    self._restarts.count()
        self._draining = [worker for worker in self._draining if not worker.has_drained()]
        used = self._used_indexes()
        for index in range(len(self._loads)):
            if index not in used:
                self._loads[index] = NOT_ACCEPTING

    def _may_start(self, slot: _Slot) -> bool:
        """Whether the worker of an empty slot may start: not again before any worker was ready."""
        return not slot.has_ended or (self._was_ready and time.monotonic() >= slot.start_at_s)

    def _used_indexes(self) -> set[int]:
        return {worker.load.index for worker in self._workers() if not worker.has_exited()}

    def _schedule_restart(self, slot: _Slot, worker: Worker) -> None:
        """Schedule the restart of a worker that exited."""
        slot.worker, slot.has_ended = None, True
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
        worker: None until one can be started, or until one that exited is restarted.
        replacement: the worker that takes over once it is ready.
        has_ended: whether a worker of the slot has exited.
        failures: consecutive exits before `BACKOFF_RESET_S`.
        start_at_s: when the worker is restarted.
    """

    worker: Worker | None = None
    replacement: Worker | None = None
    has_ended: bool = False
    failures: int = 0
    start_at_s: float = 0.0
