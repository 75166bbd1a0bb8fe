"""What a store asks of what is behind it: requests in order, each with an outcome of its own.

A link brings requests to their servers' lanes and waits for their outcomes, for as long as a
call may take. Here is what every link has in common, and the link to a single server; that to a
cluster is in `cluster`.

With `replicated`, requests that write are followed, on the very connection that carried them, by
one WAIT for each server, which is answered when enough replicas have all that was written on
that connection before it. The server remembers that per connection: a WAIT on another
connection, or behind no write, is answered at once and says nothing. So a write counts as durable
only by a WAIT that was written after it on the same connection. One that was sent elsewhere, or
sent again, is followed by another WAIT; one whose connection is gone since is not durable, and
whoever asks again finds out.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from service.core.errors import CarryError, StoreUnavailable
from service.store.redis.connections import RETRY_AFTER_S, TRIES, text
from service.store.redis.pipelined_connection import Lane
from service.store.redis.redis_server import Server
from service.store.redis.store_request import Answer, Outcome, ReplyLost, Request
from service.store.settings import Durability, StoreSettings


class Layout(NamedTuple):
    """Which servers hold the streams.

    Attributes:
        name: changes when streams may have moved between servers.
        servers: in the order in which they are walked.
        gap: what part of the streams nobody holds, in words; empty where there is none.
    """

    name: str
    servers: list[Server]
    gap: str = ""


class Link(ABC):
    """The way to the servers of some settings; nothing is opened before the first call.

    Attributes:
        where: the address without secrets.
    """

    where: str

    def __init__(self, settings: StoreSettings):
        self._wait_s = settings.wait_s
        self._replicas = settings.replicas if settings.durability is Durability.REPLICATED else 0
        # Half of what a connection may be silent for, so that a WAIT does not look like a hang.
        self._fence_ms = max(1, round(settings.wait_s / TRIES / 2 * 1000))

    @abstractmethod
    async def start(self) -> None:
        """Find the servers; once, before use.

        Raises:
            StoreUnavailable, StoreRefused
        """

    @abstractmethod
    async def close(self) -> None:
        """Close every connection; once, after the last call returned."""

    @abstractmethod
    def slot(self, key: str) -> int:
        """What keys have in common that one request may be about."""

    @abstractmethod
    def owner(self, slot: int) -> Hashable:
        """The server of a slot in the current map of the cluster; None for a single server."""

    @abstractmethod
    async def layout(self) -> Layout:
        """The servers as they are now.

        Raises:
            StoreUnavailable, StoreRefused
        """

    @abstractmethod
    def server_of(self, slot: int) -> Server | None:
        """The connections to the server of a slot; None if no server is known to have it."""

    @abstractmethod
    def others(self) -> list[Server]:
        """Servers that may come to hold the streams."""

    @abstractmethod
    def reconnect(self) -> None:
        """Look the address up anew for the next requests: a server's role has changed."""

    @abstractmethod
    def _place(self, requests: Sequence[Request]) -> Sequence[Lane]:
        """Put requests where they belong; returns the lanes to be flushed. Those that belong
        nowhere yet are the link's to put later."""

    @abstractmethod
    def _trouble(self) -> BaseException | None:
        """Why requests that were on no lane had to wait."""

    async def ask(
        self, *requests: Request, durably: bool = False, deadline_s: float | None = None
    ) -> list[Outcome]:
        """The outcome of each request, all of them under way together; in the order of the
        calls, where they go to one server.

        Args:
            durably: they write, and count as done when they are as durable as the settings
                want; the answers say whether they are.
            deadline_s: until when the outcomes are waited for, of the monotonic clock; None:
                as long as the settings say.
        """
        wait_s = self._wait_s if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        fences: list[Request] = []
        durably = durably and self._replicas > 0
        try:
            async with asyncio.timeout(wait_s):
                lanes = self._place(requests)
                if durably:
                    fences = self._fence(lanes)
                _flush(lanes)
                for request in requests:
                    await request.future
                if durably:
                    await self._cover(requests, fences)
        except TimeoutError:
            pass
        finally:
            for request in (*requests, *fences):
                request.future.cancel()
        outcomes = [self._outcome(request, wait_s) for request in requests]
        if not durably:
            return outcomes
        return [
            outcome._replace(durable=self._is_covered(request, fences))
            if isinstance(outcome, Answer)
            else outcome
            for request, outcome in zip(requests, outcomes, strict=True)
        ]

    def _fence(self, lanes: Iterable[Lane]) -> list[Request]:
        fences: list[Request] = []
        for lane in lanes:
            fence = Request.of("WAIT", self._replicas, self._fence_ms)
            fence.bound = True
            lane.put([fence])
            fences.append(fence)
        return fences

    async def _cover(self, requests: Sequence[Request], fences: list[Request]) -> None:
        """Wait for the fences, and set others behind the writes that these did not follow."""
        for fence in fences:
            await fence.future
        late = {
            request.lane
            for request in requests
            if request.lane is not None
            and request.since == request.lane.since
            and not any(_follows(fence, request) for fence in fences)
        }
        more = self._fence(late)
        fences += more
        _flush(late)
        for fence in more:
            await fence.future

    def _is_covered(self, request: Request, fences: Iterable[Request]) -> bool:
        for fence in fences:
            if _follows(fence, request) and not fence.future.cancelled():
                outcome = fence.future.result()
                # Refused where the server is a replica now, and by UNBLOCKED when it becomes one.
                if isinstance(outcome, Answer) and outcome.value >= self._replicas:
                    return True
        return False

    def _outcome(self, request: Request, wait_s: float) -> Outcome:
        if not request.future.cancelled():
            return request.future.result()
        lane = request.lane
        where = self.where if lane is None else lane.where
        trouble = request.put_off or (self._trouble() if lane is None else lane.last)
        if request.sent:
            lost = ReplyLost(f"{where}: {text(trouble or TimeoutError())}")
            lost.__cause__ = trouble
            return lost
        unavailable = StoreUnavailable(
            f"the store at {where} did not answer within {wait_s:.3g} s: "
            f"{text(trouble or TimeoutError())}",
            retry_after_s=RETRY_AFTER_S,
        )
        unavailable.__cause__ = trouble
        return unavailable


