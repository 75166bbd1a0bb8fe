"""Whether the servers take commits now: asked by readiness, and twice a minute besides.

Each primary is asked what it is and makes a commit, by the script of all commits, of a key that
lives for a millisecond: a server whose memory is full, whose disk fails or whose user may not run
scripts answers PING and takes no chunk.

    away      it does not answer, refuses commits, or lacks replicas: its streams wait or fail, and
              those of the others are served. Ready, while there is one that is not away.
    unsafe    it is not what the settings want (it may evict, it syncs later): streams could be
              lost in silence. Not ready, as it would be refused at the start.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

import structlog

from service.domain import Check
from service.errors import CarryError, StoreRefused
from service.state.link import Link
from service.state.request import Command, Script
from service.state.server import Server
from service.state.server_checks import (
    check_fsync,
    check_policy,
    fsync_options,
    online_replicas,
    read_info,
)
from service.state.settings import Durability, StoreSettings

PROBE_S: Final = 1.0
"""How long a server may take to answer."""

RECHECK_S: Final = 30.0
"""How often the servers are checked where nobody asks for readiness."""

log = structlog.get_logger(__name__)


class Trouble(NamedTuple):
    """Why a server does not serve as the settings want.

    Attributes:
        is_unsafe: acknowledged chunks could be lost in silence.
    """

    detail: str
    is_unsafe: bool = False


class Readiness:
    """Readiness of a store; at most one check at a time, however many ask for it.

    Args:
        commit: the script that writes streams.
    """

    def __init__(self, link: Link, settings: StoreSettings, commit: Script):
        self._link = link
        self._settings = settings
        self._commit = commit
        self._checking: asyncio.Task[Check] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._known: tuple[Trouble, ...] = ()

    def start(self) -> None:
        """Check from now on by itself; once, inside the event loop."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """End the checks; before the connections are closed."""
        tasks = [task for task in (self._watching, self._checking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def check(self) -> Check:
        """What is found now. Never raises."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check())
        return await asyncio.shield(self._checking)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_S)
            await self.check()

    async def _check(self) -> Check:
        try:
            layout = await self._link.layout()
        except CarryError as error:
            self._note([Trouble(error.detail)])
            return Check("store", False, error.detail)
        probes = self._probes(layout.servers)
        found = await asyncio.gather(
            *(self._trouble_of(server, probes.get(server)) for server in layout.servers)
        )
        troubles = [each for each in found if each is not None]
        is_serving = len(troubles) < len(layout.servers)
        is_safe = not any(each.is_unsafe for each in troubles)
        if layout.gap:
            troubles.insert(0, Trouble(layout.gap))
        self._note(troubles)
        detail = "; ".join(each.detail for each in troubles)
        return Check("store", is_serving and is_safe, detail or f"{self._link.where} takes commits")

    def _probes(self, servers: Collection[Server]) -> dict[Server, Command]:
        """For each server a commit of a key that lies on it; none where it has no partition."""
        probes: dict[Server, Command] = {}
        name = secrets.token_hex(4)
        for partition in range(self._settings.partitions):
            if len(probes) == len(servers):
                break
            key = self._settings.keys.probe(partition, name)
            server = self._link.server_of(self._link.slot(key))
            if server is not None and server not in probes:
                # no stream is expected; state and reply live for 1 ms. With a reply, because a full
                # server lets a script go on that has deleted something
                what = (self._commit.text, 2, key, f"{key}:reply", 1, 1, "", "state", "reply")
                probes[server] = ("EVAL", *what)
        return probes

    async def _trouble_of(self, server: Server, probe: Command | None) -> Trouble | None:
        try:
            facts = read_info(await server.try_once(PROBE_S, "INFO"))
            try:
                if "maxmemory_policy" in facts:
                    check_policy(server, facts["maxmemory_policy"], self._settings)
                if self._settings.durability is Durability.FSYNC:
                    check_fsync(server, await fsync_options(server))
            except StoreRefused as error:
                return Trouble(error.detail, is_unsafe=True)
            if self._settings.durability is Durability.REPLICATED:
                replicas = online_replicas(facts)
                if replicas < self._settings.replicas:
                    expected = self._settings.replicas
                    return Trouble(f"{server.where} has {replicas} replicas, expected {expected}")
            if probe is not None:
                [result] = await server.try_once(PROBE_S, *probe)
                if result[0] != 1:
                    said = b" ".join(result[1:]).decode("utf-8", "replace")
                    return Trouble(f"{server.where} refuses commits: {said}")
        except CarryError as error:
            return Trouble(error.detail)
        return None

    def _note(self, troubles: Iterable[Trouble]) -> None:
        """Log what has changed since the last check."""
        now = tuple(troubles)
        if now == self._known:
            return
        self._known = now
        if not now:
            log.info("store_recovered", store=self._link.where)
        for trouble in now:
            level = log.error if trouble.is_unsafe else log.warning
            level("store_degraded", store=self._link.where, reason=trouble.detail)
