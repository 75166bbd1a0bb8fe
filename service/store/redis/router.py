"""Routes requests to the servers that hold their keys, and waits for their outcomes.

This module holds what both routers share, and the router of a single server; the router of a
cluster is in `cluster_router`.

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
from typing import NamedTuple

from service.core.errors import CarryError, StoreUnavailable
from service.store.observation import StoreTelemetry
from service.store.redis.connections import ATTEMPTS_PER_CALL, RETRY_AFTER_S, describe_error
from service.store.redis.outcomes import Outcome, Reply, ReplyLost
from service.store.redis.pipelined_connection import PipelinedConnection
from service.store.redis.redis_server import RedisServer
from service.store.redis.requests import StoreRequest
from service.store.settings import Durability, StoreSettings


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


class Deadlines:
    """Waits for outcomes until a deadline, by one timer, which is not set again for each call."""

    def __init__(self) -> None:
        self._waiting: dict[StoreRequest, float] = {}
        self._next_s = math.inf
        self._timer: asyncio.TimerHandle | None = None

    async def wait(
        self, requests: Sequence[StoreRequest], deadline_s: float
    ) -> list[Outcome | None]:
        """The outcomes of requests; None of those that have none at the deadline."""
        for request in requests:
            self._waiting[request] = deadline_s
        if deadline_s < self._next_s:
            self._set_timer(deadline_s)
        try:
            return [await request.future for request in requests]
        finally:
            for request in requests:
                self._waiting.pop(request, None)

    def _set_timer(self, deadline_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next_s = deadline_s
        delay_s = max(0.0, deadline_s - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        """Resolve the requests whose deadline has passed; set the timer to the next deadline."""
        self._next_s, self._timer = math.inf, None
        now_s = time.monotonic()
        for request, deadline_s in self._waiting.items():
            if deadline_s > now_s:
                self._next_s = min(self._next_s, deadline_s)
            elif not request.future.done():
                request.future.set_result(None)
        if self._next_s < math.inf:
            self._set_timer(self._next_s)


class Router(ABC):
    """Sends requests to the servers of an address; opens no connection before the first call.

    Attributes:
        redacted_url: the address without secrets.
        telemetry: what its connections count.
    """

    redacted_url: str

    def __init__(self, settings: StoreSettings):
        self.telemetry = StoreTelemetry()
        self._deadlines = Deadlines()
        self._wait_s = settings.wait_s
        self._replicas = settings.replicas if settings.durability is Durability.REPLICATED else 0
        # Half of the response timeout: a blocked WAIT must not look like an unresponsive server.
        self._wait_timeout_ms = max(1, round(settings.wait_s / ATTEMPTS_PER_CALL / 2 * 1000))

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
        """The hash slot of a key; one request may contain keys of one slot only."""

    @abstractmethod
    def node_of(self, slot: int) -> Hashable:
        """Identifies the server of a slot; None for a single server."""

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
    def replicas(self) -> list[RedisServer]:
        """The servers that a failover may promote."""

    @abstractmethod
    def refresh(self) -> None:
        """Resolve the address again for the next requests: a server's role has changed."""

    @abstractmethod
    def _enqueue(self, requests: Sequence[StoreRequest]) -> Sequence[PipelinedConnection]:
        """Enqueue requests on the connections of their servers.

        Returns the connections to flush. Requests without a known server are deferred.
        """

    @abstractmethod
    def _last_error(self) -> BaseException | None:
        """Why requests without a connection had to wait."""

    async def execute(
        self, *requests: StoreRequest, durably: bool = False, deadline_s: float | None = None
    ) -> list[Outcome]:
        """Send requests concurrently and return the outcome of each.

        Requests for one server are executed in the order of the calls.

        Args:
            durably: the requests write, and `is_durable` of their replies must be determined.
            deadline_s: time of the monotonic clock until which outcomes are awaited; None for the
                timeout of the settings.
        """
        now_s = time.monotonic()
        wait_s = self._wait_s if deadline_s is None else max(0.0, deadline_s - now_s)
        deadline_s = now_s + wait_s
        waits: list[StoreRequest] = []
        durably = durably and self._replicas > 0
        try:
            connections = self._enqueue(requests)
            if durably:
                waits = self._enqueue_waits(connections)
            _flush(connections)
            outcomes = [
                outcome or self._timeout_outcome(request, wait_s)
                for request, outcome in zip(
                    requests, await self._deadlines.wait(requests, deadline_s), strict=True
                )
            ]
            if durably:
                await self._await_replicas(requests, waits, deadline_s)
        finally:
            for request in (*requests, *waits):
                request.future.cancel()
        if not durably:
            return outcomes
        return [
            outcome._replace(is_durable=self._is_replicated(request, waits))
            if isinstance(outcome, Reply)
            else outcome
            for request, outcome in zip(requests, outcomes, strict=True)
        ]

    def _enqueue_waits(self, connections: Iterable[PipelinedConnection]) -> list[StoreRequest]:
        """Enqueue one WAIT on each connection."""
        waits: list[StoreRequest] = []
        for connection in connections:
            wait = StoreRequest.for_command("WAIT", self._replicas, self._wait_timeout_ms)
            wait.is_connection_bound = True
            connection.enqueue([wait])
            waits.append(wait)
        return waits

    async def _await_replicas(
        self, requests: Sequence[StoreRequest], waits: list[StoreRequest], deadline_s: float
    ) -> None:
        """Await the WAIT commands, and send others after writes that were redirected or resent."""
        await self._deadlines.wait(waits, deadline_s)
        connections = {
            request.connection
            for request in requests
            if request.connection is not None
            and request.generation == request.connection.generation
            and not any(_follows(wait, request) for wait in waits)
        }
        more = self._enqueue_waits(connections)
        waits += more
        _flush(connections)
        await self._deadlines.wait(more, deadline_s)

    def _is_replicated(self, request: StoreRequest, waits: Iterable[StoreRequest]) -> bool:
        """Whether a WAIT after the request counted enough replicas."""
        # An error if the server is a replica now, or became one (UNBLOCKED).
        outcomes = [wait.future.result() for wait in waits if _follows(wait, request)]
        return any(
            isinstance(outcome, Reply) and outcome.value >= self._replicas for outcome in outcomes
        )

    def _timeout_outcome(self, request: StoreRequest, wait_s: float) -> Outcome:
        """The outcome of a request that was not answered in time."""
        connection = request.connection
        url = self.redacted_url if connection is None else connection.redacted_url
        cause = request.redirect_error or (
            self._last_error() if connection is None else connection.last_error
        )
        if request.is_sent:
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
        """Always 0: one request may contain any keys."""
        return 0

    def node_of(self, slot: int) -> None:
        """Always None: there is one server."""

    async def layout(self) -> Layout:
        return Layout("", [self._server])

    def server_of(self, slot: int) -> RedisServer | None:
        return self._server

    def replicas(self) -> list[RedisServer]:
        return []

    def refresh(self) -> None:
        self._server.connection.reconnect()

    def _enqueue(self, requests: Sequence[StoreRequest]) -> Sequence[PipelinedConnection]:
        self._server.connection.enqueue(requests)
        return self._connections

    def _last_error(self) -> BaseException | None:
        return self._server.connection.last_error


def first_error(outcomes: Sequence[Outcome]) -> CarryError | None:
    """The first error, if every outcome is an error and so no request was executed."""
    first = outcomes[0]
    if isinstance(first, CarryError) and all(isinstance(each, CarryError) for each in outcomes):
        return first
    return None


def _follows(wait: StoreRequest, request: StoreRequest) -> bool:
    """Whether a WAIT was written after a request on the same connection and generation."""
    return (
        wait.connection is request.connection
        and wait.generation == request.generation
        and wait.sequence > request.sequence
    )


def _flush(connections: Iterable[PipelinedConnection]) -> None:
    for connection in connections:
        connection.flush()
