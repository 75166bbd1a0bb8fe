"""Worker processes on one listening socket: started, watched, replaced and drained.

The parent learns of a worker by a pipe on which it reports twice a second, and of its end by the
process itself, so that a death is noticed at once, also during a start. A worker that ends is
started again, with growing pauses while it fails. The pool ends when it is told to, and when
not one worker was ever ready: then it would fail in the same way for good, and whoever started it
should know.

    SIGTERM, SIGINT    every worker finishes what it accepted, within its time; then the pool ends
    SIGHUP             one worker after another is replaced by a new one, once that is ready

One pool per process, from the main thread.
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
from types import FrameType
from typing import Any, Final, NoReturn

import structlog
import uvicorn

from models.errors import ModelsError
from service.engine.runtimes import RuntimeUnavailableError
from service.errors import CarryError
from service.ops.logs import flush_logs
from service.settings import SettingsError

REPORT_S: Final = 0.5
"""How often a worker reports."""

WORKER_SILENT_S: Final = 30.0
"""A worker that does not report for this long hangs, and is killed: long enough for compiling a
large network, which holds the interpreter."""

FIRST_PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 30.0
STEADY_S: Final = 60.0
"""A worker that was ready for this long before it ended is started again without a pause."""

KILL_MARGIN_S: Final = 5.0
"""How much longer than its time to drain a worker may take to close its store and end."""

SIGHUP: Final[signal.Signals | None] = getattr(signal, "SIGHUP", None)
"""None on Windows."""

log = structlog.get_logger(__name__)
_spawn = multiprocessing.get_context("spawn")


class WorkersFailedError(Exception):
    """Not one worker was ever ready; the message is the reason of the last."""


class Server(uvicorn.Server):
    """uvicorn's server, which leaves when all is drained, or at once where nothing is served yet.

    uvicorn itself starts to the end before it stops, and its process then waits for threads that
    still compile a network.

    Args:
        leave: ends the process; called in the main thread, also by a signal's handler.
    """

    def __init__(self, config: uvicorn.Config, leave: Callable[[], NoReturn]):
        super().__init__(config)
        self._leave = leave
        # uvicorn replaces these while it runs, and raises the signals again when all is drained
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: leave())

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, then leave."""
        await super().serve(sockets)
        self._leave()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of the signals while it runs."""
        if not self.started:
            self._leave()
        super().handle_exit(sig, frame)


class WorkerPool:
    """A number of workers of one application.

    Args:
        config: what each worker runs.
        listener: the socket that all of them accept from.
        size: how many.
        drain_s: how long a worker that is to end may go on with what it accepted, in seconds.
    """

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, *, size: int, drain_s: float
    ):
        self._config = config
        self._listener = listener
        self._kill_after_s = drain_s + KILL_MARGIN_S
        self._slots = [_Slot() for _ in range(size)]
        self._draining: list[_Worker] = []
        self._to_replace: deque[_Slot] = deque()
        self._was_ready = False
        self._stop = False
        self._replace_all = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            WorkersFailedError: no worker was ever ready, and the last one failed to start.
        """
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        if SIGHUP is not None and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
            signal.signal(SIGHUP, self._on_replace)
        try:
            for slot in self._slots:
                slot.worker = self._start()
            while not self._stop:
                self._wait()
                self._step()
            self._drain_all()
        finally:
            for worker in self._workers():
                worker.kill()

    def _on_stop(self, number: int, frame: object) -> None:
        self._stop = True

    def _on_replace(self, number: int, frame: object) -> None:
        self._replace_all = True

    def _workers(self) -> Iterator[_Worker]:
        for slot in self._slots:
            yield from (each for each in (slot.worker, slot.replacement) if each is not None)
        yield from self._draining

    def _start(self) -> _Worker:
        worker = _Worker(self._config, self._listener)
        log.info("worker_started", pid=worker.pid)
        return worker

    def _wait(self) -> None:
        """Wait until a worker reports or ends, or a moment: signals do not end the wait."""
        objects: list[Any] = []
        for worker in self._workers():
            if not worker.has_ended():
                objects.append(worker.process.sentinel)
                if not worker.reports.closed:
                    objects.append(worker.reports)
        wait(objects, REPORT_S / 2)

    def _step(self) -> None:
        for worker in self._workers():
            if worker.read_reports():
                self._was_ready = True
                log.info("worker_ready", pid=worker.pid, after_s=worker.age_s())
            if worker.is_silent():
                log.error("worker_hangs", pid=worker.pid, silent_s=WORKER_SILENT_S)
                worker.kill()
        self._replace_next()
        for slot in self._slots:
            if slot.worker is not None and slot.worker.has_ended():
                self._note_end(slot, slot.worker)
            elif slot.worker is None and self._was_ready and time.monotonic() >= slot.start_at_s:
                slot.worker = self._start()
        self._draining = [worker for worker in self._draining if not worker.is_gone()]

    def _note_end(self, slot: _Slot, worker: _Worker) -> None:
        """Decide when a worker is started again."""
        slot.worker = None
        slot.failures = 0 if worker.was_steady() else slot.failures + 1
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (slot.failures - 1)) if slot.failures else 0
        slot.start_at_s = time.monotonic() + pause_s
        log.error(
            "worker_ended",
            pid=worker.pid,
            was_ready=worker.is_ready,
            reason=worker.reason(),
            pause_s=pause_s,
        )
        if not self._was_ready and not any(self._workers()):
            raise WorkersFailedError(worker.reason())

    def _replace_next(self) -> None:
        """After SIGHUP: one worker at a time, each by one that is ready."""
        if self._replace_all and not self._to_replace:
            self._replace_all = False
            self._to_replace = deque(self._slots)
            log.info("workers_replacing", workers=len(self._slots))
        if not self._to_replace:
            return
        slot = self._to_replace[0]
        if slot.replacement is None:
            slot.replacement = self._start()
        elif slot.replacement.is_ready:
            if slot.worker is not None:
                slot.worker.terminate(self._kill_after_s)
                self._draining.append(slot.worker)
            slot.worker, slot.replacement, slot.failures = slot.replacement, None, 0
            self._to_replace.popleft()
        elif slot.replacement.has_ended():
            log.error("replacement_failed", reason=slot.replacement.reason(), kept=len(self._slots))
            slot.replacement = None
            self._to_replace.clear()

    def _drain_all(self) -> None:
        log.info("workers_stopping", workers=len(list(self._workers())))
        for worker in self._workers():
            worker.terminate(self._kill_after_s)
        while not all(worker.is_gone() for worker in self._workers()):
            self._wait()


