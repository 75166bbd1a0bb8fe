"""TCP proxy on the loopback: monitors the bytes, and cuts or delays connections on demand.

It changes no byte. What it can do to a connection is to end it in the middle, after the first
half of a request, or of a reply, was forwarded; and to hold a request back, so that it reaches the
server only after its client has given the connection up. Use from one event loop.
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

_HOST = "127.0.0.1"
_numbers = itertools.count()


class Watcher(Protocol):
    """Told of everything that passes, before it goes on."""

    def passing(self, connection: Connection, direction: Direction, data: bytes) -> None:
        """Bytes of one connection, in their order."""

    def closed(self, connection: Connection) -> None:
        """The client closed its end of a connection."""


Choice = Callable[["Connection", bytes], bool]


@dataclass(frozen=True, slots=True)
class Hold:
    """How a connection's requests are held back.

    Attributes:
        late_s: time from the loss of the client's connection to the delivery to the server.
        silent: whether the client gives up by itself; otherwise its connection is cut at once.
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


class Connection:
    """One connection through a path.

    Attributes:
        number: different for every connection of the run.
        notes: the watcher's own.
        whose: who made it, once somebody found out.
        hold: set once its requests are held back.
        ended: whether all bytes have passed.
    """

    def __init__(self, proxy: Proxy, front: asyncio.Transport):
        self.proxy = proxy
        self.number = next(_numbers)
        self.notes: Any = None
        self.owner: str | None = None
        self.front: asyncio.Transport = front
        self.back: asyncio.Transport | None = None
        self.is_closed = False
        self.ended = asyncio.Event()
        self.hold: Hold | None = None
        self._held: list[bytes] = []
        self._early: list[bytes] = []

    async def connect(self, target: Target) -> None:
        """Reach the target; a target that is not there ends the connection."""
        loop = asyncio.get_running_loop()
        try:
            if isinstance(target, str):
                back, _ = await loop.create_unix_connection(lambda: _Back(self), target)
            else:
                back, _ = await loop.create_connection(lambda: _Back(self), *target)
        except OSError:
            self.abort()
            return
        self.back = back
        if self.is_closed:
            back.abort()
            return
        for data in self._early:
            back.write(data)
        self._early = []

    def request(self, data: bytes) -> None:
        """Bytes from the client."""
        self._pass("request", data)

    def reply(self, data: bytes) -> None:
        """Bytes from the server."""
        self._pass("reply", data)

    def _pass(self, direction: Direction, data: bytes) -> None:
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
            # close, not abort: the half that was written is to arrive
            self._end(abort=False)

    def client_closed(self) -> None:
        """The client ended the connection; what it wrote still reaches the server."""
        self.proxy.watcher.closed(self)
        if self.hold is None or self.is_closed:
            self._end(abort=False)
        else:
            self.is_closed = True
            asyncio.get_running_loop().call_later(self.hold.late_s, self._deliver)

    def _deliver(self) -> None:
        if self.back is not None and not self.back.is_closing():
            self.back.write(b"".join(self._held))
        self._end(abort=False)

    def abort(self) -> None:
        """End both sides at once."""
        self._end(abort=True)

    def _end(self, *, abort: bool) -> None:
        self.is_closed = True
        self.ended.set()
        self.proxy.connections.discard(self)
        for side in (self.front, self.back):
            if side is not None:
                if abort:
                    side.abort()
                else:
                    side.close()


class _Front(asyncio.Protocol):
    def __init__(self, proxy: Proxy):
        self._proxy = proxy
        self._link: Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._link = self._proxy.opened(transport)

    def data_received(self, data: bytes) -> None:
        self._link.request(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._link.client_closed()


class _Back(asyncio.Protocol):
    def __init__(self, connection: Connection):
        self._link = connection

    def data_received(self, data: bytes) -> None:
        self._link.reply(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._link._end(abort=False)


class Proxy:
    """A listener that forwards to a target, which may move.

    Args:
        target: where the server is now; None while it is nowhere.
        owner: whom the connections belong to, for the watcher.
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
        self._listener = await loop.create_server(lambda: _Front(self), _HOST, 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End the listener and every connection."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*self._connecting, return_exceptions=True)

    async def drained(self, owner: Callable[[Connection], bool]) -> None:
        """Wait until the connections that there are now and that are chosen have ended."""
        await asyncio.gather(
            *(connection.ended.wait() for connection in list(self.connections) if owner(connection))
        )

    def opened(self, front: asyncio.BaseTransport) -> Connection:
        """A client connected."""
        connection = Connection(self, front)
        self.connections.add(connection)
        target = self._target()
        if target is None:
            connection.abort()
        else:
            task = asyncio.get_running_loop().create_task(connection.connect(target))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        return connection

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
