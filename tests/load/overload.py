"""`python -m tests.load.overload`: twice the peak throughput of a service, for a minute.

It starts the benchmark's network on ONNX Runtime with a Valkey of its own, and sends chunks of many
streams at once by the benchmark's generator: first as fast as they are answered (the peak), then at
moments fixed beforehand, at a multiple of the peak. A latency counts from the moment a chunk was
due. A rejected chunk must not have been applied: the stream's next chunk has the same position and
other events. Ends with 1 where goodput, latency or memory are not what they must be; anything
else than 200 and 429 ends it at once.

The service has the first core, its store and the generator have the last: the cost of sending a
chunk is no part of the service's capacity.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from tests.bench.generator import Load, make_streams, run_closed, run_open
from tests.bench.results import MIB, Results
from tests.bench.run import Bench, Options
from tests.bench.workloads import Bodies, make_traffic, standard_model
from tests.load.verdict import Check, check_limits
from tests.support.machine import Cores, describe_run

QUEUE_WAIT_S = 0.5
PEAK_CONNECTIONS, CONNECTIONS, STREAMS = 64, 1024, 4096
KEY = "overload"
WARM_S, PEAK_S = 3.0, 10.0
SAMPLED_EVERY_S = 0.5
LIMITS = {
    "min_rejected": 1.0,
    "min_goodput_share": 0.9,
    "max_p99_s": 2 * QUEUE_WAIT_S,
    "max_memory_growth": 0.1,
}


@dataclass
class Measurement:
    """Measurement of one phase: the load, and the service's memory and CPU time meanwhile."""

    load: Load
    rss_bytes: list[int]
    cpu_s: float

    @property
    def per_cpu_s(self) -> float:
        """Chunks accepted in a second of the service's CPU time, which other processes share."""
        return self.load.chunks / self.cpu_s

    def percentiles_ms(self) -> tuple[float, ...]:
        """p50, p99 and maximum of the accepted chunks' latencies."""
        return tuple(np.percentile(self.load.latencies_s, (50, 99, 100)) * 1000)

    def check(self, peak: float) -> list[Check]:
        """Check every condition, beside a peak of so many chunks a second."""
        quarter = max(1, len(self.rss_bytes) // 4)
        first, last = self.rss_bytes[:quarter], self.rss_bytes[-quarter:]
        values = {
            "min_rejected": self.load.rejected,
            "min_goodput_share": self.load.chunks_per_s / peak,
            "max_p99_s": self.percentiles_ms()[1] / 1000,
            "max_memory_growth": max(last) / max(first) - 1,
        }
        return check_limits(LIMITS, values)


class Overload:
    """A service of a network that rejects chunks that would wait longer than half a second."""

    def __init__(self, bench: Bench, units: int, steps: int):
        model = standard_model(bench.folder / "models", units)
        limit = {"CARRY_MAX_QUEUE_WAIT_S": str(QUEUE_WAIT_S)}
        self._bench = bench
        self._server = bench.start_server("carry-onnxruntime", model, environment=limit)
        options = {"media": "msgpack", "may_reject": True}
        traffic = make_traffic(model, Bodies.random(steps), KEY, STREAMS, **options)
        bench.run(make_streams, KEY, traffic)

    def measure(self, *load: object) -> Measurement:
        """Run a load: one of the generator's functions, and its arguments after the port."""
        function, *arguments = load
        process, rss_bytes = psutil.Process(self._server.pid), []
        cpu_s = -sum(process.cpu_times()[:2])
        future = self._bench.driver.submit(function, KEY, self._server.port, *arguments)
        while wait([future], SAMPLED_EVERY_S).not_done:
            rss_bytes.append(process.memory_info().rss)
        return Measurement(future.result(), rss_bytes, cpu_s + sum(process.cpu_times()[:2]))

    def run(self, times: float, seconds: float, peak_s: float) -> tuple[Measurement, ...]:
        """Measure the peak, a multiple of it in an open loop, and the peak again."""
        closed = run_closed, PEAK_CONNECTIONS
        self.measure(*closed, min(WARM_S, peak_s))
        before = self.measure(*closed, peak_s)
        peak = before.load.chunks_per_s
        # each has one chunk in flight: more than the queue takes within its longest wait
        connections = min(STREAMS, max(CONNECTIONS, math.ceil(2 * QUEUE_WAIT_S * peak)))
        over = self.measure(run_open, times * peak, seconds, 1, connections)
        return before, over, self.measure(*closed, peak_s)


@contextmanager
def started(folder: Path, units: int, steps: int) -> Iterator[Overload]:
    """A service under test, pinned to its core."""
    bench = Bench(Options(), Cores.first_and_last(), folder, Results({}), say=lambda text: None)
    with bench.scope:
        yield Overload(bench, units, steps)


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
        started(Path(folder), options.units, options.steps) as overload,
    ):
        before, over, after = overload.run(options.times, options.seconds, PEAK_S)
    load, peak = over.load, max(before.load.chunks_per_s, after.load.chunks_per_s)
    rejected_per_s, latencies_ms = load.rejected / load.seconds, over.percentiles_ms()
    checks = over.check(peak)
    print(
        *describe_run().values(),
        Cores.first_and_last().describe(),
        f"two LSTM({options.units}), chunks of {options.steps} events",
        f"{options.times:g} times the peak for {options.seconds:g} s",
        f"peak             {peak:,.0f} chunks/s",
        f"offered          {load.chunks_per_s + rejected_per_s:,.0f} chunks/s",
        f"goodput          {load.chunks_per_s:,.0f} chunks/s",
        f"rejected at once {rejected_per_s:,.0f} chunks/s",
        "accepted, ms     p50 {:.0f}, p99 {:.0f}, max {:.0f}".format(*latencies_ms),
        f"memory, MiB      {over.rss_bytes[0] / MIB:.0f} to {over.rss_bytes[-1] / MIB:.0f}",
        *checks,
        sep="\n",
    )
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
