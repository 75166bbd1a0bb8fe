"""TCP proxy on the loopback: monitors the bytes, and cuts or delays connections on demand.

It changes no byte. It can end a connection after the first half of a request, or of a reply; and it
can hold requests back, so that they reach the server only after the client abandoned the
connection. For one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Direction = Literal["request", "reply"]
Target = tuple[str, int] | str
"""Host and port, or the path of a unix socket."""
Choice = Callable[["Connection", bytes], bool]
"""Whether a cut applies to these bytes of a connection."""

_HOST = "127.0.0.1"
_numbers = itertools.count()


class Watcher(Protocol):
    """Sees all bytes before they are forwarded."""

    def passing(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """Bytes of one connection, in their order."""

    def closed(self, connection: Connection) -> None:
        """The client closed its end of a connection."""


@dataclass(frozen=True, slots=True)
class Hold:
    """How a connection's requests are held back.

    Attributes:
        late_s: time from the loss of the client's connection to the delivery to the server.
        silent: whether the client times out by itself; otherwise its connection is cut at once.
    """

    late_s: float
    silent: bool


@dataclass(frozen=True, slots=True)
class _Cut:
    direction: Direction
    choice: Choice
    hold: Hold | None
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(slots=True)
class _Side(asyncio.Protocol):
    """One side of a connection."""

    made: Callable[[Any], None] = lambda transport: None
    received: Callable[[bytes], None] = lambda data: None
    lost: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made(transport)

    def data_received(self, data: bytes) -> None:
        self.received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost()


class Connection:
    """One connection through a proxy.

    Attributes:
        number: different for every connection of the run.
        notes: the watcher's own.
        owner: name of the process that made it, once it is known.
        front, back: to the client, and to the server once it is connected.
        hold: set once its requests are held back.
        ended: set once all bytes have passed.
    """

    def __init__(self, proxy: Proxy, front: asyncio.Transport):
        self.proxy = proxy
        self.number = next(_numbers)
        self.notes: Any = None
        self.owner: str | None = None
        self.front = front
        self.back: asyncio.Transport | None = None
        self.is_closed = False
        self.ended = asyncio.Event()
        self.hold: Hold | None = None
        self._held: list[bytes] = []
        self._early: list[bytes] = []

    async def connect(self, target: Target) -> None:
        """Connect to the target; one that is unavailable ends the connection."""
        loop = asyncio.get_running_loop()
        side = _Side(received=lambda data: self.forward("reply", data), lost=self.close)
        try:
            if isinstance(target, str):
                back, _ = await loop.create_unix_connection(lambda: side, target)
            else:
                back, _ = await loop.create_connection(lambda: side, *target)
        except OSError:
            self.abort()
            return
        self.back = back
        if self.is_closed:
            back.abort()
            return
        back.writelines(self._early)
        self._early = []

    def forward(self, direction: Direction, data: bytes) -> None:
        """Pass bytes on, unless they are to be cut or held back."""
        if self.is_closed:
            return
        cut = None if self.hold else self.proxy.pop_cut(direction, self, data)
        if cut is not None and cut.hold is not None:
            self.hold = cut.hold
            if not cut.hold.silent:
                self.front.abort()
        if self.hold is not None and direction == "request":
            self._held.append(data)
            return
        if cut:
            data = data[: len(data) // 2]
        else:
            self.proxy.watcher.passing(self, direction, data)
        if direction == "reply":
            self.front.write(data)
        elif self.back is not None:
            self.back.write(data)
        else:
            self._early.append(data)
        if cut:
            # not aborted: the half that was written must arrive
            self.close()

    def client_closed(self) -> None:
        """The client ended the connection; what it wrote still reaches the server."""
        self.proxy.watcher.closed(self)
        if self.hold is None or self.is_closed:
            self.close()
        else:
            self.is_closed = True
            asyncio.get_running_loop().call_later(self.hold.late_s, self._deliver_held)

    def _deliver_held(self) -> None:
        if self.back is not None and not self.back.is_closing():
            self.back.writelines(self._held)
        self.close()

    def close(self) -> None:
        """End both sides once what was written is sent."""
        self._end(lambda side: side.close())

    def abort(self) -> None:
        """End both sides at once."""
        self._end(lambda side: side.abort())

    def _end(self, end: Callable[[asyncio.Transport], None]) -> None:
        self.is_closed = True
        self.ended.set()
        self.proxy.connections.discard(self)
        for side in (self.front, self.back):
            if side is not None:
                end(side)


class Proxy:
    """A listener that forwards to a target, which can move.

    Args:
        target: where the server is now; None while it is unavailable.
        owner: name of the process whose connections these are, for the watcher.
    """

    def __init__(self, target: Callable[[], Target | None], watcher: Watcher, owner: str = ""):
        self.watcher = watcher
        self.owner = owner
        self.connections: set[Connection] = set()
        self.port = 0
        self._target = target
        self._listener: asyncio.Server | None = None
        self._cuts: list[_Cut] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen on a free port of the loopback."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._new_side, _HOST, 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End the listener and every connection."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*self._connecting, return_exceptions=True)

    async def drained(self, choice: Callable[[Connection], bool]) -> None:
        """Wait until the chosen ones of the present connections have ended."""
        chosen = [each for each in self.connections if choice(each)]
        await asyncio.gather(*(connection.ended.wait() for connection in chosen))

    def _new_side(self) -> _Side:
        side = _Side()

        def made(front: asyncio.Transport) -> None:
            connection = Connection(self, front)
            self.connections.add(connection)
            side.received = lambda data: connection.forward("request", data)
            side.lost = connection.client_closed
            target = self._target()
            if target is None:
                connection.abort()
                return
            task = asyncio.get_running_loop().create_task(connection.connect(target))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

        side.made = made
        return side

    def cut(
        self, direction: Direction, choice: Choice, hold: Hold | None = None
    ) -> asyncio.Future[None]:
        """Cut, or hold back, the next bytes in this direction that `choice` selects."""
        cut = _Cut(direction, choice, hold)
        self._cuts.append(cut)
        return cut.done

    def pop_cut(self, direction: Direction, connection: Connection, data: bytes) -> _Cut | None:
        """Remove and return the cut that selects these bytes, if any."""
        for cut in self._cuts:
            if cut.direction == direction and cut.choice(connection, data):
                self._cuts.remove(cut)
                if not cut.done.done():
                    cut.done.set_result(None)
                return cut
        return None

    def forget_cuts(self) -> None:
        """Cut nothing that is still to come."""
        self._cuts = []
