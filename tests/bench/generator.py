"""The load generator, in its own process: raw sockets, keep-alive, one send and one read a request.

Closed loop: each connection sends its next request when the last is answered. Open loop: the
moments of sending are fixed beforehand, and a latency counts from that moment, also where no
connection was free for it; so a server that stalls is charged for all who came meanwhile.
Loopback only, and each run is bounded by its duration and a grace. `Driver` is the caller's side.
"""

from __future__ import annotations

import ctypes
import gc
import re
import select
import socket
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tests.bench.processes import helper_process
from tests.bench.traffic import Sampled, Ticket, Traffic, TrafficSpec, WrongReplyError

HOST = "127.0.0.1"
READ_BYTES = 1 << 18
GRACE_S = 20.0
"""How long replies are waited for after the last request was sent."""

LEAD_S = 0.05
"""Between the schedule's making and its first moment."""

HAS_EPOLL = hasattr(select, "epoll")
OPEN_CONNECTIONS = 256
PR_SET_TIMERSLACK = 29
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding: *chunked")
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True)
class Load:
    """The measurements of one run.

    Attributes:
        seconds: from the first request sent to the last answered.
        latencies_s: one per request, in the order of the replies.
        chunks: chunks answered.
        events: events in them.
        cpu_s: the generator's own processor time.
        late_s: open loop: how long after its moment each request was sent.
        unsent: open loop: requests that could not be sent before the end.
        sampled: replies of sampled streams.
    """

    seconds: float = 0.0
    latencies_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    chunks: int = 0
    events: int = 0
    cpu_s: float = 0.0
    late_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    unsent: int = 0
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def chunks_per_s(self) -> float:
        """The rate over the whole run."""
        return self.chunks / self.seconds

    def complete(self, traffic: Traffic, latencies: array[float]) -> Load:
        """Add the latencies and what the traffic has counted."""
        self.latencies_s = np.array(latencies)
        self.chunks = len(latencies) * max(1, traffic.spec.items)
        self.events += traffic.events
        self.sampled = traffic.sampled
        return self

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the latencies, in milliseconds."""
        return float(np.percentile(self.latencies_s, percent)) * 1000


def draw_arrivals(rate_per_s: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """The moments of an open loop, in seconds from its beginning: a Poisson process."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate_per_s, int(rate_per_s * seconds * 1.2) + 10)
    moments: NDArray[np.float64] = np.cumsum(gaps)
    return moments[moments < seconds]


