"""Proxies between the processes of a test: they forward bytes unchanged, and lose, cut or delay
connections on demand. For one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Direction = Literal["request", "reply"]
Hook = Callable[[], Awaitable[object]]
Target = tuple[str, int] | str
"""Host and port, or the path of a unix socket."""

_MOST_BYTES = 1 << 18


class CutError(Exception):
    """Ends a connection, once the bytes in `rest` were forwarded."""

    def __init__(self, rest: bytes = b""):
        self.rest = rest


@dataclass(slots=True, eq=False)
class Connection:
    """One connection through a proxy.

    Attributes:
        owner: name of the process that made it; None until it is known.
        notes: the watcher's own.
        held: requests that are held back; None: they are forwarded.
        ended: set once all bytes have passed.
    """

    front: asyncio.StreamWriter
    owner: str | None = None
    notes: Any = None
    back: asyncio.StreamWriter | None = None
    held: list[bytes] | None = None
    release: Hook | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def hold(self, release: Hook, *, silent: bool) -> None:
        """Hold all requests back from now on: the server receives them after the client's side has
        ended and `release` has returned.

        Args:
            silent: whether the client times out by itself; otherwise its side is cut at once.
        """
        self.held, self.release = [], release
        if not silent:
            self.front.transport.abort()

    def abort(self) -> None:
        """End both sides at once."""
        for side in (self.front, self.back):
            if side is not None:
                side.transport.abort()


class Proxy:
    """A listener that forwards to a target, which can move. Subclasses override `inspect`.

    Args:
        target: where the server is now; None while it is unavailable.
        owner: name of the process whose connections these are, if they are one process's.
    """

    def __init__(self, target: Callable[[], Target | None], owner: str | None = None):
        self.owner = owner
        self.port = 0
        self.connections: dict[Connection, asyncio.Task[None]] = {}
        self._target = target

    async def inspect(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """Called with all bytes before they are forwarded.

        Raises:
            CutError: the connection has to end.
        """

    @asynccontextmanager
    async def listening(self, socket: str | None = None) -> AsyncIterator[Self]:
        """Listen on a unix socket, or on a free port of the loopback; end all connections after."""
        if socket is not None:
            server = await asyncio.start_unix_server(self._serve, socket, limit=_MOST_BYTES)
        else:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_MOST_BYTES)
            self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            while self.connections:
                for task in self.connections.values():
                    task.cancel()
                await asyncio.sleep(0)

    async def wait_until_drained(
        self, choice: Callable[[Connection], bool] = lambda _: True
    ) -> None:
        """Wait until the chosen ones of the present connections have ended."""
        chosen = [each for each in self.connections if choice(each)]
        await asyncio.gather(*(connection.ended.wait() for connection in chosen))

    async def _serve(self, requests: asyncio.StreamReader, front: asyncio.StreamWriter) -> None:
        connection = Connection(front, self.owner)
        self.connections[connection] = asyncio.current_task()
        pumps: list[asyncio.Task[None]] = []
        # the server is unavailable, or a peer was killed; asyncio reports a cancelled callback
        with contextlib.suppress(OSError, asyncio.CancelledError):
            replies, connection.back = await self._connect()
            sides = (("request", requests, connection.back), ("reply", replies, front))
            pumps = [asyncio.create_task(self._pump(connection, *side)) for side in sides]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if connection.release is not None and not pumps[1].done():
                await connection.release()
                connection.back.writelines(connection.held)
                connection.back.write_eof()
                # until the server has executed all of it
                await asyncio.wait(pumps[1:])
        for pump in pumps:
            pump.cancel()
        for side in (front, connection.back):
            if side is not None:
                # not aborted: what was written must arrive
                side.close()
        del self.connections[connection]
        connection.ended.set()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        target = self._target()
        if target is None:
            raise ConnectionRefusedError
        if isinstance(target, str):
            return await asyncio.open_unix_connection(target, limit=_MOST_BYTES)
        return await asyncio.open_connection(*target, limit=_MOST_BYTES)

    async def _pump(
        self,
        connection: Connection,
        direction: Direction,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
    ) -> None:
        """Forward bytes until the source ends or the connection is cut."""
        with contextlib.suppress(OSError):
            while data := await source.read(_MOST_BYTES):
                try:
                    if direction == "reply" or connection.held is None:
                        await self.inspect(connection, direction, data)
                except CutError as cut:
                    sink.write(cut.rest)
                    return
                if direction == "reply" or connection.held is None:
                    sink.write(data)
                else:
                    connection.held.append(data)


class LossyPath(Proxy):
    """Proxy on a unix socket to a Redis server: it loses replies and delays requests to scripts.

    Attributes:
        url: the address to give to a store.
        losses: number of replies to scripts to lose. For each, the server receives
            the request and replies, then the connection breaks.
        after_loss: awaited after the server has replied and before the connection breaks.
        halves: whether the first half of a lost reply is forwarded.
        holds: number of requests to scripts to hold. For each, the client's connection
            breaks before the server receives any of it; `deliver` forwards it later.
        holding: set once a request is held.
        dead: whether new connections are closed immediately.
        accepted: number of accepted connections.
    """

    def __init__(self, target: str, socket: str):
        super().__init__(self._accept)
        self.url = f"unix://{socket}"
        self.losses = self.holds = self.accepted = 0
        self.halves = self.dead = False
        self.after_loss: Hook | None = None
        self.holding = asyncio.Event()
        self._delivery = asyncio.Event()
        self._server = target

    @property
    def held(self) -> list[Connection]:
        """Connections whose requests are held."""
        return [each for each in self.connections if each.held is not None]

    async def deliver(self) -> None:
        """Forward every held request, and wait until the server has executed it."""
        self._delivery.set()
        await self.wait_until_drained(lambda connection: connection.held is not None)
        self._delivery.clear()

    async def inspect(self, connection: Connection, direction: Direction, data: bytes) -> None:
        if direction == "reply" and connection.notes == "losing":
            if self.after_loss is not None:
                await self.after_loss()
            raise CutError(data[: len(data) // 2] if self.halves else b"")
        if direction == "request" and b"EVAL" in data:
            if self.holds > 0:
                self.holds -= 1
                connection.hold(self._delivery.wait, silent=False)
                self.holding.set()
            elif self.losses > 0:
                self.losses -= 1
                connection.notes = "losing"

    def _accept(self) -> str | None:
        self.accepted += 1
        return None if self.dead else self._server

    @classmethod
    def to(cls, target: str, folder: Path) -> AbstractAsyncContextManager[Self]:
        """Open a proxy to a server's socket, in a directory with a short path."""
        socket = str(folder / "lossy.sock")
        return cls(target, socket).listening(socket)
