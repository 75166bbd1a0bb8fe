"""Base of the routers that find their servers by themselves, and follow a failover.

The topology is read at the start, and again after a lost connection: by one task at a time, after a
jittered delay. As soon as it names another primary, the pending commands of an unavailable server
go there, marked as retries. Each primary has one pipelined connection, so commands of one slot are
executed in the order of the calls, as on a single server.

While the topology changes, commands of one stream may overtake each other: one is backing off
while the next finds its server at once. That is safe, because correctness does not depend on their
order. A commit that overtakes the one before it fails its compare-and-set, and its chunk is
evaluated again. A commit that is retried on another server finds its own head, the expected head or
neither, and is resolved as on a single server. Order only avoids these retries.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import random
from abc import abstractmethod
from collections.abc import Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.redis.address import Address, StoreAddress
from service.store.redis.commands import PendingCommand
from service.store.redis.connections import RETRY_AFTER_S, OnConnect
from service.store.redis.pipelined_connection import (
    BACKOFF_BASE_S,
    BACKOFF_CAP_S,
    PipelinedConnection,
)
from service.store.redis.redis_server import RedisServer
from service.store.redis.router import Layout, Router
from service.store.settings import StoreSettings

REFRESH_INTERVAL_S: Final = 0.1
"""Minimum time between two reads of the topology; half of it is jitter."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Topology:
    """The servers as one of a cluster's nodes, or a Sentinel, reports them.

    Attributes:
        owners: the primary of each slot, of which there is one without a cluster; None if the slot
            has none.
        primaries: the primaries that have slots, ordered by node id.
        replicas: all other nodes.
        version: changes when a slot moves or a primary is replaced.
    """

    owners: tuple[Address | None, ...]
    primaries: tuple[Address, ...]
    replicas: tuple[Address, ...]
    version: str

    @property
    def uncovered_slots(self) -> int:
        """Number of slots without a primary."""
        return self.owners.count(None)


