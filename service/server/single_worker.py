"""The worker of a service with one worker: it serves in the parent process, which saves a process.

SIGHUP is a rolling restart, as in a pool of several workers: a successor starts in a child process,
and once it is ready this server retires, and its process remains as the parent of a pool of one
worker.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from copy import copy
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn

from service.server.graceful_server import GracefulServer, Periods
from service.server.process_start import SIGHUP, spawn
from service.server.worker_pool import WorkerPool, WorkersFailedError, on_hangup

JOIN_INTERVAL_S = 0.5

log = structlog.get_logger(__name__)


class SingleWorker(GracefulServer):
    """Serves in this process until a signal, then exits it.

    Args:
        listener: the socket that it accepts from.
        exit_process: called in the main thread, also from a signal handler.
        periods: of the graceful shutdown.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        exit_process: Callable[[], NoReturn],
        periods: Periods,
    ):
        super().__init__(config, self._end, periods)
        # this server loads its own config, which then cannot be pickled for another process
        self._unloaded_config = copy(config)
        self._listener = listener
        self._exit = exit_process
        self._periods = periods
        self._pool: WorkerPool | None = None
        self._thread: threading.Thread | None = None
        self._is_replaced = False
        if SIGHUP is not None and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
            signal.signal(
                SIGHUP, on_hangup(lambda number: self.handle_exit(number, None), self._replace)
            )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, then exit the process."""
        super().run(sockets or [self._listener])

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
            self._pool = WorkerPool(
                self._unloaded_config,
                listener,
                self._periods,
                # this process has threads, and sessions of the runtime
                spawn,
                size=1,
                on_ready=self._retire_for_successor,
            )
            self._thread = threading.Thread(
                target=self._supervise, args=(self._pool, listener), name="carry-pool"
            )
            self._thread.start()

    def _retire_for_successor(self) -> None:
        self._is_replaced = True
        self.retire()

    def _supervise(self, pool: WorkerPool, listener: socket.socket) -> None:
        with listener:
            try:
                pool.supervise()
            except WorkersFailedError as error:
                log.error("replacement_failed", reason=str(error), kept=1)
                self._pool = None

    def _end(self) -> NoReturn:
        """Exit the process once its pool has ended, if there is one."""
        if self._pool is not None and self._thread is not None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._pool.stop)
            if not self._is_replaced:
                self._pool.stop(signal.SIGINT)
            while self._thread.is_alive():
                self._thread.join(JOIN_INTERVAL_S)
        self._exit()
