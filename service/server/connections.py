"""All connections of a worker: limits on their number, their idle times and their buffered bytes.

One task checks every connection once a second, so that a request needs no timer of its own. A
connection whose phase (`Phase`) has not changed since an earlier check has waited at least as long
as the time between the checks. So every timeout may be exceeded by up to a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Final, NamedTuple, Protocol

import structlog

from service.server.reading_turns import ReadingTurns
from service.server.settings import ConnectionSettings

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S: Final = 1.0
"""Time between two checks of all connections."""

CHECKED_AT_ONCE: Final = 500
"""Connections that are checked before other tasks run, in about a millisecond."""

EXPIRY_COST: Final = 9
"""Cost of closing a connection, in checks: those that were opened together expire together."""

LOG_INTERVAL_S: Final = 10.0
"""Minimum time between two log lines about connections that were rejected or closed."""

LOGGED_ADDRESSES: Final = 5
"""Addresses that a log line names, those with the most rejected connections."""

BODY_BYTES_PER_S: Final = 16 * 1024
"""Minimum rate of an upload: this many bytes of a body extend its timeout by a second."""

LINGER_S: Final = 2.0
"""How long a closing connection is still read (lingering close), so that the last reply is not lost
to the reset that unread bytes would cause (RFC 9112, section 9.6)."""


class Phase(Enum):
    """What a connection is waiting for; the values are part of names in the log."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    REJECTED_BODY = "rejected_body"
    SERVICE = "service"
    LIVE = "live"
    SEND = "send"
    LINGER = "linger"


class Excess(NamedTuple):
    """A limit that a new connection exceeds.

    Attributes:
        number: connections that it applies to, with the new one.
        limit: how many are accepted.
        scope: which those are, for the message.
    """

    number: int
    limit: int
    scope: str


def client_network(peer: object) -> str:
    """The address that a client is limited by, from its transport's; empty without one.

    Of IPv6 it is the network of 64 bits, in which a client chooses its addresses.
    """
    if not isinstance(peer, tuple) or not peer:
        return ""
    address = ip_address(str(peer[0]).partition("%")[0])
    if isinstance(address, IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or IPv6Network((address, 64), strict=False))


class Connection(Protocol):
    """What `Connections` needs of a connection.

    Attributes:
        transport_name: its transport, as metrics name it.
        progress: grows whenever a request or reply is complete.
        body_bytes: bytes of request bodies that it buffers.
        body_began_s: when the body that it is receiving began, on the loop's clock.
    """

    transport_name: str
    progress: int
    body_bytes: int
    body_began_s: float

    @property
    def requests(self) -> int:
        """Requests that are being answered."""

    @property
    def phase(self) -> Phase:
        """What it is waiting for now."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that it buffers."""

    def expire(self, phase: Phase) -> None:
        """Handle the timeout of a phase."""

    def retire(self) -> None:
        """Close the connection after its next response; a live socket as soon as possible."""

    def shed_body(self) -> None:
        """Reject the body that it is receiving."""

    def abort(self) -> None:
        """Close it at once and drop what is buffered."""


