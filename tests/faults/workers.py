"""Workers: `carry serve` processes, each behind a path of its own for clients and the store."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from tests.faults.proxy import Proxy, Target
from tests.faults.stores import Store
from tests.faults.traffic import ClientTraffic, PendingChunk
from tests.support.service import Service

_TRIES = 20


class Worker:
    """One worker and its two paths.

    Attributes:
        up_s: since when it has been serving; None while it is not.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        models: Path,
        store_url: str,
        clients: ClientTraffic,
        environment: dict[str, str],
    ):
        self.name = name
        self.proxy = Proxy(self._target, clients, name)
        self.up_s: float | None = None
        self._clients = clients
        self._environment = environment
        folder.mkdir()
        self._service = Service(folder, models, redis_url=store_url)
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and wait until it serves; an unavailable store may keep
        it from starting, as a supervisor would see."""
        for attempt in range(_TRIES):
            try:
                await asyncio.to_thread(self._service.start, **self._environment)
                break
            except AssertionError:
                if attempt + 1 == _TRIES or not self._service.ended():
                    raise
        self.up_s = time.monotonic()

    def restart(self) -> None:
        """Start it again in the background."""
        self._starting = asyncio.create_task(self.start())

    async def started(self) -> None:
        """Wait for a restart."""
        if self._starting is not None:
            await self._starting

    def pause(self) -> None:
        """SIGSTOP."""
        os.kill(self._service.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self._service.process.pid, signal.SIGCONT)

    async def end(self) -> None:
        """SIGTERM, and its end."""
        self.up_s = None
        await asyncio.to_thread(self._service.stop)

    @property
    def pid(self) -> int | None:
        """Its process; None before it was started."""
        process = self._service.process
        return None if process is None else process.pid

    def kill(self) -> tuple[list[PendingChunk], float]:
        """SIGKILL now; what it owed, and the moment."""
        self.up_s = None
        pending = self._clients.in_flight(self.name)
        killed_s = time.monotonic()
        self._service.process.kill()
        return pending, killed_s

    async def ended(self, store: Store) -> None:
        """Once it is killed: wait until it has exited and all it wrote has passed."""
        await asyncio.to_thread(self._service.process.wait)
        await self.proxy.drained(lambda _: True)
        for proxy in store.proxies:
            await proxy.drained(lambda connection: store.owner_of(connection) == self.name)

    def logged(self) -> list[str]:
        """What it logged, over all its starts, about exceptions that nobody expected."""
        return [
            f"{self.name} logged {line}"
            for line in self._service.whole_log().splitlines()
            if '"exception":' in line
        ]

    def stop(self) -> None:
        """End it at once."""
        process = self._service.process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def _target(self) -> Target | None:
        if self.up_s is None or not self._service.url:
            return None
        return "127.0.0.1", int(self._service.url.rsplit(":", 1)[1])
