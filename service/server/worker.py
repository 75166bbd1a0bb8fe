"""One worker: its server with a graceful shutdown, its process, and the parent's handle of it.

A graceful shutdown has phases:

    lame duck    accepts requests, but fails its readiness check, and closes each connection after
                 the next response (`Connection: close`), so that clients and load balancers go
                 elsewhere
    retirement   another process serves the same port from now on: accepts no connection, and closes
                 each connection after its next response, or after its usual keep-alive time
    drain        closes idle connections at once, and the others after the current response

A request that arrives while an idle connection is being closed fails. So lame duck and retirement
leave to the drain only connections that no client has used for a while.

The process is a fork of its parent, or a new interpreter. A fork has what its parent has imported,
in memory that both share until one of them changes it. The parent must not have another thread,
since a lock that it holds would stay locked in the child. A fork keeps the descriptors of its
parent that it is given, and receives no signal before it has handlers of its own: until then the
parent's are installed. A new interpreter is for a parent that has threads, and for systems other
than Linux, where some libraries do not support forks.

A worker sends a heartbeat through a pipe twice a second, and shuts down gracefully when its parent
ends, even by a kill: otherwise it would keep the port.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Final, NamedTuple, NoReturn, cast

import structlog
import uvicorn

from service.server.connection_balance import Acceptor, WorkerLoad
from service.server.interface import LIFECYCLE, Lifecycle
from service.telemetry.logs import flush_logs

LATE_S: Final = 2.0
"""How long the pipeline continues after the server has waited CARRY_DRAIN_S for its requests: their
clients disconnected, and batches in their commit may finish."""

SIGRETIRE: Final = signal.SIGUSR1
"""Begins the retirement."""

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


class Periods(NamedTuple):
    """Longest durations of the phases of a graceful shutdown.

    Attributes:
        lame_duck_s: after the first SIGTERM.
        retire_s: longer than the keep-alive time of an idle connection.
        drain_s: of requests that were accepted.
    """

    lame_duck_s: float
    retire_s: float
    drain_s: float


class GracefulServer(uvicorn.Server):
    """uvicorn server whose process exits once it is drained, or immediately during start-up.

    uvicorn would finish its start-up before it stops, and the process would wait for threads that
    are still compiling a network.

    Args:
        exit_process: called in the main thread, also from a signal handler.
        periods: of the graceful shutdown.
        worker_load: its entry in the loads of all workers; None if it is alone.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        exit_process: Callable[[], NoReturn],
        periods: Periods,
        worker_load: WorkerLoad | None = None,
    ):
        super().__init__(config)
        self._worker_load = worker_load
        self._acceptors: list[Acceptor] = []
        self._exit_process = exit_process
        self._lame_duck_s = periods.lame_duck_s
        self._retire_s = periods.retire_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_retiring = False
        self._retired_at_s: float | None = None
        # uvicorn replaces these handlers while it runs, and raises the signals again once drained.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: exit_process())
        signal.signal(SIGRETIRE, lambda number, frame: self.retire())

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, then exit the process."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        self._exit_process()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the application, and accept connections."""
        load = self._worker_load
        # uvicorn would accept every connection that the kernel offers
        balanced = [] if load is None else sockets or []
        await super().startup([] if balanced else sockets)
        self._lifecycle: Lifecycle = self.lifespan.state[LIFECYCLE]
        if load is None:
            return
        create_protocol: Callable[[], asyncio.Protocol] = partial(
            cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        for listener in balanced:
            acceptor = Acceptor(listener, create_protocol, load, self._lifecycle.measure_load)
            acceptor.start(self.config.backlog)
            self._acceptors.append(acceptor)
        self.servers = cast("list[asyncio.Server]", self._acceptors)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain."""
        _notify(self._lifecycle.on_drain)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT while uvicorn runs."""
        if not self.started:
            self._exit_process()
        if self.should_exit and multiprocessing.parent_process() is not None:
            # A terminal signals parent and worker, and then the parent the worker: uvicorn would
            # take the second SIGINT for an impatient user and drop what it accepted.
            return
        has_lame_duck = self._lame_duck_s and not self._is_retiring
        if sig == signal.SIGTERM and has_lame_duck and self._loop is not None:
            lame_duck_s, self._lame_duck_s = self._lame_duck_s, 0.0
            self._loop.call_soon_threadsafe(self._start_lame_duck, lame_duck_s)
            return
        super().handle_exit(sig, frame)

    def retire(self) -> None:
        """Begin the retirement at the next tick; from a signal handler or another thread."""
        self._is_retiring = True

    async def on_tick(self, counter: int) -> bool:
        """Called every 0.1 s; returns whether to drain."""
        for acceptor in self._acceptors:
            acceptor.publish()
        if self._is_retiring:
            now_s = time.monotonic()
            if self._retired_at_s is None:
                self._retired_at_s = now_s
                log.info("worker_retiring", connections=len(self.server_state.connections))
                for server in self.servers:
                    server.close()
                _notify(self._lifecycle.on_retire)
            elif not self.server_state.connections or now_s - self._retired_at_s > self._retire_s:
                self.should_exit = True
        return await super().on_tick(counter)

    def _start_lame_duck(self, duration_s: float) -> None:
        log.info("lame_duck", duration_s=duration_s)
        _notify(self._lifecycle.on_lame_duck)
        asyncio.get_running_loop().call_later(duration_s, super().handle_exit, signal.SIGTERM, None)


def _notify(listeners: Sequence[Callable[[], None]]) -> None:
    for notify in listeners:
        notify()


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
        signal.pthread_sigmask(how, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


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
    # A closing terminal signals the whole process group; the parent decides what to do.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
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
