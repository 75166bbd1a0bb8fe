"""`python -m tests.load.overload`: twice the peak throughput of a service, for a minute.

It starts a service of its own, with the benchmark's network on ONNX Runtime and an embedded Valkey,
and sends chunks of many streams at once, each with its position: first as fast as they are answered
(the peak), then at moments fixed beforehand, at a multiple of the peak. A latency counts from the
moment a chunk was due. A rejected chunk must not have been applied: the stream's next
chunk has the same position. Ends with 1 where goodput, latency or memory are not what they must be,
or anything else than 200 and 429 came.

The service has the first core, its store and the generator have the last: the cost of sending a
chunk is no part of the service's capacity.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import socket
import struct
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.bench.workloads import FEATURES, standard_model
from tests.support.machine import Cores, describe_machine, pin_process, read_commit
from tests.support.service import Service, running

HOST = "127.0.0.1"
QUEUE_WAIT_S = 0.5
PEAK_CONNECTIONS, CONNECTIONS = 64, 1024
WARM_S, PEAK_S = 3.0, 10.0
SAMPLED_EVERY_S = 0.5
ANSWERS_WITHIN_S = 30.0
LEAST_GOODPUT, MOST_P99_S, MOST_GROWTH = 0.9, 2 * QUEUE_WAIT_S, 0.1

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_POSITION = re.compile(rb'"position":(\d+)')


class WrongAnswerError(Exception):
    """An answer that is wrong in any case."""


class StreamConnection:
    """One connection, which feeds one stream, a chunk at a time."""

    __slots__ = ("_data", "_head", "_port", "_rows", "_steps", "due_s", "position", "sock")

    def __init__(self, port: int, stream: str, steps: int, rows: bytes):
        self._port = port
        self.open()
        self.position = 0
        self.due_s = 0.0
        self._steps = steps
        self._rows = b"\xa6inputs\xc6" + struct.pack(">I", len(rows)) + rows
        length = len(b"\x82\xa8position\xcf") + 8 + len(self._rows)
        self._head = (
            f"POST /v1/models/bench/streams/{stream}/chunks HTTP/1.1\r\n"
            "Host: carry\r\nContent-Type: application/msgpack\r\nAccept: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n"
        ).encode() + b"\x82\xa8position\xcf"
        self._data = b""

    def open(self) -> None:
        """Connect; again, where the service closed a connection that was idle."""
        self.sock = socket.create_connection((HOST, self._port), ANSWERS_WITHIN_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, due_s: float) -> None:
        """Send the chunk at the stream's position; a connection that broke is noticed later."""
        self.due_s = due_s
        with suppress(ConnectionError):
            self.sock.sendall(self._head + struct.pack(">Q", self.position) + self._rows)

    def receive(self) -> int | None:
        """The status of the answer, once it is whole; 0 where the connection was closed instead.

        Raises:
            WrongAnswerError
        """
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionError:
            data = b""
        if not data and not self._data:
            return 0
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        length = _LENGTH.search(self._data, 0, end + 2) if end >= 0 else None
        if not data or (end >= 0 and length is None):
            raise WrongAnswerError(f"the connection broke off: {self._data[:300]!r}")
        if length is None or len(self._data) < end + 4 + int(length[1]):
            return None
        answer, self._data = self._data, b""
        status = int(answer[9:12])
        if status == 200:
            self.position += self._steps
            reasons = _POSITION.search(answer, end)
            if reasons is None or int(reasons[1]) != self.position:
                raise WrongAnswerError(f"expected position {self.position}: {answer[:500]!r}")
        return status


