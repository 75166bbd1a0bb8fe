"""The load generator, in its own process: raw sockets, keep-alive, one send and one read a request.

Closed loop: each connection sends its next request when the last is answered. Open loop: the
moments of sending are fixed beforehand, and a latency counts from that moment, also where no
connection was free for it; so a server that stalls is charged for all who came meanwhile.
Loopback only, and each run is bounded by its duration and a grace. Callers submit `make_streams`,
`run_closed` and `run_open` to a helper process.
"""

import asyncio
import select
import selectors
import socket
import time
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import grpc
import httptools
import numpy as np
import uvloop
from numpy.typing import NDArray

from tests.bench.traffic import Ticket, Traffic, TrafficSpec, WrongReplyError

HOST = "127.0.0.1"
READ_BYTES = 1 << 18
GRACE_S = 20.0  # how long replies are waited for after the last request was sent
LEAD_S = 0.05  # between the schedule's making and its first moment
OPEN_CONNECTIONS = 256
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"


@dataclass(slots=True)
class Load:
    """The measurements of one run."""

    seconds: float  # from the first request sent to the last answered
    latencies_s: NDArray[np.float64]  # one per request, in the order of the replies
    chunks: int  # answered
    events: int  # in them
    cpu_s: float  # the generator's own processor time
    rejected: int = 0  # requests that were answered by 429, where that is allowed
    unanswered: int = 0  # open loop: requests that were not sent, or not answered, before the end
    sampled: list[bytes] = field(default_factory=list)  # the first replies to one stream

    @property
    def chunks_per_s(self) -> float:
        """The rate over the whole run."""
        return self.chunks / self.seconds


