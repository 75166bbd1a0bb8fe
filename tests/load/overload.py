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
import selectors
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httptools
import numpy as np
import orjson
import ormsgpack
import psutil

from tests.bench.generator import draw_arrivals
from tests.bench.workloads import FEATURES, standard_model
from tests.load.verdict import Check, check_limits
from tests.support.machine import Cores, describe_machine, pin_process, read_commit
from tests.support.service import Service, running

QUEUE_WAIT_S = 0.5
PEAK_CONNECTIONS, CONNECTIONS = 64, 1024
WARM_S, PEAK_S = 3.0, 10.0
SAMPLED_EVERY_S = 0.5
ANSWERS_WITHIN_S = 30.0
LIMITS = {
    "max_other_answers": 0,
    "min_rejected": 1,
    "min_goodput_share": 0.9,
    "max_p99_s": 2 * QUEUE_WAIT_S,
    "max_memory_growth": 0.1,
}


class WrongAnswerError(Exception):
    """An answer that is wrong in any case."""


class StreamConnection:
    """A stream, and the connection that feeds it, a chunk at a time."""

    def __init__(self, stream: str, rows: np.ndarray):
        self.position, self.due_s = 0, 0.0
        self._steps, self._rows = len(rows), rows.tobytes()
        self._head = (
            f"POST /v1/models/bench/streams/{stream}/chunks HTTP/1.1\r\nHost: carry\r\n"
            "Content-Type: application/msgpack\r\nAccept: application/json\r\nContent-Length: "
        ).encode()

    def connect(self, port: int) -> socket.socket:
        """Open another connection."""
        self._socket = socket.create_connection(("127.0.0.1", port), ANSWERS_WITHIN_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = httptools.HttpResponseParser(self)
        self._body, self._is_complete = b"", False
        return self._socket

    def send(self, due_s: float) -> None:
        """Send the chunk at the stream's position."""
        self.due_s = due_s
        body = ormsgpack.packb({"position": self.position, "inputs": self._rows})
        self._socket.sendall(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))

    def receive(self) -> int | None:
        """The status of the answer, once it is whole.

        Raises:
            WrongAnswerError
        """
        data = self._socket.recv(1 << 18)
        if not data:
            raise WrongAnswerError(f"the connection broke off: {self._body[:300]!r}")
        self._parser.feed_data(data)
        if not self._is_complete:
            return None
        status, body = self._parser.get_status_code(), self._body
        self._body, self._is_complete = b"", False
        if status == 200:
            self.position += self._steps
            if orjson.loads(body).get("position") != self.position:
                raise WrongAnswerError(f"expected position {self.position}: {body[:500]!r}")
        return status

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        self._body += data

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._is_complete = True


