"""Router of a Redis Cluster: sends each command to the primary of its slot.

Each primary has one pipelined connection, so commands of one slot are executed in the order of the
calls, as on a single server. The topology is read at the start, and again after a redirect, a
deferral or a lost connection: by one task at a time, after a jittered delay, from any node that
answers.

    MOVED              the slot has another primary: the map is updated, the command goes there
    ASK                the slot is migrating and these keys have moved: sent there once, with ASKING
    TRYAGAIN           the slot is migrating and some of the keys have moved: retried with backoff
    CLUSTERDOWN        no majority, or a slot without a primary: retried with backoff
    node unavailable   as soon as the topology names another primary, pending commands of the lost
                       node go there, marked as retries

While the topology changes, commands of one stream may overtake each other: one is backing off
while the next finds its node at once. That is safe, because correctness does not depend on their
order. A commit that overtakes the one before it fails its compare-and-set, and its chunk is
evaluated again. A commit that is retried on another node finds its own head, the expected head or
neither, and is resolved as on a single server. Order only avoids these retries.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Final

import structlog
from redis.backoff import EqualJitterBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, TryAgainError

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.redis.commands import PendingCommand
from service.store.redis.connections import ATTEMPTS_PER_CALL, RETRY_AFTER_S
from service.store.redis.pipelined_connection import (
    BACKOFF_BASE_S,
    BACKOFF_CAP_S,
    PipelinedConnection,
)
from service.store.redis.redis_server import RedisServer
from service.store.redis.router import Layout, Router
from service.store.redis.topology import (
    Address,
    Topology,
    node_url,
    parse_startup_nodes,
    parse_topology,
)
from service.store.settings import StoreSettings

REFRESH_INTERVAL_S: Final = 0.1
"""Minimum time between two reads of the topology; half of it is jitter."""

TOPOLOGY_TIMEOUT_S: Final = 1.0
"""How long one node may take to return the topology before another is asked."""

NO_NODE: Final = "none"

log = structlog.get_logger(__name__)


class ClusterRouter(Router):
    """Router of a cluster; its startup nodes are the nodes of the address.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self._settings = settings
        self._startup_nodes = parse_startup_nodes(settings.url)
        self._topology_timeout_s = min(
            TOPOLOGY_TIMEOUT_S, settings.store_wait_s / ATTEMPTS_PER_CALL
        )
        scheme = settings.url.partition("://")[0]
        self.redacted_url = f"{scheme}://{','.join(map(str, self._startup_nodes))}"
        self._servers = {node: self._connect_to(node) for node in self._startup_nodes}
        self._topology: Topology | None = None
        self._owners: list[Address | None] = []
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._topology_error: CarryError | None = None
        self._backoff = EqualJitterBackoff(cap=BACKOFF_CAP_S, base=BACKOFF_BASE_S)

    async def start(self) -> None:
        failures = 0
        try:
            async with asyncio.timeout(self._wait_s):
                while (error := await self._read_topology()) is not None:
                    if isinstance(error, StoreRefused):
                        raise error
                    if failures == 0:
                        log.warning(
                            "store_unavailable", store=self.redacted_url, reason=error.detail
                        )
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

    def slot(self, key: str) -> int:
        return key_slot(key.encode())

    def node_of(self, slot: int) -> Address | str:
        """The address of a slot's primary; `NO_NODE` if it has none."""
        return (self._owners[slot] if self._owners else None) or NO_NODE

    async def layout(self) -> Layout:
        error = await self._read_topology()
        if error is not None or self._topology is None:
            raise self._unavailable_error() from error
        servers = [self._server(address) for address in self._topology.primaries]
        uncovered = self._topology.uncovered_slots
        coverage_error = f"{uncovered} slots have no node" if uncovered else ""
        return Layout(self._topology.version, servers, coverage_error)

    def server_of(self, slot: int) -> RedisServer | None:
        owner = self._owners[slot] if self._owners else None
        return None if owner is None else self._server(owner)

    def replicas(self) -> list[RedisServer]:
        if self._topology is None:
            return []
        return [self._server(address) for address in self._topology.replicas]

    def refresh(self) -> None:
        """Read the topology again, unless a task does already."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    # Redirects (`RedirectHandler`)

    def handle_redirect(self, command: PendingCommand, error: RedisError) -> bool:
        """Send a command to another node, or again later; the node did not execute it."""
        if not isinstance(error, (AskError, TryAgainError, ClusterDownError)):
            return False
        command.redirect_error = error
        command.needs_asking = False
        is_first = command.redirect_count == 0
        command.redirect_count += 1
        if isinstance(error, AskError):
            sender = self._address_of(command.connection)
            target = Address(error.host or (sender.host if sender else ""), error.port)
            if isinstance(error, MovedError):
                self._owners[error.slot_id] = target
                self.refresh()
                if not is_first:
                    # Two nodes may redirect it to each other until they agree.
                    self._retry_with_backoff(command)
                    return True
            else:
                command.needs_asking = True
            self._spawn(self._send(self._server(target).connection, command))
            return True
        if isinstance(error, ClusterDownError):
            self.refresh()
        self._retry_with_backoff(command)
        return True

    def handle_disconnect(self) -> None:
        """Read the topology: another node may have been promoted."""
        self.refresh()

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

    async def _send(self, connection: PipelinedConnection, command: PendingCommand) -> None:
        if not command.future.done():
            connection.send((command,))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Topology

    async def _refresh(self) -> None:
        # Jitter: all workers lose a node at once, and need not ask for the topology at once.
        await asyncio.sleep(random.uniform(0, REFRESH_INTERVAL_S / 2))  # noqa: S311
        await self._read_topology()
        await asyncio.sleep(random.uniform(REFRESH_INTERVAL_S / 2, REFRESH_INTERVAL_S))  # noqa: S311

    async def _read_topology(self) -> CarryError | None:
        """Read the topology from the first node that returns it; returns the error if none does."""
        nodes = list({*self._servers, *self._startup_nodes})
        random.shuffle(nodes)
        errors: list[CarryError] = []
        for address in nodes:
            try:
                reply = await self._server(address).execute_once(
                    self._topology_timeout_s, "CLUSTER", "SLOTS"
                )
                topology = parse_topology(reply, address)
            except CarryError as error:
                errors.append(error)
                continue
            if topology.primaries:
                self._apply(topology)
                return None
            errors.append(StoreUnavailable(f"{address} knows of no node that has slots"))
        # An unavailable node may return it later; nodes that all reject will keep rejecting.
        self._topology_error = next(
            (error for error in errors if isinstance(error, StoreUnavailable)), errors[0]
        )
        return self._topology_error

    def _apply(self, topology: Topology) -> None:
        """Use a topology, and move pending commands away from nodes without slots."""
        if self._topology is None or topology.version != self._topology.version:
            log.info(
                "cluster_layout",
                store=self.redacted_url,
                primaries=[str(address) for address in topology.primaries],
                uncovered_slots=topology.uncovered_slots,
            )
        self._topology, self._owners = topology, list(topology.owners)
        for address in self._servers.keys() - {*topology.primaries}:
            connection = self._servers[address].connection
            if not connection.is_responsive:
                for command in connection.take_pending():
                    command.needs_asking = False
                    self._spawn(self._retry(command, 0))
            if connection.is_idle and address not in {*topology.replicas, *self._startup_nodes}:
                self._spawn(self._servers.pop(address).close())

    def _server(self, address: Address) -> RedisServer:
        server = self._servers.get(address)
        if server is None:
            server = self._servers[address] = self._connect_to(address)
        return server

    def _connect_to(self, address: Address) -> RedisServer:
        url = node_url(self._settings.url, address)
        return RedisServer(self._settings.at(url), self, self.telemetry)

    def _address_of(self, connection: PipelinedConnection | None) -> Address | None:
        return next(
            (at for at, each in self._servers.items() if each.connection is connection), None
        )

    def _unavailable_error(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"no node of the store at {self.redacted_url} returned the cluster's topology within "
            f"{self._wait_s:g} s: {self._topology_error}",
            retry_after_s=RETRY_AFTER_S,
        )