class Connections:
    """The connections of a worker, and the enforcement of their limits.

    Attributes:
        limits: the limits.
        turns: in which connections read long bodies.
        on_drain: called when the graceful shutdown begins, to end responses without an end.
        loads: open connections and unanswered requests of each transport at the last check.
        close_after_response: whether each connection is closed after its next response.
    """

    def __init__(self, limits: ConnectionSettings | None = None):
        self.limits = limits or ConnectionSettings()
        self.turns = ReadingTurns()
        self._seen: dict[Connection, tuple[Phase, int, float]] = {}
        self._idle: set[Connection] = set()
        self._body_bytes = 0
        self._networks: dict[Connection, str] = {}
        self._per_network: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._rejected_networks: Counter[str] = Counter()
        self._logged_s = -LOG_INTERVAL_S
        self._checks: asyncio.Task[None] | None = None
        self._is_draining = False
        self.on_drain: list[Callable[[], None]] = []
        self.loads: Mapping[str, tuple[int, int]] = {}
        self.close_after_response = False

    def drain(self) -> None:
        """Begin the graceful shutdown; each connection calls it."""
        if not self._is_draining:
            self._is_draining = True
            for begin in self.on_drain:
                begin()

    def announce_close(self) -> None:
        """Close each connection after its next response from now on."""
        self.close_after_response = True

    def retire(self) -> None:
        """As `announce_close`, and end live sockets and endless responses (watches) now."""
        self.announce_close()
        self.drain()
        for connection in list(self._seen):
            connection.retire()

    def __len__(self) -> int:
        return len(self._seen)

    def count_active(self) -> int:
        """Count the connections without those that nobody used between the last two checks."""
        return len(self._seen) - len(self._idle)

    @property
    def is_full(self) -> bool:
        """Whether another connection would be rejected."""
        return len(self._seen) >= self.limits.max_connections

    def add(
        self, connection: Connection, loop: asyncio.AbstractEventLoop, peer: object = None
    ) -> Excess | None:
        """Register a new connection; returns which limit it exceeds if it must be rejected.

        Args:
            peer: the client's address, as a transport gives it.
        """
        self._seen[connection] = (connection.phase, connection.progress, loop.time())
        if self._checks is None:
            self._checks = loop.create_task(self._check_periodically(loop))
        limits = self.limits
        if limits.max_connections_per_address and (network := client_network(peer)):
            self._networks[connection] = network
            self._per_network[network] += 1
            if self._per_network[network] > limits.max_connections_per_address:
                self._events["rejected_by_address"] += 1
                self._rejected_networks[network] += 1
                return Excess(
                    self._per_network[network],
                    limits.max_connections_per_address,
                    f"of a worker from {network}",
                )
        if len(self._seen) <= limits.max_connections:
            return None
        self._events["rejected"] += 1
        return Excess(len(self._seen), limits.max_connections, "of a worker")

    def remove(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self._seen.pop(connection, None)
        self._idle.discard(connection)
        self.turns.forget(connection)
        self.set_body_bytes(connection, 0)
        network = self._networks.pop(connection, None)
        if network is not None:
            self._per_network[network] -= 1
            if not self._per_network[network]:
                del self._per_network[network]
        if not self._seen and self._checks is not None:
            self._checks.cancel()
            self._checks = None
            self.loads = {}

    def set_body_bytes(self, connection: Connection, count: int) -> None:
        """Set how many bytes of request bodies a connection buffers.

        Beyond the limit on all connections, the oldest incomplete bodies are rejected.
        """
        self._body_bytes += count - connection.body_bytes
        connection.body_bytes = count
        while self._body_bytes > self.limits.max_pending_body_bytes:
            unfinished = [c for c in self._seen if c.body_bytes and c.phase is Phase.BODY]
            if not unfinished:
                break
            self._events["body_shed"] += 1
            min(unfinished, key=lambda each: each.body_began_s).shed_body()

    async def _check_periodically(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                for _ in self._check_parts(loop.time()):
                    await asyncio.sleep(0)
            except Exception:
                log.exception("connection_check_failed")

    def check(self, now_s: float) -> None:
        """Expire connections that have waited too long, and shed replies that are not read.

        Args:
            now_s: the time on the loop's clock.
        """
        for _ in self._check_parts(now_s):
            pass

    def _check_parts(self, now_s: float) -> Iterator[None]:
        """The same; yields after every `CHECKED_AT_ONCE` connections."""
        unsent_bytes = 0
        open_ones: Counter[str] = Counter()
        requests: Counter[str] = Counter()
        seen = list(self._seen.items())
        checked = 0
        for connection, (phase, progress, since_s) in seen:
            checked += 1
            if checked >= CHECKED_AT_ONCE:
                checked = 0
                yield
            if connection not in self._seen:
                # closed while others were checked
                continue
            unsent_bytes += connection.unsent_bytes
            open_ones[connection.transport_name] += 1
            requests[connection.transport_name] += connection.requests
            if connection.phase is not phase or connection.progress != progress:
                self._seen[connection] = (connection.phase, connection.progress, now_s)
                self._idle.discard(connection)
                continue
            if phase in (Phase.IDLE, Phase.LIVE):
                self._idle.add(connection)
            if now_s - since_s > self._timeout_s(connection, phase):
                if phase not in (Phase.IDLE, Phase.LIVE, Phase.LINGER):
                    self._events[f"{phase.value}_timeout"] += 1
                connection.expire(phase)
                checked += EXPIRY_COST
        self.loads = {name: (count, requests[name]) for name, count in open_ones.items()}
        if unsent_bytes > self.limits.max_pending_reply_bytes:
            self._shed_replies(unsent_bytes)
        if self._events and now_s - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now_s
            facts: dict[str, object] = {"limit": self.limits.max_connections, **self._events}
            if self._rejected_networks:
                facts["addresses"] = dict(self._rejected_networks.most_common(LOGGED_ADDRESSES))
            log.warning("connections_closed", open=len(self), **facts)
            self._events.clear()
            self._rejected_networks.clear()

    def _shed_replies(self, unsent_bytes: int) -> None:
        """Abort connections whose clients do not read, those that have waited longest first."""
        behind = [each for each in self._seen.items() if each[0].phase is Phase.SEND]
        for connection, _ in sorted(behind, key=lambda each: each[1][2]):
            if unsent_bytes <= self.limits.max_pending_reply_bytes:
                break
            unsent_bytes -= connection.unsent_bytes
            self._events["reply_shed"] += 1
            connection.abort()

    def _timeout_s(self, connection: Connection, phase: Phase) -> float:
        limits = self.limits
        match phase:
            case Phase.IDLE | Phase.REJECTED_BODY:
                return limits.keep_alive_s
            case Phase.HEAD:
                return limits.head_timeout_s
            case Phase.BODY:
                return limits.body_timeout_s + connection.body_bytes / BODY_BYTES_PER_S
            case Phase.SEND:
                return limits.send_timeout_s
            case Phase.LIVE:
                # spread, since many sockets are opened at once after a restart
                spread = 0.5 + id(connection) // 16 % 256 / 512
                return limits.websocket_ping_s * spread or float("inf")
            case Phase.LINGER:
                return LINGER_S
            case Phase.SERVICE:
                return float("inf")
