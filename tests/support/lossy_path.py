"""A proxy to a real server that loses replies or holds requests back, as a network may."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

Hook = Callable[[], Awaitable[object]]


class LossyPath:
    """A unix socket that forwards to a server's.

    Attributes:
        url: the address to give to a store.
        losses: how many replies to scripts are still to be lost. For each, the server gets
            the request and answers, then the connection breaks.
        after_loss: awaited once the server has answered and before the client notices.
        halves: whether the first half of a reply that is lost still comes through.
        holds: how many requests to scripts are still to be held. For each, the client's connection
            breaks before the server gets any of it; `deliver` hands it over later.
        holding: set once one is held.
        dead: whether new connections are closed at once.
        accepted: how many connections were made.
    """

    def __init__(self, target: str, socket: str):
        self.url = f"unix://{socket}"
        self.losses = 0
        self.holds = 0
        self.held: list[bytes] = []
        self.holding = asyncio.Event()
        self.after_loss: Hook | None = None
        self.halves = False
        self.accepted = 0
        self.dead = False
        self.dead_after_loss = False
        self._target = target
        self._socket = socket
        self._clients: set[asyncio.Task[None]] = set()

    async def deliver(self) -> None:
        """Deliver everything that was held back, each part on a separate connection, and wait until
        the server has carried it out."""
        for data in self.held:
            answers, server = await asyncio.open_unix_connection(self._target)
            server.write(data)
            server.write_eof()
            await answers.read()
            server.close()
        self.held.clear()

    async def _serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._clients.add(task)
        self.accepted += 1
        try:
            if not self.dead:
                # The listener's own callback cannot cope with a cancelled task.
                with contextlib.suppress(asyncio.CancelledError):
                    await self._forward(client, back)
        finally:
            back.close()
            self._clients.discard(task)

    async def _forward(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        replies, server = await asyncio.open_unix_connection(self._target)
        losing = asyncio.Event()

        async def upward() -> None:
            while data := await client.read(1 << 20):
                if b"EVAL" in data and self.holds > 0:
                    self.holds -= 1
                    self.held.append(data)
                    self.holding.set()
                    return
                if b"EVAL" in data and self.losses > 0:
                    self.losses -= 1
                    losing.set()
                server.write(data)

        async def downward() -> None:
            while data := await replies.read(1 << 20):
                if losing.is_set():
                    if self.after_loss is not None:
                        await self.after_loss()
                    self.dead = self.dead or self.dead_after_loss
                    if self.halves:
                        back.write(data[: len(data) // 2])
                    return
                back.write(data)

        ways = [asyncio.create_task(upward()), asyncio.create_task(downward())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.close()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    @classmethod
    @asynccontextmanager
    async def to(cls, target: str, folder: Path) -> AsyncIterator[LossyPath]:
        """A path to a server's socket, made in a folder with a short name."""
        path = cls(target, str(folder / "lossy.sock"))
        listener = await asyncio.start_unix_server(path._serve, path._socket)
        try:
            yield path
        finally:
            listener.close()
            for task in list(path._clients):
                task.cancel()
            await asyncio.gather(*path._clients, return_exceptions=True)
