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
import math
import os
import re
import select
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.bench.generator import draw_arrivals
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
    latencies_s: list[float] = field(default_factory=list)
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
        """Chunks accepted in a second of the service's CPU time, which other processes share."""
        return self.statuses[200] / self.cpu_s

    def percentile_s(self, percent: float) -> float:
        """A percentile of the latencies."""
        return float(np.percentile(self.latencies_s, percent))

    @property
    def growth(self) -> float:
        """By how much of it memory grew, from the first quarter of the time to the last."""
        quarter = max(1, len(self.rss_bytes) // 4)
        return max(self.rss_bytes[-quarter:]) / max(self.rss_bytes[:quarter]) - 1

    def failures(self, peak: float) -> list[str]:
        """Every condition that failed, beside a peak of so many chunks a second."""
        share, reasons = self.goodput / peak, []
        if other := {status: n for status, n in self.statuses.items() if status not in (200, 429)}:
            reasons.append(f"other statuses than 200 and 429: {other}")
        if not self.statuses[429]:
            reasons.append("nothing was rejected")
        if share < LEAST_GOODPUT:
            reasons.append(f"goodput is {share:.1%} of its peak, not {LEAST_GOODPUT:.0%}")
        if self.percentile_s(99) > MOST_P99_S:
            reasons.append(f"p99 is {self.percentile_s(99):.2f} s, above {MOST_P99_S} s")
        if self.growth > MOST_GROWTH:
            reasons.append(f"memory grew by {self.growth:.1%}, more than {MOST_GROWTH:.0%}")
        return reasons


class Generator:
    """Load generator: many connections to one service, one stream each."""

    def __init__(self, service: Service, connections: int, steps: int):
        self._process = psutil.Process(service.process.pid)
        self._port = int(service.url.rsplit(":", 1)[1])
        self._steps = steps
        rows = np.random.default_rng(1).normal(size=(steps, FEATURES))
        self._rows = rows.astype("<f4").tobytes()
        self._epoll = select.epoll()
        self._by_fd: dict[int, StreamConnection] = {}
        self.open(connections)

    def open(self, connections: int) -> None:
        """Open connections until there are that many."""
        for number in range(len(self._by_fd), connections):
            stream = f"s{number}"
            self._register(StreamConnection(self._port, stream, self._steps, self._rows))

    def close(self) -> None:
        """Close the connections."""
        self._epoll.close()
        for connection in self._by_fd.values():
            connection.sock.close()

    def run(self, seconds: float, rate_per_s: float | None = None) -> Measurement:
        """Send chunks for some seconds, and wait until everything is answered.

        Args:
            rate_per_s: chunks are due at the moments of a Poisson process, independent of the
                answers. Without it some connections send the next chunk when one is answered.
        """
        began_s = time.perf_counter()
        ends_s, sampled_s = began_s + seconds, began_s
        measurement = Measurement(seconds, cpu_s=-self._cpu_s())
        idle = list(self._by_fd.values())
        moments = iter(())
        if rate_per_s is not None:
            moments = iter((began_s + draw_arrivals(rate_per_s, seconds, seed=1)).tolist())
        else:
            for connection in idle[:PEAK_CONNECTIONS]:
                connection.send(began_s)
        due_s = next(moments, math.inf)
        while (now_s := time.perf_counter()) < ends_s + ANSWERS_WITHIN_S:
            while due_s <= now_s:
                measurement.offered += 1
                if idle:
                    idle.pop().send(due_s)
                else:
                    measurement.unsent += 1
                due_s = next(moments, math.inf)
            if sampled_s <= now_s < ends_s:
                measurement.rss_bytes.append(self._process.memory_info().rss)
                sampled_s = now_s + SAMPLED_EVERY_S
            ready = self._epoll.poll(min(max(0.0, due_s - now_s), 0.05))
            if not ready and now_s > ends_s and not any(c.due_s for c in self._by_fd.values()):
                measurement.cpu_s += self._cpu_s()
                return measurement
            for fd, _ in ready:
                connection = self._by_fd[fd]
                status = connection.receive()
                if status == 0:
                    self._reopen(connection)
                if not status:
                    continue
                now_s = time.perf_counter()
                if now_s < ends_s:
                    measurement.statuses[status] += 1
                    if status == 200:
                        measurement.latencies_s.append(now_s - connection.due_s)
                connection.due_s = 0.0
                if rate_per_s is not None:
                    idle.append(connection)
                elif now_s < ends_s:
                    connection.send(now_s)
        raise WrongAnswerError(f"chunks were not answered within {ANSWERS_WITHIN_S} s")

    def _register(self, connection: StreamConnection) -> None:
        self._by_fd[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock.fileno(), select.EPOLLIN)

    def _reopen(self, connection: StreamConnection) -> None:
        """Reconnect, and send the chunk in flight again, which is safe with its position."""
        del self._by_fd[connection.sock.fileno()]
        connection.sock.close()
        connection.open()
        self._register(connection)
        if connection.due_s:
            connection.send(connection.due_s)

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


@contextmanager
def pinned_service(folder: Path, units: int) -> Iterator[Service]:
    """A service that rejects chunks that would wait longer than half a second.

    Args:
        units: of each of the network's two layers.
    """
    settings = {"CARRY_RUNTIME": "onnxruntime", "CARRY_MAX_QUEUE_WAIT_S": str(QUEUE_WAIT_S)}
    models = standard_model(folder / "models", units).path.parent
    cores = Cores.first_and_last()
    with running(folder, models, **settings) as service:
        server = psutil.Process(service.process.pid)
        for process in (server, *server.children(recursive=True)):
            chosen = cores.servers if process == server else cores.others
            for thread in process.threads() if chosen else ():
                os.sched_setaffinity(thread.id, chosen)
        pin_process(cores.others)
        try:
            yield service
        finally:
            pin_process(cores.everything)


def overload(
    service: Service, *, steps: int, times: float, seconds: float, peak_s: float
) -> tuple[Measurement, Measurement, Measurement]:
    """Measure the peak, a multiple of it, and the peak again."""
    generator = Generator(service, CONNECTIONS, steps)
    try:
        generator.run(min(WARM_S, peak_s))
        before = generator.run(peak_s)
        # each has one chunk in flight: more than the queue takes within its longest wait
        generator.open(math.ceil(2 * QUEUE_WAIT_S * before.goodput))
        return before, generator.run(seconds, times * before.goodput), generator.run(peak_s)
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
    times, seconds, steps = options.times, options.seconds, options.steps
    with (
        tempfile.TemporaryDirectory(prefix="carry-overload-") as folder,
        pinned_service(Path(folder), options.units) as service,
    ):
        before, over, after = overload(
            service, steps=steps, times=times, seconds=seconds, peak_s=PEAK_S
        )
    peak = max(before.goodput, after.goodput)
    p50_ms, p99_ms, max_ms = (over.percentile_s(percent) * 1000 for percent in (50, 99, 100))
    first_mib, last_mib = (over.rss_bytes[at] / 2**20 for at in (0, -1))
    failures = over.failures(peak)
    print(
        f"{describe_machine()}, commit {read_commit()}; {Cores.first_and_last().describe()}",
        f"two LSTM({options.units}), chunks of {steps} events",
        f"{times:g} times the peak for {seconds:g} s",
        f"peak             {peak:,.0f} chunks/s",
        f"offered          {over.offered / seconds:,.0f} chunks/s",
        f"goodput          {over.goodput:,.0f} chunks/s, {over.goodput / peak:.1%} of the peak",
        f"rejected at once {over.statuses[429] / seconds:,.0f} chunks/s",
        f"not sent         {over.unsent / seconds:,.0f} chunks/s: all connections waited",
        f"accepted, ms     p50 {p50_ms:.0f}, p99 {p99_ms:.0f}, max {max_ms:.0f}",
        f"memory, MiB      {first_mib:.0f} at first, {last_mib:.0f} at last, "
        f"{over.growth:+.1%} from quarter to quarter",
        *(f"FAILED: {failure}" for failure in failures),
        sep="\n",
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