class Connection:
    """One connection with at most one request in flight."""

    __slots__ = ("_body_at", "_is_chunked", "_missing_bytes", "_pieces", "sent_s", "sock", "ticket")

    def __init__(self, port: int):
        self.sock = socket.create_connection((HOST, port), GRACE_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ticket: Ticket = ()
        self.sent_s = 0.0
        self._pieces: list[bytes] = []
        self._missing_bytes = 0
        self._body_at = 0
        self._is_chunked = False

    def receive(self) -> tuple[bytes, int] | None:
        """A whole reply and where its body begins, or None while some of it is missing.

        Raises:
            WrongReplyError: another status than 200, no length, or the connection was closed.
        """
        data = self.sock.recv(READ_BYTES)
        if not self._pieces:
            while (end := data.find(b"\r\n\r\n")) < 0 and (more := self.sock.recv(READ_BYTES)):
                data += more
            length = _LENGTH.search(data, 0, end)
            self._is_chunked = length is None and bool(_CHUNKED.search(data, 0, end))
            if not data.startswith(b"HTTP/1.1 200 ") or not (length or self._is_chunked):
                raise WrongReplyError(f"expected status 200 and a length, got {data[:800]!r}")
            self._body_at = end + 4
            if length is not None:
                self._missing_bytes = self._body_at + int(length[1]) - len(data)
                if not self._missing_bytes:
                    return data, self._body_at
        else:
            self._missing_bytes -= len(data)
        self._pieces.append(data)
        reply: bytes | None
        if self._is_chunked:
            # Look for the end only where the last bytes may be it.
            ends = (piece[-len(_LAST_CHUNK) :] for piece in self._pieces[-len(_LAST_CHUNK) :])
            is_last = b"".join(ends).endswith(_LAST_CHUNK)
            reply = _decode_chunks(b"".join(self._pieces), self._body_at) if is_last else None
        else:
            reply = None if self._missing_bytes else b"".join(self._pieces)
        if reply is None:
            if data and (self._is_chunked or self._missing_bytes > 0):
                return None
            start = b"".join(self._pieces)[:300]
            raise WrongReplyError(f"expected one whole reply, got {start!r}")
        self._pieces.clear()
        return reply, self._body_at


def _decode_chunks(reply: bytes, body_at: int) -> bytes | None:
    """The reply with its body's chunks joined; None while some is missing."""
    pieces, at = [reply[:body_at]], body_at
    while (end := reply.find(b"\r\n", at)) >= 0:
        size, at = int(reply[at:end], 16), end + 2
        pieces.append(reply[at : at + size])
        at += size + 2
        if size == 0:
            return b"".join(pieces) if at == len(reply) else None
    return None


class Generator:
    """Runs loads, one after another; the streams of a spec keep their positions in between."""

    def __init__(self) -> None:
        self._traffic: dict[str, Traffic] = {}

    def traffic(self, key: str, spec: TrafficSpec) -> None:
        """Make the streams that later loads name."""
        self._traffic[key] = Traffic(spec)

    def closed(self, key: str, port: int, connections: int, seconds: float, least: int = 0) -> Load:
        """Load a port from connections that each wait for their reply.

        Args:
            least: chunks of each sampled stream, however long that takes.
        """
        traffic, latencies, clock = self._traffic[key], array("d"), time.perf_counter
        with _connections(port, connections) as (by_fd, wait), _measured(traffic) as load:
            ends_s = clock() + seconds
            in_flight = 0
            for connection in by_fd.values():
                if traffic.ready:
                    _send(connection, traffic)
                    in_flight += 1
            while in_flight:
                ready = wait(GRACE_S)
                if not ready:
                    raise WrongReplyError(f"{in_flight} requests were not answered in {GRACE_S} s")
                for fd, _ in ready:
                    connection = by_fd[fd]
                    reply = connection.receive()
                    if reply is None:
                        continue
                    now_s = clock()
                    latencies.append(now_s - connection.sent_s)
                    traffic.accept(connection.ticket, *reply)
                    if now_s < ends_s or traffic.lacks(least):
                        _send(connection, traffic)
                    else:
                        in_flight -= 1
        return load.complete(traffic, latencies)

    def open(
        self, key: str, port: int, connections: int, rate_per_s: float, seconds: float, seed: int
    ) -> Load:
        """Load a port at moments fixed beforehand; `rate_per_s` counts requests."""
        traffic, clock = self._traffic[key], time.perf_counter
        due = draw_arrivals(rate_per_s, seconds, seed)
        latencies, late = array("d"), array("d")
        with _connections(port, connections) as (by_fd, wait), _measured(traffic) as load:
            idle = list(by_fd.values())
            moments = (due + clock() + LEAD_S).tolist()
            ends_s = clock() + LEAD_S + seconds + GRACE_S
            at, count = 0, len(moments)
            while at < count or len(idle) < len(by_fd):
                now_s = clock()
                if now_s > ends_s:
                    break
                while at < count and moments[at] <= now_s and idle and traffic.ready:
                    connection = idle.pop()
                    late.append(clock() - moments[at])
                    _send(connection, traffic)
                    connection.sent_s = moments[at]
                    at += 1
                pause_s = GRACE_S
                if at < count and idle and traffic.ready:
                    pause_s = max(0.0, moments[at] - clock())
                for fd, _ in wait(pause_s):
                    connection = by_fd[fd]
                    reply = connection.receive()
                    if reply is not None:
                        latencies.append(clock() - connection.sent_s)
                        traffic.accept(connection.ticket, *reply)
                        idle.append(connection)
        load.late_s, load.unsent = np.array(late), count - at
        return load.complete(traffic, latencies)


def _send(connection: Connection, traffic: Traffic) -> None:
    request, connection.ticket = traffic.request()
    connection.sent_s = time.perf_counter()
    connection.sock.sendall(request)


Wait = Callable[[float], list[tuple[int, int]]]
"""Waits for at most some seconds; gives the descriptors that can be read."""


@contextmanager
def _connections(port: int, count: int) -> Iterator[tuple[dict[int, Connection], Wait]]:
    """Open connections by descriptor, and what waits for them; closed with the block."""
    poller: Any = select.epoll() if HAS_EPOLL else select.poll()

    def wait(timeout_s: float) -> list[tuple[int, int]]:
        if HAS_EPOLL and timeout_s < 1:
            # Unlike epoll itself, select does not round the time up to a millisecond.
            select.select([poller.fileno()], [], [], timeout_s)
            timeout_s = 0
        ready: list[tuple[int, int]] = poller.poll(timeout_s if HAS_EPOLL else timeout_s * 1000)
        return ready

    with ExitStack() as stack:
        by_fd = {}
        for _ in range(count):
            connection = Connection(port)
            fd = stack.enter_context(connection.sock).fileno()
            poller.register(fd, select.POLLIN)
            by_fd[fd] = connection
        yield by_fd, wait
        if HAS_EPOLL:
            poller.close()


@contextmanager
def _measured(traffic: Traffic) -> Iterator[Load]:
    """A load with the wall time, processor time and events of the block."""
    traffic.sampled = []
    load = Load(events=-traffic.events, cpu_s=-time.process_time(), seconds=-time.perf_counter())
    yield load
    load.seconds += time.perf_counter()
    load.cpu_s += time.process_time()


_generator = Generator()
"""The helper process's own."""


def _prepare() -> None:
    gc.disable()
    if sys.platform == "linux":
        # Otherwise the kernel may send each request of an open loop 50 us late.
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _call(method: str, arguments: Sequence[Any]) -> Any:
    return getattr(_generator, method)(*arguments)


class Driver:
    """A load generator in its own process on these cores, used in a `with` block."""

    def __init__(self, cores: Sequence[int]):
        self._process = helper_process(cores, _prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def start(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of the generator there, without waiting for its result."""
        return self._process.submit(_call, method, arguments)

    def traffic(self, key: str, spec: TrafficSpec) -> None:
        """Make the streams that later loads name by `key`."""
        self.start("traffic", key, spec).result()

    def closed(self, key: str, port: int, connections: int, seconds: float, least: int = 0) -> Load:
        """Closed loop; see `Generator.closed`."""
        load: Load = self.start("closed", key, port, connections, seconds, least).result()
        return load

    def open(self, key: str, port: int, rate_per_s: float, seconds: float, seed: int) -> Load:
        """Open loop; see `Generator.open`."""
        arguments = (key, port, OPEN_CONNECTIONS, rate_per_s, seconds, seed)
        load: Load = self.start("open", *arguments).result()
        return load