class ServerLink(Link):
    """The way to a single server.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self._server = Server(settings)
        self._lanes = (self._server.lane,)
        self.where = self._server.where

    async def start(self) -> None:
        """Nothing has to be found."""

    async def close(self) -> None:
        await self._server.close()

    def slot(self, key: str) -> int:
        """The same for all: one request may be about any of them."""
        return 0

    def owner(self, slot: int) -> None:
        """Always None: there is one server."""

    async def layout(self) -> Layout:
        return Layout("", [self._server])

    def server_of(self, slot: int) -> Server | None:
        return self._server

    def others(self) -> list[Server]:
        return []

    def reconnect(self) -> None:
        self._server.lane.reconnect()

    def _place(self, requests: Sequence[Request]) -> Sequence[Lane]:
        self._server.lane.put(requests)
        return self._lanes

    def _trouble(self) -> BaseException | None:
        return self._server.lane.last


def first_error(outcomes: Sequence[Outcome]) -> CarryError | None:
    """The error of them all, where not one request was carried out."""
    first = outcomes[0]
    if isinstance(first, CarryError) and all(isinstance(each, CarryError) for each in outcomes):
        return first
    return None


def _follows(fence: Request, request: Request) -> bool:
    """Whether a fence was written behind a request on the same connection."""
    return (
        fence.lane is request.lane
        and fence.since == request.since
        and fence.number > request.number
    )


def _flush(lanes: Iterable[Lane]) -> None:
    """Send what was put."""
    for lane in lanes:
        lane.flush()