@dataclass(eq=False, slots=True)
class _Slot:
    """The place of one worker.

    Attributes:
        worker: None while a failed one is not started again.
        replacement: the worker that is to take its place, until it is ready.
        failures: how often in a row it ended before it was steady.
        start_at_s: when it is started again.
    """

    worker: _Worker | None = None
    replacement: _Worker | None = None
    failures: int = 0
    start_at_s: float = 0.0


class _Worker:
    """One worker process, as the parent sees it."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket):
        self.reports, theirs = _spawn.Pipe(duplex=False)
        self.process = _spawn.Process(target=_work, args=(config, listener, theirs))
        self.process.start()
        # so that its end ends the pipe
        theirs.close()
        self.is_ready = False
        self._reason = ""
        self._started_s = self._heard_s = self._ready_s = time.monotonic()
        self._kill_at_s: float | None = None

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def age_s(self) -> float:
        return round(time.monotonic() - self._started_s, 3)

    def read_reports(self) -> bool:
        """Take in what it reported; whether it is ready since."""
        was_ready = self.is_ready
        try:
            while not self.reports.closed and self.reports.poll():
                report = self.reports.recv()
                self._heard_s = time.monotonic()
                if isinstance(report, str):
                    self._reason = report
                else:
                    self.is_ready = report
        except (EOFError, OSError):
            self.reports.close()
        if was_ready or not self.is_ready:
            return False
        self._ready_s = time.monotonic()
        return True

    def is_silent(self) -> bool:
        return not self.has_ended() and time.monotonic() - self._heard_s > WORKER_SILENT_S

    def was_steady(self) -> bool:
        return self.is_ready and time.monotonic() - self._ready_s >= STEADY_S

    def has_ended(self) -> bool:
        return self.process.exitcode is not None

    def reason(self) -> str:
        """Why it ended."""
        self.read_reports()
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        return self._reason or f"the worker ended with {how}"

    def terminate(self, kill_after_s: float) -> None:
        """Let it finish what it accepted and end."""
        self._kill_at_s = time.monotonic() + kill_after_s
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def is_gone(self) -> bool:
        """Whether it ended after `terminate`, which it is made to when its time is up."""
        if self.has_ended():
            return True
        if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
            log.error("worker_killed", pid=self.pid)
            self.kill()
            return True
        return False


def _work(config: uvicorn.Config, listener: socket.socket, reports: Connection[Any, Any]) -> None:
    """What a worker process runs."""
    if SIGHUP is not None:
        # a terminal that closes tells the whole group; the parent says what comes of it
        signal.signal(SIGHUP, signal.SIG_IGN)
    server = Server(config, _leave)
    threading.Thread(
        target=_report, args=(server, reports), name="carry-report", daemon=True
    ).start()
    try:
        server.run(sockets=[listener])
    except (ModelsError, CarryError, RuntimeUnavailableError, SettingsError) as error:
        reports.send(str(error))
        sys.exit(1)


def _leave() -> NoReturn:
    flush_logs()
    os._exit(0)


def _report(server: Server, reports: Connection[Any, Any]) -> None:
    """Tell the parent twice a second that this process runs, and whether it serves."""
    pause = threading.Event()
    try:
        while True:
            reports.send(server.started)
            pause.wait(REPORT_S)
    except OSError:
        return
