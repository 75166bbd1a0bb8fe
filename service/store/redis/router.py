"""Routes commands to the servers that hold their keys, and waits for their outcomes.

A router knows the servers by its topology: a single server's never changes, that of a cluster and
of a primary behind Sentinels is read at the start and again after a lost connection, by one task at
a time, after a jittered delay. As soon as it names another primary, the pending commands of an
unavailable server go there, marked as retries. Each primary has one pipelined connection, so
commands of one slot are executed in the order of the calls.

While the topology changes, commands of one stream may overtake each other: one is backing off
while the next finds its server at once. That is safe, because correctness does not depend on their
order. A commit that overtakes the one before it fails its compare-and-set, and its chunk is
evaluated again. A commit that is retried on another server finds its own head, the expected head or
neither, and is resolved as on a single server. Order only avoids these retries.

With `replicated` durability, every connection that carried writes of a call then carries one WAIT
command, whose reply counts the replicas that acknowledged all earlier writes of that connection.
The server tracks this per connection: a WAIT on another connection, or with no write before it, is
answered at once and proves nothing. So a write is durable only if a successful WAIT was written
after it on the same connection and generation. A write that was redirected or resent is followed by
another WAIT; a write whose connection broke since is not durable, and its retry finds it.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Coroutine, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import structlog
from msgspec.structs import replace
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.capabilities import StoreTelemetry
from service.store.redis.address import Address, StoreAddress
from service.store.redis.commands import PendingCommand
from service.store.redis.connections import (
    ATTEMPTS_PER_CALL,
    RETRY_AFTER_S,
    OnConnect,
    describe_error,
    end_tasks,
)
from service.store.redis.outcomes import Outcome, ReplyLost, ServerReply
from service.store.redis.pipelined_connection import (
    BACKOFF_BASE_S,
    BACKOFF_CAP_S,
    PipelinedConnection,
    RedisServer,
)
from service.store.settings import Durability, StoreSettings

TICK_S: Final = 0.01
"""Resolution of the timeouts of calls. One timer, set to the earliest, serves all: a timer for each
call would cost more than the rest of the call."""

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


class Layout(NamedTuple):
    """The servers that hold the streams.

    Attributes:
        version: changes when streams may have moved between servers.
        servers: the primaries, in the order in which a listing scans them.
        coverage_error: which slots no server holds, as text; empty if all are covered.
    """

    version: str
    servers: list[RedisServer]
    coverage_error: str = ""


class Router(ABC):
    """Sends commands to the servers of an address; opens no connection before the first call.

    Raises:
        StoreRefused: the address cannot be used.

    Attributes:
        settings: of the whole store.
        redacted_url: the address without secrets.
        telemetry: what its connections count.
        on_connect: prepares each connection (`ConnectionFactory`).
    """

    redacted_url: str
    on_connect: OnConnect | None = None

    def __init__(self, settings: StoreSettings):
        self.telemetry = StoreTelemetry()
        self.settings = settings
        self._waiting: dict[PendingCommand, tuple[float, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._wait_s = settings.store_wait_s
        self._replicas = settings.replicas if settings.durability is Durability.REPLICATED else 0
        # Half of the response timeout: a blocked WAIT must not look like an unresponsive server.
        self._wait_timeout_ms = max(1, round(settings.store_wait_s / ATTEMPTS_PER_CALL / 2 * 1000))
        self._servers: dict[Address, RedisServer] = {}
        self._closing: set[RedisServer] = set()
        self._is_closed = False
        self._topology: Topology | None = None
        self._topology_error: CarryError | None = None
        self._owners: list[Address | None] = []
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._backoff = EqualJitterBackoff(cap=BACKOFF_CAP_S, base=BACKOFF_BASE_S)

    async def start(self) -> None:
        """Discover the servers; once, before use.

        Raises:
            StoreUnavailable, StoreRefused
        """
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
        """Close every connection; once, after the last call returned."""
        self._is_closed = True
        await end_tasks(*self._tasks, self._refreshing)
        for server in (*self._servers.values(), *self._closing):
            await server.close()

    @abstractmethod
    async def _discover(self) -> Topology:
        """Read the topology.

        Raises:
            StoreUnavailable: it may be known later.
            StoreRefused: it will not be known.
        """

    def slot(self, key: str) -> int:
        """The hash slot of a key, always 0 without a cluster; one command may contain keys of one
        slot only."""
        return 0

    def node_of(self, slot: int) -> Hashable:
        """Identifies the server of a slot; None if there is one server for all."""
        return None

    async def layout(self) -> Layout:
        """The current servers.

        Raises:
            StoreUnavailable, StoreRefused
        """
        error = await self._read_topology()
        if error is not None or self._topology is None:
            raise self._unavailable_error() from error
        uncovered = self._topology.owners.count(None)
        return self._layout(self._topology, f"{uncovered} slots have no node" if uncovered else "")

    def server_of(self, slot: int) -> RedisServer | None:
        """The server of a slot; None if no server is known to hold it."""
        owner = self._owners[slot] if self._owners else None
        return None if owner is None else self._server(owner)

    def any_server(self) -> RedisServer:
        """One of the current servers, for what does not depend on a key."""
        known = self._topology.primaries if self._topology else tuple(self._servers)
        return self._server(random.choice(known))  # noqa: S311

    def replicas(self) -> list[RedisServer]:
        """The servers that a failover may promote."""
        return list(map(self._server, self._topology.replicas if self._topology else ()))

    def refresh(self) -> None:
        """Find the servers again for the next commands: a server's role has changed."""
        self.handle_disconnect()

    # Commands

    async def execute(
        self, *commands: PendingCommand, durably: bool = False, deadline_s: float = math.inf
    ) -> list[Outcome]:
        """Send commands concurrently and return the outcome of each.

        Commands for one server are executed in the order of the calls.

        Args:
            durably: the commands write, and `is_durable` of their replies must be determined.
            deadline_s: time of the monotonic clock until which outcomes are awaited; if it is
                infinite, the timeout of the settings applies.
        """
        now_s = time.monotonic()
        wait_s = self._wait_s if deadline_s == math.inf else max(0.0, deadline_s - now_s)
        connections = self._dispatch(commands)
        if not durably or not self._replicas:
            return await self._outcomes(commands, wait_s)
        waits = self._send_waits(connections)
        outcomes = await self._outcomes([*commands, *waits], wait_s)
        waits += self._send_waits(
            {
                command.connection
                for command in commands
                if command.connection is not None
                and command.generation == command.connection.generation
                and not any(_follows(wait, command) for wait in waits)
            }
        )
        await self._outcomes(waits, wait_s + now_s - time.monotonic())
        return [
            replace(outcome, is_durable=self._is_replicated(command, waits))
            if isinstance(outcome, ServerReply)
            else outcome
            for command, outcome in zip(commands, outcomes, strict=False)
        ]

    async def execute_one(
        self, *command: str | bytes | int, durably: bool = False, deadline_s: float = math.inf
    ) -> Outcome:
        """Send one command, whose first argument is a key; as `execute`."""
        pending = PendingCommand.of(*command, slot=self.slot(str(command[1])))
        (outcome,) = await self.execute(pending, durably=durably, deadline_s=deadline_s)
        return outcome

    async def _outcomes(self, commands: Sequence[PendingCommand], wait_s: float) -> list[Outcome]:
        """Wait for the outcome of each command, until they have timed out."""
        deadline_s = time.monotonic() + wait_s
        for command in commands:
            self._waiting[command] = deadline_s, wait_s
        if deadline_s < self._timer_s:
            self._set_timer(deadline_s)
        try:
            return [await command.future for command in commands]
        finally:
            for command in commands:
                del self._waiting[command]
                command.future.cancel()

    def _set_timer(self, deadline_s: float) -> None:
        """Set the timer to the earliest deadline."""
        if self._timer is not None:
            self._timer.cancel()
        pause_s = max(TICK_S, deadline_s - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._resolve_expired)
        self._timer_s = deadline_s

    def _resolve_expired(self) -> None:
        """Resolve the commands that have timed out."""
        now_s, self._timer, self._timer_s = time.monotonic(), None, math.inf
        for command, (deadline_s, wait_s) in self._waiting.items():
            if deadline_s <= now_s:
                command.resolve(self._timeout_outcome(command, wait_s))
        waiting_s = [deadline_s for deadline_s, _ in self._waiting.values() if deadline_s > now_s]
        if waiting_s:
            self._set_timer(min(waiting_s))

    def _send_waits(self, connections: Iterable[PipelinedConnection]) -> list[PendingCommand]:
        """Send one WAIT on each connection."""
        waits: list[PendingCommand] = []
        for connection in connections:
            wait = PendingCommand.of("WAIT", self._replicas, self._wait_timeout_ms)
            wait.is_connection_bound = True
            connection.send([wait])
            waits.append(wait)
        return waits

    def _is_replicated(self, command: PendingCommand, waits: Iterable[PendingCommand]) -> bool:
        """Whether a WAIT after the command counted enough replicas."""
        # An error if the server is a replica now, or became one (UNBLOCKED).
        outcomes = [wait.future.result() for wait in waits if _follows(wait, command)]
        return any(
            isinstance(outcome, ServerReply) and outcome.value >= self._replicas
            for outcome in outcomes
        )

    def _timeout_outcome(self, command: PendingCommand, wait_s: float) -> Outcome:
        """The outcome of a command that was not answered in time."""
        connection = command.connection
        url = self.redacted_url if connection is None else connection.redacted_url
        cause = command.redirect_error or (
            self._topology_error if connection is None else connection.last_error
        )
        if command.is_sent:
            lost = ReplyLost(f"{url}: {describe_error(cause or TimeoutError())}")
            lost.__cause__ = cause
            return lost
        unavailable = StoreUnavailable(
            f"the store at {url} did not answer within {wait_s:.3g} s: "
            f"{describe_error(cause or TimeoutError())}",
            retry_after_s=RETRY_AFTER_S,
        )
        unavailable.__cause__ = cause
        return unavailable

    def _dispatch(self, commands: Sequence[PendingCommand]) -> Iterable[PipelinedConnection]:
        """Send commands to their servers; returns the connections that they are sent on.

        Commands without a known server are deferred.
        """
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

    # `RedirectHandler`

    def handle_redirect(self, command: PendingCommand, error: RedisError) -> bool:
        """Take over a command that a server did not execute; False if the error is no redirect."""
        return False

    def handle_disconnect(self) -> None:
        """Read the topology: another server may have been promoted."""
        if not self._is_closed and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

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
                uncovered_slots=topology.owners.count(None),
            )
        self._topology, self._owners = topology, list(topology.owners)
        for address in self._servers.keys() - {*topology.primaries}:
            connection = self._servers[address].connection
            if not self._may_keep_pending(connection):
                for command in connection.take_pending():
                    command.needs_asking = False
                    self._spawn(self._retry(command, 0))
            if connection.is_idle and address not in self._kept_servers(topology):
                server = self._servers.pop(address)
                self._closing.add(server)
                self._spawn(self._close_server(server))

    async def _close_server(self, server: RedisServer) -> None:
        await server.close()
        self._closing.discard(server)

    def _may_keep_pending(self, connection: PipelinedConnection) -> bool:
        """Whether pending commands stay on the connection to a server that is no primary now, which
        may still execute them."""
        return False

    def _kept_servers(self, topology: Topology) -> Collection[Address]:
        """The servers to which connections stay open although they are no primaries."""
        return topology.replicas

    def _layout(self, topology: Topology, coverage_error: str) -> Layout:
        servers = [self._server(address) for address in topology.primaries]
        return Layout(topology.version, servers, coverage_error)

    def _server(self, address: Address) -> RedisServer:
        server = self._servers.get(address)
        if server is None:
            url = StoreAddress.parse(self.settings.url).server_url(address)
            settings = self.settings.at(url)
            server = RedisServer(settings, self, self.telemetry, self.on_connect)
            self._servers[address] = server
        return server

    def _unavailable_error(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the servers of the store at {self.redacted_url} are not known after "
            f"{self._wait_s:g} s: {self._topology_error}",
            retry_after_s=RETRY_AFTER_S,
        )


class SingleServerRouter(Router):
    """Router of a single server, which the address names."""

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        server = RedisServer(settings, telemetry=self.telemetry)
        self._connections = (server.connection,)
        self.redacted_url = server.redacted_url
        address = Address(server.redacted_url, 0)
        self._servers[address] = server
        self._only = self._topology = Topology((address,), (address,), (), "")
        self._owners = [address]

    async def _discover(self) -> Topology:
        return self._only

    def refresh(self) -> None:
        self._connections[0].reconnect()

    def _dispatch(self, commands: Sequence[PendingCommand]) -> Iterable[PipelinedConnection]:
        self._connections[0].send(commands)
        return self._connections


def _follows(wait: PendingCommand, command: PendingCommand) -> bool:
    """Whether a WAIT was written after a command on the same connection and generation."""
    return (
        wait.connection is command.connection
        and wait.generation == command.generation
        and wait.sequence > command.sequence
    )
