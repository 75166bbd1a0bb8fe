"""Proxy to a Redis server that loses replies or delays requests, like a network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

Hook = Callable[[], Awaitable[object]]


class LossyPath:
    """Proxy on a unix socket that forwards to a server.

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
        """Forward every held request, each on a separate connection, and wait until the server
        has executed it."""
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

        tasks = [asyncio.create_task(upward()), asyncio.create_task(downward())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @classmethod
    @asynccontextmanager
    async def to(cls, target: str, folder: Path) -> AsyncIterator[LossyPath]:
        """Open a proxy to a server's socket, in a directory with a short path."""
        path = cls(target, str(folder / "lossy.sock"))
        listener = await asyncio.start_unix_server(path._serve, path._socket)
        try:
            yield path
        finally:
            listener.close()
            for task in list(path._clients):
                task.cancel()
            await asyncio.gather(*path._clients, return_exceptions=True)
