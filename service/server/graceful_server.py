"""uvicorn's server with graceful shutdown in phases: lame duck, retirement, drain.

    lame duck    accepts requests, but fails its readiness check, and closes each connection after
                 the next response (`Connection: close`), so that clients and load balancers go
                 elsewhere
    retirement   another process serves the same port from now on: accepts no connection, and closes
                 each connection after its next response, or after its usual keep-alive time
    drain        closes idle connections at once, and the others after the current response

A request that arrives while an idle connection is being closed fails. So lame duck and retirement
leave to the drain only connections that no client has used for a while.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Final, NamedTuple, NoReturn, cast

import structlog
import uvicorn

from service.server.connection_balance import Acceptor, WorkerLoad
from service.server.interface import LIFECYCLE, Lifecycle

LATE_S: Final = 2.0
"""How long the pipeline continues after the server has waited CARRY_DRAIN_S for its requests: their
clients disconnected, and batches in their commit may finish."""

SIGHUP: Final[signal.Signals | None] = getattr(signal, "SIGHUP", None)
"""Begins a rolling restart; None on Windows."""

SIGRETIRE: Final[signal.Signals | None] = getattr(signal, "SIGUSR1", None)
"""Begins the retirement; None on Windows."""

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
        if SIGRETIRE is not None:
            signal.signal(SIGRETIRE, lambda number, frame: self.retire())

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, then exit the process."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        self._exit_process()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the application, and accept connections."""
        load = self._worker_load
        # uvicorn's own servers would accept whatever the kernel offers; the event loops of Windows
        # do not watch a socket
        balanced = [] if load is None or os.name == "nt" else sockets or []
        await super().startup([] if balanced else sockets)
        self._lifecycle: Lifecycle = self.lifespan.state[LIFECYCLE]
        if load is None or not balanced:
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
