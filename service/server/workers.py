"""The workers of a service: started, monitored, restarted and drained.

With several workers, a `WorkerPool` keeps that many processes on one listening socket. The parent
reads the heartbeats of every worker (`worker`), and also waits on the process itself, so
that an exit is noticed at once, even during start-up. A worker that exits is restarted, with
exponential backoff while it keeps failing. The pool ends on a signal, or when no worker was ever
ready: then every start would fail in the same way, and the operator should know.

    SIGTERM            every worker fails its readiness check for the lame-duck time, then drains,
                       within its time; then the pool ends
    SIGINT             the same without the lame-duck time, which a second SIGTERM ends too
    SIGHUP             rolling restart: one worker after another, each retires once its successor is
                       ready, and the next one is replaced once it has exited

A `SingleWorker` serves in the parent process, which saves the memory of another one. Its rolling
restart starts a successor in a pool of one worker; once that is ready this server retires, and its
process remains as the parent of the pool.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawArray
from types import FrameType
from typing import Any, Final, NoReturn

import structlog

from service.server.connection_balance import NOT_ACCEPTING, WorkerLoad
from service.server.worker import (
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    SIGRETIRE,
    GracefulServer,
    Worker,
    WorkerConfig,
    start_worker,
)

BACKOFF_BASE_S: Final = 1.0
BACKOFF_CAP_S: Final = 30.0

KILL_MARGIN_S: Final = 5.0
"""How long a worker may take, after its drain time, to close its store and exit."""

log = structlog.get_logger(__name__)


class WorkersFailedError(Exception):
    """No worker was ever ready; the message is the failure of the last one."""


def _handle_hangup(stop: Callable[[int], None], restart: Callable[[], None]) -> None:
    """Handle SIGHUP, which a closing terminal and an operator send, unless it is ignored.

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

    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)


def _has_terminal() -> bool:
    """Whether the process has a controlling terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@dataclass(eq=False, slots=True)
class _Slot:
    """One slot of a pool.

    Attributes:
        worker: None until one that exited is restarted.
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


class WorkerPool:
    """A pool of worker processes of one application; one per process, in its main thread.

    Args:
        size: number of workers.
        fill: the load up to which a worker is filled before the next one gets any connection.
        on_restart: called when a worker that exited has been started again.

    Attributes:
        was_ready: whether any worker has been ready.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        size: int,
        fill: int = 1,
        on_restart: Callable[[], None] = lambda: None,
    ):
        self._config = config
        self._kill_after_s = config.periods.drain_s + KILL_MARGIN_S
        self._on_restart = on_restart
        self._slots = [_Slot() for _ in range(size)]
        self._fill = fill
        # a rolling restart has one worker more that starts and one that retires
        self._loads = RawArray("i", [NOT_ACCEPTING] * (size + 2))
        self._draining: list[Worker] = []
        self._to_replace: deque[_Slot] = deque()
        self.was_ready = False
        self._stop = self._stop_now = self._is_draining = False
        self._replace_all = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            WorkersFailedError: no worker was ever ready.
        """
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        _handle_hangup(self.stop, self.replace_all)
        try:
            while self.check():
                self._wait()
        finally:
            self.close()

    def close(self) -> None:
        """End all workers at once, and close the listener."""
        self._config.listener.close()
        for worker in self._workers():
            worker.kill()

    def stop(self, number: int, frame: object = None) -> None:
        """Handle SIGTERM or SIGINT; from a signal handler."""
        self._stop_now = self._stop or number == signal.SIGINT
        self._stop = True

    def replace_all(self) -> None:
        """Start a rolling restart; from a signal handler."""
        self._replace_all = True

    def _workers(self) -> Iterator[Worker]:
        for slot in self._slots:
            yield from (each for each in (slot.worker, slot.replacement) if each is not None)
        yield from self._draining

    def _unused_indexes(self) -> list[int]:
        """The entries of the shared loads that belong to no running worker."""
        used = {worker.load.index for worker in self._workers() if not worker.has_exited()}
        return [index for index in range(len(self._loads)) if index not in used]

    def _start(self) -> Worker:
        load = WorkerLoad(self._loads, self._unused_indexes()[0], self._fill)
        load.publish(NOT_ACCEPTING)
        worker = start_worker(self._config, load)
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

    def check(self) -> bool:
        """Read heartbeats, kill hung workers, and start those that are missing; without waiting.

        Returns:
            Whether to check again: False once the pool was stopped and every worker has exited.

        Raises:
            WorkersFailedError: no worker was ever ready.
        """
        if self._stop:
            return self._drain()
        for worker in self._workers():
            if worker.read_heartbeats():
                log.info("worker_ready", pid=worker.pid, after_s=worker.age_s())
                self.was_ready = True
            if worker.is_hung():
                log.error("worker_hangs", pid=worker.pid, unresponsive_s=HEARTBEAT_TIMEOUT_S)
                worker.kill()
        self._replace_next()
        for slot in self._slots:
            if slot.worker is not None and slot.worker.has_exited():
                self._schedule_restart(slot, slot.worker)
            elif slot.worker is None and self._may_start(slot):
                slot.worker = self._start()
                if slot.has_ended:
                    self._on_restart()
        self._draining = [worker for worker in self._draining if not worker.has_drained()]
        for index in self._unused_indexes():
            self._loads[index] = NOT_ACCEPTING
        return True

    def _may_start(self, slot: _Slot) -> bool:
        """Whether the worker of an empty slot may start: not again before any worker was ready."""
        return not slot.has_ended or (self.was_ready and time.monotonic() >= slot.start_at_s)

    def _schedule_restart(self, slot: _Slot, worker: Worker) -> None:
        """Schedule the restart of a worker that exited."""
        slot.worker, slot.has_ended = None, True
        slot.failures = 0 if worker.was_stable() else slot.failures + 1
        pause_s = 0.0
        if slot.failures:
            pause_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** (slot.failures - 1))
        slot.start_at_s = time.monotonic() + pause_s
        log.error(
            "worker_ended",
            pid=worker.pid,
            was_ready=worker.is_ready,
            reason=worker.exit_reason(),
            pause_s=pause_s,
        )
        if not self.was_ready and not any(self._workers()):
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
                retire_s = self._config.periods.retire_s
                slot.worker.end(SIGRETIRE, retire_s + self._kill_after_s)
                self._draining.append(slot.worker)
            slot.worker, slot.replacement, slot.failures = slot.replacement, None, 0
            self._to_replace.popleft()
        elif slot.replacement.has_exited():
            log.error(
                "replacement_failed", reason=slot.replacement.exit_reason(), kept=len(self._slots)
            )
            slot.replacement = None
            self._to_replace.clear()

    def _drain(self) -> bool:
        """Let the workers drain; returns whether any of them runs."""
        if not self._is_draining:
            self._is_draining = True
            log.info("workers_stopping", workers=len(list(self._workers())))
            # The workers have their own. Once they have closed them, connections are refused, and
            # load balancers send their requests elsewhere.
            self._config.listener.close()
            if not self._stop_now:
                lame_duck_s = self._config.periods.lame_duck_s
                self._end_all(signal.SIGTERM, lame_duck_s + self._kill_after_s)
        if self._stop_now:
            self._stop_now = False
            self._end_all(signal.SIGINT, self._kill_after_s)
        return not all(worker.has_drained() for worker in self._workers())

    def _end_all(self, number: int, kill_after_s: float) -> None:
        for worker in self._workers():
            worker.end(number, kill_after_s)