@dataclass
class Measurement:
    """Measurement of one phase."""

    seconds: float  # how long chunks were due
    statuses: Counter[int] = field(default_factory=Counter)  # of the answers within it
    latencies_s: list[float] = field(default_factory=list)  # of the accepted chunks
    offered: int = 0  # chunks that were due
    unsent: int = 0  # those of them for which no connection was free
    rss_bytes: list[int] = field(default_factory=list)  # of the service, every half second
    cpu_s: float = 0.0  # of the service

    @property
    def goodput(self) -> float:
        """Chunks accepted in a second."""
        return self.statuses[200] / self.seconds

    @property
    def per_cpu_s(self) -> float:
        """Chunks accepted in a second of the service's CPU time, which other processes share."""
        return self.statuses[200] / self.cpu_s

    @property
    def growth(self) -> float:
        """By how much of it memory grew, from the first quarter of the time to the last."""
        quarter = max(1, len(self.rss_bytes) // 4)
        return max(self.rss_bytes[-quarter:]) / max(self.rss_bytes[:quarter]) - 1

    def percentile_s(self, percent: float) -> float:
        """A percentile of the latencies."""
        return float(np.percentile(self.latencies_s, percent))

    def check(self, peak: float) -> list[Check]:
        """Check every condition, beside a peak of so many chunks a second."""
        values = {
            "max_other_answers": self.statuses.total() - self.statuses[200] - self.statuses[429],
            "min_rejected": self.statuses[429],
            "min_goodput_share": self.goodput / peak,
            "max_p99_s": self.percentile_s(99),
            "max_memory_growth": self.growth,
        }
        return check_limits(LIMITS, values)


class Generator:
    """Sends chunks of many streams to one service; they keep their positions between runs."""

    def __init__(self, service: Service, steps: int):
        self._process = psutil.Process(service.process.pid)
        self._port = int(service.url.rsplit(":", 1)[1])
        self._rows = np.random.default_rng(1).normal(size=(steps, FEATURES)).astype("<f4")
        self._streams: list[StreamConnection] = []

    def run(
        self, seconds: float, connections: int = PEAK_CONNECTIONS, rate_per_s: float | None = None
    ) -> Measurement:
        """Send chunks for some seconds, and wait until everything is answered.

        Args:
            rate_per_s: chunks are due at the moments of a Poisson process, independent of the
                answers. Without it each connection sends the next chunk when one is answered.
        """
        while len(self._streams) < connections:
            self._streams.append(StreamConnection(f"s{len(self._streams)}", self._rows))
        with ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            for stream in self._streams[:connections]:
                connection = stack.enter_context(stream.connect(self._port))
                selector.register(connection, selectors.EVENT_READ, stream)
            idle, result = deque(self._streams[:connections]), Measurement(seconds)
            result.cpu_s = -sum(self._process.cpu_times()[:2])
            self._run(selector, idle, result, rate_per_s)
            result.cpu_s += sum(self._process.cpu_times()[:2])
        return result

    def _run(
        self,
        selector: selectors.BaseSelector,
        idle: deque[StreamConnection],
        result: Measurement,
        rate_per_s: float | None,
    ) -> None:
        count, began_s = len(idle), time.perf_counter()
        ends_s, sampled_s = began_s + result.seconds, began_s
        moments = deque[float]()
        if rate_per_s is not None:
            moments.extend((began_s + draw_arrivals(rate_per_s, result.seconds, seed=1)).tolist())
        while (now_s := time.perf_counter()) < ends_s or len(idle) < count:
            if now_s > ends_s + ANSWERS_WITHIN_S:
                raise WrongAnswerError(f"chunks were not answered within {ANSWERS_WITHIN_S} s")
            while idle and rate_per_s is None and now_s < ends_s:
                idle.popleft().send(now_s)
            while moments and moments[0] <= now_s:
                due_s = moments.popleft()
                result.offered += 1
                if idle:
                    idle.popleft().send(due_s)
                else:
                    result.unsent += 1
            if sampled_s <= now_s < ends_s:
                result.rss_bytes.append(self._process.memory_info().rss)
                sampled_s = now_s + SAMPLED_EVERY_S
            pause_s = min(0.05, max(0.0, moments[0] - now_s)) if moments else 0.05
            for key, _ in selector.select(pause_s):
                status = key.data.receive()
                if status is None:
                    continue
                idle.append(key.data)
                if (now_s := time.perf_counter()) < ends_s:
                    result.statuses[status] += 1
                    if status == 200:
                        result.latencies_s.append(now_s - key.data.due_s)


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
    generator = Generator(service, steps)
    generator.run(min(WARM_S, peak_s))
    before = generator.run(peak_s)
    # each has one chunk in flight: more than the queue takes within its longest wait
    connections = max(CONNECTIONS, math.ceil(2 * QUEUE_WAIT_S * before.goodput))
    return (
        before,
        generator.run(seconds, connections, times * before.goodput),
        generator.run(peak_s),
    )


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
    checks = over.check(peak)
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
        f"memory, MiB      {first_mib:.0f} at first, {last_mib:.0f} at last",
        f"statuses         {dict(over.statuses)}",
        *checks,
        sep="\n",
    )
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