class DiscoveringRouter(Router):
    """Router of an address that names some of the servers, or who knows them.

    Raises:
        StoreRefused: the address cannot be used.
    """

    on_connect: OnConnect | None = None
    """Prepares each connection (`ConnectionFactory`)."""

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self._settings = settings
        self._address = StoreAddress.parse(settings.url)
        self.redacted_url = str(self._address)
        self._servers: dict[Address, RedisServer] = {}
        self._topology: Topology | None = None
        self._topology_error: CarryError | None = None
        self._owners: list[Address | None] = []
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._backoff = EqualJitterBackoff(cap=BACKOFF_CAP_S, base=BACKOFF_BASE_S)

    @abstractmethod
    async def _discover(self) -> Topology:
        """Read the topology.

        Raises:
            StoreUnavailable: it may be known later.
            StoreRefused: it will not be known.
        """

    @abstractmethod
    def _may_keep_pending(self, connection: PipelinedConnection) -> bool:
        """Whether pending commands stay on the connection to a server that is no primary now."""

    async def start(self) -> None:
        failures = 0
        try:
            async with asyncio.timeout(self._wait_s):
                while (error := await self._read_topology()) is not None:
                    if isinstance(error, StoreRefused):
                        raise error
                    if failures == 0:
                        reason = error.detail
                        log.warning("topology_unknown", store=self.redacted_url, reason=reason)
                    await asyncio.sleep(self._backoff.compute(failures))
                    failures += 1
        except TimeoutError:
            raise self._unavailable_error() from self._topology_error

    async def close(self) -> None:
        for task in (*self._tasks, *([self._refreshing] if self._refreshing else [])):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in list(self._servers.values()):
            await server.close()

    async def layout(self) -> Layout:
        error = await self._read_topology()
        if error is not None or self._topology is None:
            raise self._unavailable_error() from error
        uncovered = self._topology.uncovered_slots
        return self._layout(self._topology, f"{uncovered} slots have no node" if uncovered else "")

    def server_of(self, slot: int) -> RedisServer | None:
        owner = self._owners[slot] if self._owners else None
        return None if owner is None else self._server(owner)

    def any_server(self) -> RedisServer:
        known = self._topology.primaries if self._topology else self._address.nodes
        return self._server(random.choice(known))  # noqa: S311

    def replicas(self) -> list[RedisServer]:
        return list(map(self._server, self._topology.replicas if self._topology else ()))

    def refresh(self) -> None:
        self._read_soon()

    def _read_soon(self) -> None:
        """Read the topology again, unless a task does already."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    # `RedirectHandler`

    def handle_redirect(self, command: PendingCommand, error: RedisError) -> bool:
        """Take over a command that a server did not execute; False if the error is no redirect."""
        return False

    def handle_disconnect(self) -> None:
        """Read the topology: another server may have been promoted."""
        self._read_soon()

    # Commands

    def _dispatch(self, commands: Sequence[PendingCommand]) -> Iterable[PipelinedConnection]:
        connections: dict[PipelinedConnection, list[PendingCommand]] = {}
        for command in commands:
            owner = self._owners[command.slot]
            if owner is None:
                command.redirect_count += 1
                self.refresh()
                self._retry_with_backoff(command)
            else:
                connections.setdefault(self._server(owner).connection, []).append(command)
        for connection, group in connections.items():
            connection.send(group)
        return connections

    def _last_error(self) -> BaseException | None:
        return self._topology_error

    def _retry_with_backoff(self, command: PendingCommand) -> None:
        self._spawn(self._retry(command, self._backoff.compute(command.redirect_count)))

    async def _retry(self, command: PendingCommand, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if not command.future.done():
            self._dispatch((command,))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Topology

    async def _refresh(self) -> None:
        # Jitter: all workers lose a server at once, and need not ask for the topology at once.
        await asyncio.sleep(random.uniform(0, REFRESH_INTERVAL_S / 2))  # noqa: S311
        await self._read_topology()
        await asyncio.sleep(random.uniform(REFRESH_INTERVAL_S / 2, REFRESH_INTERVAL_S))  # noqa: S311

    async def _read_topology(self) -> CarryError | None:
        """Read and use the topology; returns the error if it is not known."""
        try:
            topology = await self._discover()
        except CarryError as error:
            self._topology_error = error
        else:
            self._topology_error = None
            self._apply(topology)
        return self._topology_error

    def _apply(self, topology: Topology) -> None:
        """Use a topology, and move pending commands away from servers that are no primaries."""
        if self._topology is None or topology.version != self._topology.version:
            log.info(
                "topology_changed",
                store=self.redacted_url,
                primaries=[str(address) for address in topology.primaries],
                uncovered_slots=topology.uncovered_slots,
            )
        self._topology, self._owners = topology, list(topology.owners)
        for address in self._servers.keys() - {*topology.primaries}:
            connection = self._servers[address].connection
            if not self._may_keep_pending(connection):
                for command in connection.take_pending():
                    command.needs_asking = False
                    self._spawn(self._retry(command, 0))
            if connection.is_idle and address not in self._kept_servers(topology):
                self._spawn(self._servers.pop(address).close())

    def _kept_servers(self, topology: Topology) -> Collection[Address]:
        """The servers to which connections stay open although they are no primaries."""
        return topology.replicas

    def _layout(self, topology: Topology, coverage_error: str) -> Layout:
        servers = [self._server(address) for address in topology.primaries]
        return Layout(topology.version, servers, coverage_error)

    def _server(self, address: Address) -> RedisServer:
        server = self._servers.get(address)
        if server is None:
            settings = self._settings.at(self._address.server_url(address))
            server = RedisServer(settings, self, self.telemetry, self.on_connect)
            self._servers[address] = server
        return server

    def _unavailable_error(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the servers of the store at {self.redacted_url} are not known after "
            f"{self._wait_s:g} s: {self._topology_error}",
            retry_after_s=RETRY_AFTER_S,
        )