class SingleWorker(GracefulServer):
    """Serves in this process until a signal, then exits it.

    Args:
        exit_process: called in the main thread, also from a signal handler.
    """

    def __init__(self, config: WorkerConfig, exit_process: Callable[[], NoReturn]):
        super().__init__(config.uvicorn, self._end, config.periods)
        # this server loads its own config, which then cannot be pickled for another process; a fork
        # would have this one's threads and sessions of the runtime
        self._successor = config._replace(uvicorn=copy(config.uvicorn), without_threads=None)
        self._listener = config.listener
        self._exit = exit_process
        self._pool: WorkerPool | None = None
        self._is_replaced = False
        _handle_hangup(lambda number: self.handle_exit(number, None), self._replace)

    def serve_and_exit(self) -> None:
        """Serve until a signal, then exit the process."""
        self.run([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the application, and accept connections."""
        await super().startup(sockets)
        self._supervising = asyncio.create_task(self._supervise())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT while uvicorn runs."""
        if self._pool is not None:
            # a successor that is not ready is not needed any more
            self._pool.stop(sig if self._is_replaced else signal.SIGINT)
        if self._is_replaced:
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)

    def _replace(self) -> None:
        """Start the successor, or replace the one that serves."""
        if self._pool is not None:
            self._pool.replace_all()
        elif not self.should_exit:
            # this server closes its own listener
            listener = self._listener.dup()
            listener.set_inheritable(True)
            self._pool = WorkerPool(self._successor._replace(listener=listener), size=1)

    async def _supervise(self) -> None:
        """Check the pool of the successor while this server runs, or drains."""
        while True:
            if (pool := self._pool) is not None:
                try:
                    pool.check()
                except Exception as error:
                    log.error("replacement_failed", reason=str(error), kept=1)
                    pool.close()
                    self._pool = None
                if pool.was_ready and not self._is_replaced:
                    self._is_replaced = True
                    self.retire()
            await asyncio.sleep(HEARTBEAT_INTERVAL_S / 2)

    def _end(self) -> NoReturn:
        """Exit the process once its pool has ended, if there is one."""
        if self._pool is not None:
            if not self._is_replaced:
                self._pool.stop(signal.SIGINT)
            self._pool.run()
        self._exit()
