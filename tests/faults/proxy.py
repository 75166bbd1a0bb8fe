"""TCP proxy on the loopback: monitors the bytes, and cuts or delays connections on demand.

It changes no byte. It can end a connection after the first half of a request, or of a reply; and it
can hold requests back, so that they reach the server only after the client abandoned the
connection. For one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["request", "reply"]
Target = tuple[str, int] | str
"""Host and port, or the path of a unix socket."""
Choice = Callable[["Connection", bytes], bool]
"""Whether a cut applies to these bytes of a connection."""
Watch = Callable[["Connection", Direction, bytes], None]
"""Receives all bytes before they are forwarded."""

_MOST_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Hold:
    """How a connection's requests are held back.

    Attributes:
        late_s: time from the loss of the client's connection to the delivery to the server.
        silent: whether the client times out by itself; otherwise its connection is cut at once.
    """

    late_s: float
    silent: bool


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Cuts, or holds back, the next bytes in a direction that `choice` selects."""

    direction: Direction
    choice: Choice
    hold: Hold | None
    done: asyncio.Semaphore


@dataclass(slots=True, eq=False)
class Connection:
    """One connection through a proxy.

    Attributes:
        owner: name of the process that made it; None until it is known.
        notes: the watcher's own.
        hold, held: set once its requests are held back.
        ended: set once all bytes have passed.
    """

    front: asyncio.StreamWriter
    owner: str | None
    back: asyncio.StreamWriter | None = None
    notes: Any = None
    hold: Hold | None = None
    held: list[bytes] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def abort(self) -> None:
        """End both sides at once."""
        for side in (self.front, self.back):
            if side is not None:
                side.transport.abort()


class Proxy:
    """A listener that forwards to a target, which can move.

    Args:
        target: where the server is now; None while it is unavailable.
        owner: name of the process whose connections these are, if they are one process's.
    """

    def __init__(self, target: Callable[[], Target | None], watch: Watch, owner: str | None = None):
        self.owner = owner
        self.connections: set[Connection] = set()
        self.port = 0
        self._target = target
        self._watch = watch
        self._cuts: list[Cut] = []
        self._listener: asyncio.Server | None = None

    async def open(self) -> Proxy:
        """Listen on a free port of the loopback."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_MOST_BYTES)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        """End the listener and every connection."""
        self._listener.close()
        while self.connections:
            for connection in self.connections:
                connection.hold = None
                connection.abort()
            await self.drained(lambda _: True)

    async def drained(self, choice: Callable[[Connection], bool]) -> None:
        """Wait until the chosen ones of the present connections have ended."""
        chosen = [each for each in self.connections if choice(each)]
        await asyncio.gather(*(connection.ended.wait() for connection in chosen))

    def cut(self, cut: Cut) -> None:
        """Add a cut."""
        self._cuts.append(cut)

    def forget_cuts(self) -> None:
        """Cut nothing that is still to come."""
        self._cuts = []

    async def _serve(self, requests: asyncio.StreamReader, front: asyncio.StreamWriter) -> None:
        connection = Connection(front, self.owner)
        self.connections.add(connection)
        pumps: list[asyncio.Task[None]] = []
        # the server is unavailable, or a peer was killed
        with contextlib.suppress(OSError):
            replies, connection.back = await self._connect()
            pumps = [
                asyncio.create_task(self._pump(connection, "request", requests)),
                asyncio.create_task(self._pump(connection, "reply", replies)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if connection.hold is not None and not pumps[1].done():
                await asyncio.wait(pumps[1:], timeout=connection.hold.late_s)
                if not connection.back.is_closing():
                    connection.back.writelines(connection.held)
        for side in (connection.front, connection.back):
            if side is not None:
                # not aborted: what was written must arrive
                side.close()
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        self.connections.discard(connection)
        connection.ended.set()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        target = self._target()
        if target is None:
            raise ConnectionRefusedError
        if isinstance(target, str):
            return await asyncio.open_unix_connection(target, limit=_MOST_BYTES)
        return await asyncio.open_connection(*target, limit=_MOST_BYTES)

    async def _pump(
        self, connection: Connection, direction: Direction, source: asyncio.StreamReader
    ) -> None:
        """Forward bytes until the source ends or the connection is cut."""
        sink = connection.back if direction == "request" else connection.front
        while data := await source.read(_MOST_BYTES):
            cut = None if connection.hold else self._pop_cut(connection, direction, data)
            if cut is not None and cut.hold is not None:
                connection.hold = cut.hold
                if not cut.hold.silent:
                    connection.front.transport.abort()
            if connection.hold is not None and direction == "request":
                connection.held.append(data)
                continue
            if cut is not None:
                sink.write(data[: len(data) // 2])
                return
            self._watch(connection, direction, data)
            sink.write(data)

    def _pop_cut(self, connection: Connection, direction: Direction, data: bytes) -> Cut | None:
        """Remove and return the cut that selects these bytes, if any."""
        for cut in self._cuts:
            if cut.direction == direction and cut.choice(connection, data):
                self._cuts.remove(cut)
                cut.done.release()
                return cut
        return None
