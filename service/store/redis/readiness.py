"""Readiness of the store: whether its servers accept commits, checked on request and periodically.

Each primary is asked for its configuration and runs a trial commit, with the script of all commits,
on a key that lives for a millisecond: a server whose memory is full, whose disk fails or whose user
may not run scripts answers PING and yet refuses every chunk.

    unavailable   it does not answer, refuses commits, or lacks replicas: its streams wait or
                  fail, others are served. Ready while one primary is available.
    unsafe        it is not configured as the settings require (it may evict, or syncs later):
                  streams could be lost silently. Not ready, as it would be refused at start.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

import structlog

from service.core.errors import CarryError, StoreRefused
from service.core.values import Check
from service.store.redis.redis_server import Server
from service.store.redis.router import Link
from service.store.redis.server_checks import (
    check_fsync,
    check_policy,
    fsync_options,
    online_replicas,
    read_info,
)
from service.store.redis.store_request import Command, Script
from service.store.settings import Durability, StoreSettings

PROBE_S: Final = 1.0
"""How long a server may take to answer."""

RECHECK_S: Final = 30.0
"""Interval of checks when no client asks for readiness."""

log = structlog.get_logger(__name__)


class ServerFault(NamedTuple):
    """Why a server does not meet the settings.

    Attributes:
        is_unsafe: whether acknowledged chunks could be lost silently.
    """

    detail: str
    is_unsafe: bool = False


class Readiness:
    """Readiness of a store; concurrent callers share one check.

    Args:
        commit: the script that writes streams.
    """

    def __init__(self, link: Link, settings: StoreSettings, commit: Script):
        self._link = link
        self._settings = settings
        self._commit = commit
        self._checking: asyncio.Task[Check] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._known: tuple[ServerFault, ...] = ()

    def start(self) -> None:
        """Start periodic checks; once, inside the event loop."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Stop the checks; before the connections are closed."""
        tasks = [task for task in (self._watching, self._checking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def check(self) -> Check:
        """Check the servers now. Never raises."""
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
            self._log_changes([ServerFault(error.detail)])
            return Check("store", False, error.detail)
        probes = self._probes(layout.servers)
        results = await asyncio.gather(
            *(self._check_server(server, probes.get(server)) for server in layout.servers)
        )
        faults = [each for each in results if each is not None]
        is_serving = len(faults) < len(layout.servers)
        is_safe = not any(each.is_unsafe for each in faults)
        if layout.gap:
            faults.insert(0, ServerFault(layout.gap))
        self._log_changes(faults)
        detail = "; ".join(each.detail for each in faults)
        return Check("store", is_serving and is_safe, detail or f"{self._link.where} takes commits")

    def _probes(self, servers: Collection[Server]) -> dict[Server, Command]:
        """A trial commit for each server that has a partition, on a key that it stores."""
        probes: dict[Server, Command] = {}
        name = secrets.token_hex(4)
        for partition in range(self._settings.partitions):
            if len(probes) == len(servers):
                break
            key = self._settings.keys.probe(partition, name)
            server = self._link.server_of(self._link.slot(key))
            if server is not None and server not in probes:
                # expects no stream; state and reply live for 1 ms. It writes a reply, because a
                # full server lets a script continue that has deleted something
                what = (self._commit.text, 2, key, f"{key}:reply", 1, 1, "", "state", "reply")
                probes[server] = ("EVAL", *what)
        return probes

    async def _check_server(self, server: Server, probe: Command | None) -> ServerFault | None:
        try:
            facts = read_info(await server.try_once(PROBE_S, "INFO"))
            try:
                if "maxmemory_policy" in facts:
                    check_policy(server, facts["maxmemory_policy"], self._settings)
                if self._settings.durability is Durability.FSYNC:
                    check_fsync(server, await fsync_options(server))
            except StoreRefused as error:
                return ServerFault(error.detail, is_unsafe=True)
            if self._settings.durability is Durability.REPLICATED:
                replicas = online_replicas(facts)
                if replicas < self._settings.replicas:
                    expected = self._settings.replicas
                    return ServerFault(
                        f"{server.where} has {replicas} replicas, expected {expected}"
                    )
            if probe is not None:
                [result] = await server.try_once(PROBE_S, *probe)
                if result[0] != 1:
                    message = b" ".join(result[1:]).decode("utf-8", "replace")
                    return ServerFault(f"{server.where} refuses commits: {message}")
        except CarryError as error:
            return ServerFault(error.detail)
        return None

    def _log_changes(self, faults: Iterable[ServerFault]) -> None:
        """Log faults that differ from those of the last check."""
        now = tuple(faults)
        if now == self._known:
            return
        self._known = now
        if not now:
            log.info("store_recovered", store=self._link.where)
        for fault in now:
            level = log.error if fault.is_unsafe else log.warning
            level("store_degraded", store=self._link.where, reason=fault.detail)
