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
from tests.bench.results import Results
from tests.bench.run import Bench, Options, Server
from tests.bench.workloads import Bodies, make_traffic, standard_model
from tests.load.verdict import Check, check_limits
from tests.support.machine import Cores, describe_machine, read_commit

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

    @property
    def growth(self) -> float:
        """By how much of it memory grew, from the first quarter of the time to the last."""
        quarter = max(1, len(self.rss_bytes) // 4)
        return max(self.rss_bytes[-quarter:]) / max(self.rss_bytes[:quarter]) - 1

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the accepted chunks' latencies, in milliseconds."""
        return float(np.percentile(self.load.latencies_s, percent)) * 1000

    def check(self, peak: float) -> list[Check]:
        """Check every condition, beside a peak of so many chunks a second."""
        values = {
            "min_rejected": self.load.rejected,
            "min_goodput_share": self.load.chunks_per_s / peak,
            "max_p99_s": self.percentile_ms(99) / 1000,
            "max_memory_growth": self.growth,
        }
        return check_limits(LIMITS, values)


@contextmanager
def pinned_service(folder: Path, units: int) -> Iterator[Server]:
    """A service that rejects chunks that would wait longer than half a second.

    Args:
        units: of each of the network's two layers.
    """
    bench = Bench(Options(), Cores.first_and_last(), folder, Results({}), say=lambda text: None)
    with bench.scope:
        model = standard_model(folder / "models", units)
        limit = {"CARRY_MAX_QUEUE_WAIT_S": str(QUEUE_WAIT_S)}
        yield bench.start_server("carry-onnxruntime", model, environment=limit)


def measure(
    server: Server,
    seconds: float,
    connections: int = PEAK_CONNECTIONS,
    rate_per_s: float | None = None,
) -> Measurement:
    """Send chunks for some seconds.

    Args:
        rate_per_s: chunks are due at the moments of a Poisson process, independent of the
            answers. Without it each connection sends the next chunk when one is answered.
    """
    process, rss_bytes = psutil.Process(server.pid), []
    cpu_s = -sum(process.cpu_times()[:2])
    if rate_per_s is None:
        load = server.driver.submit(run_closed, KEY, server.port, connections, seconds)
    else:
        arguments = (KEY, server.port, rate_per_s, seconds, 1, connections)
        load = server.driver.submit(run_open, *arguments)
    while wait([load], SAMPLED_EVERY_S).not_done:
        rss_bytes.append(process.memory_info().rss)
    return Measurement(load.result(), rss_bytes, cpu_s + sum(process.cpu_times()[:2]))


def overload(
    server: Server, *, steps: int, times: float, seconds: float, peak_s: float
) -> tuple[Measurement, Measurement, Measurement]:
    """Measure the peak, a multiple of it, and the peak again."""
    options = {"media": "msgpack", "may_reject": True}
    traffic = make_traffic(server.artifact, Bodies.random(steps), KEY, STREAMS, **options)
    server.driver.submit(make_streams, KEY, traffic).result()
    measure(server, min(WARM_S, peak_s))
    before = measure(server, peak_s)
    peak = before.load.chunks_per_s
    # each has one chunk in flight: more than the queue takes within its longest wait
    connections = min(STREAMS, max(CONNECTIONS, math.ceil(2 * QUEUE_WAIT_S * peak)))
    return before, measure(server, seconds, connections, times * peak), measure(server, peak_s)


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
        pinned_service(Path(folder), options.units) as server,
    ):
        phases = overload(server, steps=steps, times=times, seconds=seconds, peak_s=PEAK_S)
    before, over, after = phases
    load, peak = over.load, max(before.load.chunks_per_s, after.load.chunks_per_s)
    rejected_per_s = load.rejected / load.seconds
    p50_ms, max_ms = (over.percentile_ms(percent) for percent in (50, 100))
    first_mib, last_mib = (over.rss_bytes[at] / 2**20 for at in (0, -1))
    checks = over.check(peak)
    print(
        f"{describe_machine()}, commit {read_commit()}; {Cores.first_and_last().describe()}",
        f"two LSTM({options.units}), chunks of {steps} events",
        f"{times:g} times the peak for {seconds:g} s",
        f"peak             {peak:,.0f} chunks/s",
        f"offered          {load.chunks_per_s + rejected_per_s:,.0f} chunks/s",
        f"goodput          {load.chunks_per_s:,.0f} chunks/s",
        f"rejected at once {rejected_per_s:,.0f} chunks/s",
        f"accepted, ms     p50 {p50_ms:.0f}, p99 {over.percentile_ms(99):.0f}, max {max_ms:.0f}",
        f"memory, MiB      {first_mib:.0f} at first, {last_mib:.0f} at last",
        *checks,
        sep="\n",
    )
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