def draw_arrivals(rate_per_s: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """The moments of an open loop, in seconds from its beginning: a Poisson process."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate_per_s, int(rate_per_s * seconds * 1.2) + 10)
    moments: NDArray[np.float64] = np.cumsum(gaps)
    return moments[moments < seconds]


class Connection:
    """One connection with at most one request in flight; `is_rejected` after a reply with 429,
    which raises unless `may_reject`."""

    def __init__(self, port: int, timeout_s: float = GRACE_S, *, may_reject: bool = False):
        self.sock = socket.create_connection((HOST, port), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ticket: Ticket = ()
        self.sent_s = 0.0
        self.may_reject, self.is_rejected = may_reject, False
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._bodies: list[bytes] = []

    def close(self) -> None:
        self.sock.close()

    def read(self) -> bytes | None:
        """Read once: the body of a reply that is whole now, or None while some of it is missing.

        Raises WrongReplyError for another status than 200, no length, more than one reply, and
        where the connection was closed.
        """
        data = self.sock.recv(READ_BYTES)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise WrongReplyError(f"{error.__context__ or error}: {data[:800]!r}") from error
        if not data or len(self._bodies) > 1:
            raise WrongReplyError(f"expected one whole reply, got {self._bodies}, then {data!r}")
        return self._bodies.pop() if self._bodies else None

    def receive(self) -> bytes:
        """Wait for the body of a whole reply; raises as `read` does."""
        while (body := self.read()) is None:
            pass
        return body

    def ask(self, request: bytes) -> bytes:
        """Send a request and wait for its reply."""
        self.sock.sendall(request)
        return self.receive()

    # called by the parser

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self.is_rejected = self.may_reject and status == 429
        is_expected = status == 200 or self.is_rejected
        if not is_expected or not self._parser.should_keep_alive():
            raise WrongReplyError(f"expected status 200 and a length, got status {status}")

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self._bodies.append(b"".join(self._pieces))
        self._pieces.clear()


class SocketConnection(Connection):
    """A WebSocket with at most one frame in flight, after its handshake and hello."""

    def __init__(self, port: int, path: str):
        super().__init__(port)
        self._received = b""
        head = f"GET {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nUpgrade: websocket\r\n"
        head += "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        self.sock.sendall(f"{head}Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode())
        while b"\r\n\r\n" not in self._received:
            if not (data := self.sock.recv(READ_BYTES)):
                raise WrongReplyError(f"expected a handshake, got {self._received!r}")
            self._received += data
        answer, _, self._received = self._received.partition(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 101"):
            raise WrongReplyError(f"expected status 101, got {answer!r}")
        while self._take_message() is None:
            self._received += self.sock.recv(READ_BYTES)

    def read(self) -> bytes | None:
        """Read once: the message that is whole now, or None; raises as for a reply of HTTP."""
        if not (data := self.sock.recv(READ_BYTES)):
            raise WrongReplyError(f"expected a message, got {self._received!r} and the end")
        self._received += data
        return self._take_message()

    def _take_message(self) -> bytes | None:
        """The first message, if it is whole; its frame is not masked, since a server sent it."""
        received, start = self._received, 2
        size = received[1] if len(received) > 1 else 0
        if size > 125:
            start = 4 if size == 126 else 10
            size = int.from_bytes(received[2:start])
        if len(received) < start + size:
            return None
        if received[0] not in (0x81, 0x82):  # one whole message of text or bytes
            raise WrongReplyError(f"expected a message, got {received[:300]!r}")
        self._received = received[start + size :]
        return received[start : start + size]


def try_connect(port: int, timeout_s: float = GRACE_S) -> Connection | None:
    """A connection, if anything listens."""
    try:
        return Connection(port, timeout_s)
    except OSError:
        return None


class Run:
    """The connections of one load, and what is measured on them."""

    def __init__(self, key: str, port: int, connections: int):
        self.traffic = traffic = _traffic[key]
        traffic.sampled, traffic.events = [], 0
        # first, because select takes descriptors below 1024 only
        self._selector = selectors.DefaultSelector()
        spec = traffic.spec
        self.connections = [
            SocketConnection(port, spec.path)
            if spec.media == "websocket"
            else Connection(port, may_reject=spec.may_reject)
            for _ in range(connections)
        ]
        self.latencies, self.rejected = array("d"), 0
        for connection in self.connections:
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)
        self._cpu_s, self._started_s = time.process_time(), time.perf_counter()

    def result(self, unanswered: int = 0) -> Load:
        """What was measured until now."""
        traffic = self.traffic
        return Load(
            time.perf_counter() - self._started_s,
            np.array(self.latencies),
            len(self.latencies) * max(1, traffic.spec.items),
            traffic.events,
            time.process_time() - self._cpu_s,
            self.rejected,
            unanswered,
            traffic.sampled,
        )

    def close(self) -> None:
        self._selector.close()
        for connection in self.connections:
            connection.close()

    def send(self, connection: Connection, due_s: float | None = None) -> None:
        """Send the next request, whose latency counts from when it was due."""
        request, connection.ticket = self.traffic.request()
        connection.sent_s = time.perf_counter() if due_s is None else due_s
        connection.sock.sendall(request)

    def replies(self, timeout_s: float = GRACE_S) -> Iterator[Connection]:
        """Wait for replies, and yield the connection of each one that is whole."""
        if timeout_s < 1:
            # Unlike the selector, select does not round the time up to a millisecond.
            select.select([self._selector], [], [], timeout_s)
            timeout_s = 0
        ready = self._selector.select(timeout_s)
        if not ready and timeout_s:
            raise WrongReplyError(f"requests were not answered in {timeout_s} s")
        for key, _ in ready:
            connection: Connection = key.data
            reply = connection.read()
            if reply is None:
                continue
            if connection.is_rejected:
                self.rejected += 1
                self.traffic.reject(connection.ticket)
            else:
                self.latencies.append(time.perf_counter() - connection.sent_s)
                self.traffic.accept(connection.ticket, reply)
            yield connection


_traffic: dict[str, Traffic] = {}
"""The streams of this process by key; they keep their positions between loads."""


def make_streams(key: str, spec: TrafficSpec) -> None:
    """Make the streams that later loads name."""
    _traffic[key] = Traffic(spec)


def run_closed(key: str, port: int, connections: int, seconds: float) -> Load:
    """Load a port from connections that each wait for their reply."""
    if _traffic[key].spec.media == "grpc":
        return uvloop.run(run_calls(key, connections, seconds))
    with closing(Run(key, port, connections)) as run:
        ends_s, in_flight = time.perf_counter() + seconds, 0
        for connection in run.connections:
            if run.traffic.ready:
                run.send(connection)
                in_flight += 1
        while in_flight:
            for connection in run.replies():
                if time.perf_counter() < ends_s:
                    run.send(connection)
                else:
                    in_flight -= 1
        return run.result()


async def run_calls(key: str, calls: int, seconds: float) -> Load:
    """Load a gRPC server from calls that each wait for their reply, one on a connection."""
    traffic, latencies = _traffic[key], array("d")
    traffic.sampled, traffic.events = [], 0
    address = f"{HOST}:{traffic.spec.grpc_port}"
    cpu_s, started_s = time.process_time(), time.perf_counter()

    async def call() -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, own) as channel:
            stream = channel.stream_stream(STREAM_INFER)()
            while time.perf_counter() - started_s < seconds and traffic.ready:
                message, ticket = traffic.request()
                sent_s = time.perf_counter()
                await stream.write(message)
                traffic.accept(ticket, await stream.read())
                latencies.append(time.perf_counter() - sent_s)
            await stream.done_writing()

    async with asyncio.timeout(seconds + GRACE_S), asyncio.TaskGroup() as group:
        for _ in range(calls):
            group.create_task(call())
    passed_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    chunks = len(latencies)
    return Load(
        passed_s, np.array(latencies), chunks, traffic.events, cpu_s, sampled=traffic.sampled
    )


def run_open(
    key: str,
    port: int,
    rate_per_s: float,
    seconds: float,
    seed: int,
    connections: int = OPEN_CONNECTIONS,
) -> Load:
    """Load a port at moments fixed beforehand; `rate_per_s` counts requests."""
    due, clock = draw_arrivals(rate_per_s, seconds, seed), time.perf_counter
    with closing(Run(key, port, connections)) as run:
        # in turn, so that no connection is idle for long enough to be closed
        idle = deque(run.connections)
        moments = deque((due + clock() + LEAD_S).tolist())
        ends_s = clock() + LEAD_S + seconds + GRACE_S
        while (moments or len(idle) < connections) and clock() < ends_s:
            while moments and moments[0] <= clock() and idle and run.traffic.ready:
                run.send(idle.popleft(), moments.popleft())
            is_free = bool(moments and idle and run.traffic.ready)
            idle += run.replies(max(0.0, moments[0] - clock()) if is_free else GRACE_S)
        return run.result(len(moments) + connections - len(idle))
