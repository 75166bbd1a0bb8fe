"""All connections of a worker: limits on their number, their idle times and their buffered bytes.

One task checks every connection once a second, so that a request needs no timer of its own. A
connection whose phase (`Phase`) has not changed since an earlier check has waited at least as long
as the time between the checks. So every timeout may be exceeded by up to a second.
"""

from __future__ import annotations

import asyncio
import resource
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import ClassVar, Final

import structlog

from service.server.errors import TooManyConnections
from service.server.reading import ReadingTurns
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

MAX_REJECTED: Final = 64
"""Connections over a limit that get an error; further ones are closed at once."""

RESERVED_FILES: Final = 256
"""Descriptors reserved for models, logs and store connections; at most a quarter of the limit."""

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


class Connection(ABC):
    """One client's connection: its phase, what it buffers, and how it is closed.

    Attributes:
        transport_name: its transport, as metrics name it.
        progress: grows whenever a request or reply is complete.
        body_bytes: bytes of request bodies that it buffers.
        body_began_s: when the body that it is receiving began, on the loop's clock.
    """

    transport_name: ClassVar[str]
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    progress = 0
    body_bytes = 0
    body_began_s = 0.0
    _connections: Connections
    _half_closed = False
    _is_lingering = False

    @property
    @abstractmethod
    def requests(self) -> int:
        """Requests that are being answered."""

    @property
    @abstractmethod
    def phase(self) -> Phase:
        """What it is waiting for now."""

    def _closing_phase(self, *, write_paused: bool) -> Phase | None:
        """The phase while the client has to read or the connection closes; None otherwise."""
        ends = self._is_lingering or self.transport.is_closing()
        if write_paused or (ends and self.transport.get_write_buffer_size()):
            return Phase.SEND
        return Phase.LINGER if ends else None

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that it buffers."""
        return self.transport.get_write_buffer_size()

    @abstractmethod
    def expire(self, phase: Phase) -> None:
        """Handle the timeout of a phase."""

    @abstractmethod
    def retire(self) -> None:
        """Close the connection after its next response; a live socket as soon as possible."""

    @abstractmethod
    def shed_body(self) -> None:
        """Reject the body that it is receiving, because all bodies together exceed the limit."""

    def abort(self) -> None:
        """Close it at once and drop what is buffered."""
        self.transport.abort()

    def _linger(self) -> None:
        """Lingering close: flush, send FIN, and discard further input for a moment."""
        if self._is_lingering:
            return
        self._is_lingering = True
        self._drop_received()
        self._connections.set_body_bytes(self, 0)
        if self.transport.is_closing():
            return
        if self._half_closed or not self.transport.can_write_eof():
            self.transport.close()
            return
        try:
            self.transport.write_eof()
        except OSError:
            # the client has disconnected already
            self.transport.abort()

    @abstractmethod
    def _drop_received(self) -> None:
        """Drop received bytes that were not processed, and read further ones."""


class Connections:
    """The connections of a worker, and the enforcement of their limits.

    Attributes:
        limits: the limits.
        turns: in which connections read long bodies.
        body_bytes: bytes of request bodies that all of them buffer.
        loads: open connections and unanswered requests of each transport at the last check.
        close_after_response: whether each connection is closed after its next response.
    """

    def __init__(self, limits: ConnectionSettings | None = None):
        self.limits = limits or ConnectionSettings()
        self.turns = ReadingTurns()
        self._seen: dict[Connection, tuple[Phase, int, float]] = {}
        self._idle: set[Connection] = set()
        self.body_bytes = 0
        self._networks: dict[Connection, str] = {}
        self._per_network: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._rejected_networks: Counter[str] = Counter()
        self._logged_s = -LOG_INTERVAL_S
        self._checks: asyncio.Task[None] | None = None
        self.loads: Mapping[str, tuple[int, int]] = {}
        self.close_after_response = False

    def announce_close(self) -> None:
        """Close each connection after its next response from now on."""
        self.close_after_response = True

    def retire(self) -> None:
        """Close each connection after its next response, and live sockets as soon as possible."""
        self.announce_close()
        for connection in list(self._seen):
            connection.retire()

    def abort(self) -> None:
        """Close all connections at once."""
        for connection in list(self._seen):
            connection.abort()

    def __len__(self) -> int:
        return len(self._seen)

    def count_active(self) -> int:
        """Count the connections without those that nobody used between the last two checks."""
        return len(self._seen) - len(self._idle)

    @property
    def is_full(self) -> bool:
        """Whether another connection would be rejected."""
        return len(self._seen) >= self.limits.max_connections

    def add(self, connection: Connection) -> TooManyConnections | None:
        """Register a new connection; returns the error to answer it with if it exceeds a limit.

        Far beyond the limit it is aborted.
        """
        loop = connection.loop
        self._seen[connection] = (connection.phase, connection.progress, loop.time())
        if self._checks is None:
            self._checks = loop.create_task(self._check_periodically(loop))
        count, limit, scope = len(self._seen), self.limits.max_connections, ""
        event = "rejected"
        peer = connection.transport.get_extra_info("peername")
        if self.limits.max_connections_per_address and (network := client_network(peer)):
            self._networks[connection] = network
            self._per_network[network] += 1
            per_network = self._per_network[network]
            if per_network > self.limits.max_connections_per_address:
                self._rejected_networks[network] += 1
                count, limit = per_network, self.limits.max_connections_per_address
                event, scope = "rejected_by_address", f" from {network}"
        if count <= limit:
            return None
        self._events[event] += 1
        if count > limit + MAX_REJECTED:
            connection.abort()
        return TooManyConnections(f"expected at most {limit} connections of a worker{scope}")

    def remove(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self._seen.pop(connection, None)
        self._idle.discard(connection)
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
        self.body_bytes += count - connection.body_bytes
        connection.body_bytes = count
        while self.body_bytes > self.limits.max_pending_body_bytes:
            unfinished = [c for c in self._seen if c.body_bytes and c.phase is Phase.BODY]
            if not unfinished:
                break
            self._events["body_shed"] += 1
            min(unfinished, key=lambda each: each.body_began_s).shed_body()

    async def _check_periodically(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                for _ in self.check(loop.time()):
                    await asyncio.sleep(0)
            except Exception:
                log.exception("connection_check_failed")

    def check(self, now_s: float) -> Iterator[None]:
        """Expire connections that have waited too long, and shed replies that are not read.

        Args:
            now_s: the time on the loop's clock.

        Yields:
            After every `CHECKED_AT_ONCE` connections.
        """
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


def raise_open_files_limit() -> None:
    """Raise the soft limit of this process, and of those that it starts, to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:
        # Some systems allow less than the hard limit.
        log.warning("open_files_limit_not_raised", limit=soft, hard_limit=hard, reason=str(error))


def limit_connections_to_open_files(wanted: int) -> int:
    """Reduce a number of connections to what the limit on open files allows, with a warning."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    allowed = limit - min(RESERVED_FILES, limit // 4)
    if allowed < wanted:
        log.warning("connections_limited_by_open_files", limit=limit, max_connections=allowed)
    return min(wanted, allowed)