@dataclass
class Measurement:
    """Measurement of one phase.

    Attributes:
        seconds: how long chunks were due.
        statuses: of the answers that came within it.
        latencies_s: of the accepted chunks.
        offered: chunks that were due; unsent those for which no connection was free.
        rss_bytes: the service's memory, every half second.
        cpu_s: the service's CPU time.
    """

    seconds: float
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    offered: int = 0
    unsent: int = 0
    rss_bytes: list[int] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def goodput(self) -> float:
        """Chunks accepted in a second."""
        return self.statuses[200] / self.seconds

    @property
    def per_cpu_s(self) -> float:
        """Chunks accepted in a second of the service's CPU time."""
        return self.statuses[200] / self.cpu_s

    def percentile_s(self, percent: float) -> float:
        """A percentile of the latencies."""
        return float(np.percentile(self.latencies_s, percent))

    @property
    def growth(self) -> float:
        """By how much of it memory grew, from the first quarter of the time to the last."""
        quarter = max(1, len(self.rss_bytes) // 4)
        return max(self.rss_bytes[-quarter:]) / max(self.rss_bytes[:quarter]) - 1


class Generator:
    """Load generator: many connections to one service, one stream each."""

    def __init__(self, service: Service, connections: int, steps: int):
        self._process = psutil.Process(service.process.pid)
        port = int(service.url.rsplit(":", 1)[1])
        random = np.random.default_rng(1)
        rows = random.normal(size=(steps, FEATURES)).astype("<f4").tobytes()
        self._connections = [
            StreamConnection(port, f"s{i}", steps, rows) for i in range(connections)
        ]
        self._by_fd = {connection.sock.fileno(): connection for connection in self._connections}
        self._epoll = select.epoll()
        for fd in self._by_fd:
            self._epoll.register(fd, select.EPOLLIN)

    def close(self) -> None:
        """Close them."""
        self._epoll.close()
        for connection in self._connections:
            connection.sock.close()

    def closed(self, seconds: float, connections: int) -> Measurement:
        """Each connection sends its next chunk when the last one is answered."""
        began_s = time.perf_counter()
        for connection in self._connections[:connections]:
            connection.send(began_s)

        def answered(connection: StreamConnection, now_s: float) -> None:
            if now_s < began_s + seconds:
                connection.send(now_s)

        return self._run(Measurement(seconds), began_s, lambda _: None, answered)

    def open(self, seconds: float, rate_per_s: float, seed: int) -> Measurement:
        """Chunks are due at the moments of a Poisson process, independent of the answers."""
        random = np.random.default_rng(seed)
        gaps = random.exponential(1 / rate_per_s, int(rate_per_s * seconds * 1.2) + 100)
        moments = np.cumsum(gaps)
        began_s = time.perf_counter()
        left = iter((moments[moments < seconds] + began_s).tolist())
        measurement, idle = Measurement(seconds), list(self._connections)
        following = next(left, None)

        def send_due(now_s: float) -> float | None:
            nonlocal following
            while following is not None and following <= now_s:
                measurement.offered += 1
                if idle:
                    idle.pop().send(following)
                else:
                    measurement.unsent += 1
                following = next(left, None)
            return following

        return self._run(
            measurement, began_s, send_due, lambda connection, _: idle.append(connection)
        )

    def _run(
        self,
        measurement: Measurement,
        began_s: float,
        send_due: Callable[[float], float | None],
        answered: Callable[[StreamConnection, float], None],
    ) -> Measurement:
        """Send what is due and read replies, until everything is answered."""
        ends_s = began_s + measurement.seconds
        sampled_s = began_s
        cpu_s = self._cpu_s()
        while (now_s := time.perf_counter()) < ends_s + ANSWERS_WITHIN_S:
            following_s = send_due(now_s)
            if now_s >= sampled_s and now_s < ends_s:
                measurement.rss_bytes.append(self._process.memory_info().rss)
                sampled_s = now_s + SAMPLED_EVERY_S
            pause_s = 0.05 if following_s is None else max(0.0, following_s - now_s)
            ready = self._epoll.poll(min(pause_s, 0.05))
            if not ready and now_s > ends_s and self._is_quiet():
                measurement.cpu_s = self._cpu_s() - cpu_s
                return measurement
            for fd, _ in ready:
                connection = self._by_fd[fd]
                status = connection.receive()
                if status is None:
                    continue
                if status == 0:
                    self._reopen(connection)
                    continue
                now_s = time.perf_counter()
                if now_s < ends_s:
                    measurement.statuses[status] += 1
                    if status == 200:
                        measurement.latencies_s.append(now_s - connection.due_s)
                connection.due_s = 0.0
                answered(connection, now_s)
        raise WrongAnswerError(f"chunks were not answered within {ANSWERS_WITHIN_S} s")

    def _reopen(self, connection: StreamConnection) -> None:
        """Reconnect, and send the chunk in flight again, which is safe with its position."""
        del self._by_fd[connection.sock.fileno()]
        connection.sock.close()
        connection.open()
        self._by_fd[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock.fileno(), select.EPOLLIN)
        if connection.due_s:
            connection.send(connection.due_s)

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _is_quiet(self) -> bool:
        return all(connection.due_s == 0.0 for connection in self._connections)


@contextmanager
def pinned_service(folder: Path, units: int) -> Iterator[Service]:
    """A service that rejects chunks that would wait longer than half a second.

    Args:
        units: of each of the network's two layers.
    """
    settings = {
        "CARRY_RUNTIME": "onnxruntime",
        "CARRY_MAX_QUEUE_WAIT_S": str(QUEUE_WAIT_S),
    }
    models = standard_model(folder / "models", units).path.parent
    cores = Cores.first_and_last()
    with running(folder, models, **settings) as service:
        server = psutil.Process(service.process.pid)
        for process in (server, *server.children(recursive=True)):
            _move(process, cores.servers if process == server else cores.others)
        pin_process(cores.others)
        try:
            yield service
        finally:
            pin_process(cores.everything)


def _move(process: psutil.Process, cores: Sequence[int]) -> None:
    """Move all threads of a process to these cores, if they can be chosen."""
    if cores:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)


