"""All connections of a worker: how many there may be, how long they may be silent, what they keep.

One coarse timer looks at every connection once a second, so that a request costs no timer of its
own: a connection whose phase (`Phase`) has not changed since an earlier look has waited at least as
long as from that look to this one. All limits are therefore exceeded by up to a second, and by no
more.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

import structlog

log = structlog.get_logger(__name__)

CONNECTIONS: Final = "connections"
"""Their name in the lifespan's state, where the server's connections find them."""

INTERVAL_S: Final = 1.0
"""Between two looks at every connection."""

LOG_INTERVAL_S: Final = 10.0
"""At least, between two lines about connections that were refused or closed."""

BODY_BYTES_PER_S: Final = 16 * 1024
"""Rate of a slow upload: every so many bytes of a body extend its time by a second."""

LINGER_S: Final = 2.0
"""How long a connection that is closed is still read, so that the last answer is not lost by the
reset that unread bytes would cause (RFC 9112, section 9.6)."""

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds on the connections of a worker; see the settings of the same names."""

    max_connections: int = 10_000
    keep_alive_s: float = 5.0
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    max_pending_body_bytes: int = 256 * MIB
    max_pending_reply_bytes: int = 256 * MIB


class Phase(Enum):
    """What a connection waits for."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    REFUSED_BODY = "refused_body"
    SERVICE = "service"
    READER = "reader"
    LINGER = "linger"


class Connection(Protocol):
    """What is needed of each.

    Attributes:
        turn: counts the requests and replies that came to an end.
        body_bytes: of requests, kept by it.
        body_began_s: when the body that it receives began, of the loop's clock.
    """

    turn: int
    body_bytes: int
    body_began_s: float

    @property
    def phase(self) -> Phase:
        """What it waits for now."""

    @property
    def unsent_bytes(self) -> int:
        """Of replies, kept by it."""

    def expire(self, phase: Phase) -> None:
        """Its time in this phase is over."""

    def shed_body(self) -> None:
        """Refuse the body that it receives."""

    def abort(self) -> None:
        """Close it at once, whatever it keeps."""


class Connections:
    """The connections of a worker.

    Attributes:
        limits: their bounds.
    """

    def __init__(self, limits: ConnectionLimits | None = None):
        self.limits = limits or ConnectionLimits()
        self._seen: dict[Connection, tuple[Phase, int, float]] = {}
        self._body_bytes = 0
        self._events: Counter[str] = Counter()
        self._logged_s = -LOG_INTERVAL_S
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> bool:
        """Watch a new connection. Whether there is room for it: otherwise it is to be refused."""
        self._seen[connection] = (connection.phase, connection.turn, loop.time())
        if self._timer is None:
            self._timer = loop.call_later(INTERVAL_S, self._look, loop)
        has_room = len(self._seen) <= self.limits.max_connections
        if not has_room:
            self._events["refused"] += 1
        return has_room

    def remove(self, connection: Connection) -> None:
        """It was closed."""
        self._seen.pop(connection, None)
        self.keep_body(connection, 0)
        if not self._seen and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def keep_body(self, connection: Connection, count: int) -> None:
        """A connection keeps so many bytes of requests now. Beyond the bound on all of them, the
        bodies that have been on their way for longest are refused."""
        self._body_bytes += count - connection.body_bytes
        connection.body_bytes = count
        while self._body_bytes > self.limits.max_pending_body_bytes:
            unfinished = [c for c in self._seen if c.body_bytes and c.phase is Phase.BODY]
            if not unfinished:
                break
            self._events["body_shed"] += 1
            min(unfinished, key=lambda each: each.body_began_s).shed_body()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(INTERVAL_S, self._look, loop)
        self.look(loop.time())

    def look(self, now_s: float) -> None:
        """End what has waited for too long, and what keeps too much for readers that do not read.

        Args:
            now_s: of the loop's clock.
        """
        unsent_bytes = 0
        for connection, (phase, turn, since_s) in list(self._seen.items()):
            unsent_bytes += connection.unsent_bytes
            if connection.phase is not phase or connection.turn != turn:
                self._seen[connection] = (connection.phase, connection.turn, now_s)
            elif now_s - since_s > self._allowed_s(connection, phase):
                if phase not in (Phase.IDLE, Phase.LINGER):
                    self._events[f"{phase.value}_timeout"] += 1
                connection.expire(phase)
        if unsent_bytes > self.limits.max_pending_reply_bytes:
            self._shed_replies(unsent_bytes)
        if self._events and now_s - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now_s
            log.warning(
                "connections_closed", open=len(self), limit=self.limits.max_connections,
                **self._events,
            )  # fmt: skip
            self._events.clear()

    def _shed_replies(self, unsent_bytes: int) -> None:
        """Abort connections whose readers are behind, the longest first."""
        behind = [each for each in self._seen.items() if each[0].phase is Phase.READER]
        for connection, _ in sorted(behind, key=lambda each: each[1][2]):
            if unsent_bytes <= self.limits.max_pending_reply_bytes:
                break
            unsent_bytes -= connection.unsent_bytes
            self._events["reader_shed"] += 1
            connection.abort()

    def _allowed_s(self, connection: Connection, phase: Phase) -> float:
        limits = self.limits
        match phase:
            case Phase.IDLE | Phase.REFUSED_BODY:
                return limits.keep_alive_s
            case Phase.HEAD:
                return limits.head_timeout_s
            case Phase.BODY:
                return limits.body_timeout_s + connection.body_bytes / BODY_BYTES_PER_S
            case Phase.READER:
                return limits.send_timeout_s
            case Phase.LINGER:
                return LINGER_S
            case Phase.SERVICE:
                return float("inf")
