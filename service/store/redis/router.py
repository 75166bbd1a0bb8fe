"""Routes commands to the servers that hold their keys, and waits for their outcomes.

This module holds what all routers share, and the router of a single server. Those of a cluster and
of a primary behind Sentinels find their servers by themselves (`discovering_router`).

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
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from service.core.errors import CarryError, StoreUnavailable
from service.store.capabilities import StoreTelemetry
from service.store.redis.commands import PendingCommand
from service.store.redis.connections import ATTEMPTS_PER_CALL, RETRY_AFTER_S, describe_error
from service.store.redis.outcomes import Outcome, ReplyLost, ServerReply
from service.store.redis.pipelined_connection import PipelinedConnection
from service.store.redis.redis_server import RedisServer
from service.store.settings import Durability, StoreSettings

TICK_S: Final = 0.01
"""Resolution of the timeouts of calls. One timer, set to the earliest, serves all: a timer for each
call would cost more than the rest of the call."""


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

    Attributes:
        redacted_url: the address without secrets.
        telemetry: what its connections count.
    """

    redacted_url: str

    def __init__(self, settings: StoreSettings):
        self.telemetry = StoreTelemetry()
        self._waiting: dict[PendingCommand, tuple[float, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._wait_s = settings.store_wait_s
        self._replicas = settings.replicas if settings.durability is Durability.REPLICATED else 0
        # Half of the response timeout: a blocked WAIT must not look like an unresponsive server.
        self._wait_timeout_ms = max(1, round(settings.store_wait_s / ATTEMPTS_PER_CALL / 2 * 1000))

    @abstractmethod
    async def start(self) -> None:
        """Discover the servers; once, before use.

        Raises:
            StoreUnavailable, StoreRefused
        """

    @abstractmethod
    async def close(self) -> None:
        """Close every connection; once, after the last call returned."""

    @abstractmethod
    def slot(self, key: str) -> int:
        """The hash slot of a key; one command may contain keys of one slot only."""

    def node_of(self, slot: int) -> Hashable:
        """Identifies the server of a slot; None if there is one server for all."""
        return None

    @abstractmethod
    async def layout(self) -> Layout:
        """The current servers.

        Raises:
            StoreUnavailable, StoreRefused
        """

    @abstractmethod
    def server_of(self, slot: int) -> RedisServer | None:
        """The server of a slot; None if no server is known to hold it."""

    @abstractmethod
    def any_server(self) -> RedisServer:
        """One of the current servers, for what does not depend on a key."""

    def replicas(self) -> list[RedisServer]:
        """The servers that a failover may promote."""
        return []

    @abstractmethod
    def refresh(self) -> None:
        """Resolve the address again for the next commands: a server's role has changed."""

    @abstractmethod
    def _dispatch(self, commands: Sequence[PendingCommand]) -> Iterable[PipelinedConnection]:
        """Send commands to their servers; returns the connections that they are sent on.

        Commands without a known server are deferred.
        """

    @abstractmethod
    def _last_error(self) -> BaseException | None:
        """Why commands without a connection had to wait."""

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
            self._last_error() if connection is None else connection.last_error
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


class SingleServerRouter(Router):
    """Router of a single server.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self._server = RedisServer(settings, telemetry=self.telemetry)
        self._connections = (self._server.connection,)
        self.redacted_url = self._server.redacted_url

    async def start(self) -> None:
        """Does nothing: the address names the server."""

    async def close(self) -> None:
        await self._server.close()

    def slot(self, key: str) -> int:
        """Always 0: one command may contain any keys."""
        return 0

    async def layout(self) -> Layout:
        return Layout("", [self._server])

    def server_of(self, slot: int) -> RedisServer | None:
        return self._server

    def any_server(self) -> RedisServer:
        return self._server

    def refresh(self) -> None:
        self._server.connection.reconnect()

    def _dispatch(self, commands: Sequence[PendingCommand]) -> Iterable[PipelinedConnection]:
        self._server.connection.send(commands)
        return self._connections

    def _last_error(self) -> BaseException | None:
        return self._server.connection.last_error


def check_executed(outcomes: Sequence[Outcome]) -> None:
    """Raise the first error if every outcome is an error, so that no command was executed."""
    first = outcomes[0]
    if isinstance(first, CarryError) and all(isinstance(each, CarryError) for each in outcomes):
        raise first


def _follows(wait: PendingCommand, command: PendingCommand) -> bool:
    """Whether a WAIT was written after a command on the same connection and generation."""
    return (
        wait.connection is command.connection
        and wait.generation == command.generation
        and wait.sequence > command.sequence
    )