@dataclass(frozen=True, slots=True)
class Result:
    """An overload run, compared with the peaks before and after it.

    Attributes:
        peak: the higher goodput of both.
        efficiency: chunks accepted in a second of CPU time, as a share of the peaks' mean. Other
            processes on the cores do not change it.
    """

    peak: float
    over: Measurement
    efficiency: float = 1.0

    @property
    def goodput(self) -> float:
        """As a share of the peak."""
        return self.over.goodput / self.peak

    def failures(self) -> list[str]:
        """Every condition that failed."""
        over = self.over
        reasons = []
        if other := {status: n for status, n in over.statuses.items() if status not in (200, 429)}:
            reasons.append(f"other statuses than 200 and 429: {other}")
        if not over.statuses[429]:
            reasons.append("nothing was rejected")
        if self.goodput < LEAST_GOODPUT:
            reasons.append(f"goodput is {self.goodput:.1%} of its peak, not {LEAST_GOODPUT:.0%}")
        if over.percentile_s(99) > MOST_P99_S:
            reasons.append(f"p99 is {over.percentile_s(99):.2f} s, above {MOST_P99_S} s")
        if over.growth > MOST_GROWTH:
            reasons.append(f"memory grew by {over.growth:.1%}, more than {MOST_GROWTH:.0%}")
        return reasons


def overload(
    service: Service, *, steps: int, times: float, seconds: float, peak_s: float
) -> Result:
    """Measure the peak, a multiple of it, and the peak again."""
    generator = Generator(service, CONNECTIONS, steps)
    try:
        generator.closed(min(WARM_S, peak_s), PEAK_CONNECTIONS)
        before = generator.closed(peak_s, PEAK_CONNECTIONS)
        over = generator.open(seconds, times * before.goodput, seed=1)
        after = generator.closed(peak_s, PEAK_CONNECTIONS)
        efficiency = 2 * over.per_cpu_s / (before.per_cpu_s + after.per_cpu_s)
        return Result(max(before.goodput, after.goodput), over, efficiency)
    finally:
        generator.close()


def main() -> int:
    """Overload a service and print the measurements."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (60)")
    parser.add_argument("--times", type=float, default=2.0, help="the peak (2)")
    parser.add_argument("--steps", type=int, default=64, help="events in a chunk (64)")
    parser.add_argument("--units", type=int, default=256, help="of each LSTM layer (256)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="carry-overload-") as folder,
        pinned_service(Path(folder), options.units) as service,
    ):
        result = overload(
            service,
            steps=options.steps,
            times=options.times,
            seconds=options.seconds,
            peak_s=PEAK_S,
        )
    over, failures = result.over, result.failures()
    print(f"{describe_machine()}, commit {read_commit()}; {Cores.first_and_last().describe()}")
    print(f"two LSTM({options.units}), chunks of {options.steps} events")
    print(f"{options.times:g} times the peak for {options.seconds:g} s")
    print(f"peak             {result.peak:,.0f} chunks/s")
    print(f"offered          {over.offered / over.seconds:,.0f} chunks/s")
    print(f"goodput          {over.goodput:,.0f} chunks/s, {result.goodput:.1%} of the peak")
    print(f"rejected at once {over.statuses[429] / over.seconds:,.0f} chunks/s")
    print(f"not sent         {over.unsent / over.seconds:,.0f} chunks/s: all connections waited")
    print(
        f"accepted, ms     p50 {over.percentile_s(50) * 1000:.0f}, "
        f"p99 {over.percentile_s(99) * 1000:.0f}, max {over.percentile_s(100) * 1000:.0f}"
    )
    print(
        f"memory, MiB      {over.rss_bytes[0] / 2**20:.0f} at first, "
        f"{over.rss_bytes[-1] / 2**20:.0f} at last, {over.growth:+.1%} from quarter to quarter"
    )
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
