"""Balances new connections between the workers that accept from one listening socket.

The kernel wakes every worker for a new connection (the thundering herd), and the first one accepts
all that wait: of 32 connections one worker may get 31. Here each worker publishes its load in
memory that all of them share, and accepts only in its turn (`is_next`). A worker that is not filled
yet gets the next connections, so that few connections make full batches in one worker and not small
ones in each; once all are filled, the one with the least load gets them.

No worker depends on another: a connection that waits for `DEFER_S` is accepted out of turn, and
those behind it after ever shorter waits, so that a worker that hangs, dies or is busy delays all of
them by hardly more than twice as long. No connection is rejected or moved here.
Use `Acceptor` from one event loop.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from typing import Final

import structlog

DEFER_S: Final = 0.05
"""How long a connection waits for the worker whose turn it is."""

DEFER_TICK_S: Final = 0.001
"""Interval at which a worker checks meanwhile whether its turn has come."""

SLACK_SHARE: Final = 8
"""A worker may be ahead of the others by one in this many connections, so that not every connection
changes the turn."""

ACCEPTED_AT_ONCE: Final = 64
"""Connections that are accepted in one turn of the event loop."""

RETRY_S: Final = 1.0
"""Pause after a failure to accept, such as too many open files; also how long a worker with load
`FULL` leaves a connection to the others."""

NOT_ACCEPTING: Final = -1
"""Load of a worker that does not accept connections."""

FULL: Final = 2**30
"""Load of a worker that would reject a connection."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's entry in the loads of all workers that accept from one socket.

    Attributes:
        loads: the load of each worker, in memory that all of them share.
        index: that of this worker's entry.
        fill: the load up to which a worker is filled before the next one gets any connection.
    """

    loads: MutableSequence[int]
    index: int
    fill: int

    def publish(self, load: int) -> None:
        """Publish the load of this worker."""
        self.loads[self.index] = load

    def is_next(self) -> bool:
        """Whether this worker is to accept the next connection.

        Of the workers that are not filled the one with the most load is next; once all are filled,
        each whose load exceeds the least by at most one in `SLACK_SHARE`.
        """
        index, fill, own = self.index, self.fill, self.loads[self.index]
        others = [(load, at) for at, load in enumerate(self.loads) if load >= 0 and at != index]
        if own < fill:
            return all((own, -index) > (load, -at) for load, at in others if load < fill)
        return all(load >= fill and own <= load + own // SLACK_SHARE for load, _ in others)


class Acceptor:
    """Accepts a worker's connections; closed like an asyncio server.

    Args:
        listener: the socket that all workers accept from; not closed here.
        create_protocol: makes the protocol of a connection.
        worker_load: its entry in the loads that all workers share.
        measure_load: returns this worker's load, with the connections that are open.
    """

    def __init__(
        self,
        listener: socket.socket,
        create_protocol: Callable[[], asyncio.Protocol],
        worker_load: WorkerLoad,
        measure_load: Callable[[], int],
    ):
        self._listener = listener
        self._create_protocol = create_protocol
        self._worker_load = worker_load
        self._measure_load = measure_load
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self, backlog: int) -> None:
        """Listen and accept."""
        self._listener.setblocking(False)
        self._listener.listen(backlog)
        self.publish()
        self._accepting = self._loop.create_task(self._accept_until_closed())

    def publish(self) -> int:
        """Publish and return the load, which also falls when connections close or become idle."""
        if self._is_closed:
            return NOT_ACCEPTING
        load = self._measure_load() + len(self._opening)
        self._worker_load.publish(load)
        return load

    def close(self) -> None:
        """Stop accepting."""
        if self._is_closed:
            return
        self._is_closed = True
        self._worker_load.publish(NOT_ACCEPTING)
        if self._accepting is not None:
            self._accepting.cancel()

    async def wait_closed(self) -> None:
        """Wait until the accepted connections are open."""
        if self._opening:
            await asyncio.wait(self._opening)

    async def _accept_until_closed(self) -> None:
        """Accept in this worker's turn; and out of turn, after a wait, one connection.

        The worker whose turn it is hardly takes the connections behind that one, so they wait half
        as long each.
        """
        patience, skipped_at_s = 1.0, 0.0
        while True:
            try:
                await self._wait_for_connection()
                now_s = self._loop.time()
                if now_s - skipped_at_s > RETRY_S:
                    patience = 1.0
                until_s = now_s + patience * (DEFER_S if self.publish() < FULL else RETRY_S)
                while not (is_next := self._worker_load.is_next()) and self._loop.time() < until_s:
                    await asyncio.sleep(DEFER_TICK_S)
                    self.publish()
                has_accepted = self._accept()
                if is_next:
                    for _ in range(ACCEPTED_AT_ONCE):
                        if not (has_accepted and self._worker_load.is_next()):
                            break
                        has_accepted = self._accept()
                elif has_accepted:
                    patience, skipped_at_s = patience / 2, self._loop.time()
                else:
                    patience = 1.0
            except Exception as error:
                log.error("accept_failed", reason=str(error), pause_s=RETRY_S)
                await asyncio.sleep(RETRY_S)

    async def _wait_for_connection(self) -> None:
        ready = asyncio.Event()
        self._loop.add_reader(self._listener, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(self._listener)

    def _accept(self) -> bool:
        """Accept one connection; returns whether one was waiting.

        Raises:
            OSError: there are too many open files, for example.
        """
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionAbortedError:
            return True
        sock.setblocking(False)
        task = self._loop.create_task(self._open(sock))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        self.publish()
        return True

    async def _open(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._create_protocol, sock)
        except OSError as error:
            # the client disconnected meanwhile
            log.debug("connection_not_opened", reason=error.strerror)
            sock.close()
