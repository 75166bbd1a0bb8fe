"""`make bench`: Carry beside a bare FastAPI route, in one run, in turns.

    python -m tests.bench [--rounds 3] [--seconds 4] [--connections 32] [--streams 1000]

Two stacked LSTM(64) and Dense(8), 16 features, chunks of 16 events as JSON with positions, the
state in the embedded Valkey before and after each chunk. Where there are two cores, the servers
run on the first and the generator on the second. Prints a table and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.load import HOST, Load, Streams, run

FEATURES, STEPS = 16, 16
SPEC = """
name: bench
features: 16
layers:
  - {kind: lstm, units: 64}
  - {kind: lstm, units: 64}
heads:
  - {kind: dense, name: out, units: 8}
"""
STARTS_WITHIN_S = 120


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    is_carry: bool

    def path(self, stream: str) -> str:
        """Where a stream's chunks go."""
        return f"/v1/models/bench/streams/{stream}/chunks"

    def cpu_s(self) -> float:
        """Processor time of the server's process so far, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        """Memory of the server's process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(
    name: str, command: list[str], port: int, ready: str | None, log: Path
) -> Iterator[Server]:
    """Run a server on the first core until the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=_first_core)
    try:
        _wait_until_ready(port, ready, process, log)
        yield Server(name, port, process, is_carry=ready is not None)
    finally:
        process.terminate()
        process.wait(60)


def _first_core() -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])


def _wait_until_ready(
    port: int, ready: str | None, process: subprocess.Popen[bytes], log: Path
) -> None:
    ends_s = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < ends_s and process.poll() is None:
        try:
            if ready is None:
                socket.create_connection((HOST, port), 1).close()
            else:
                urllib.request.urlopen(f"http://{HOST}:{port}{ready}", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"a server did not start; the end of its log:\n{log.read_text()[-2000:]}")


def measure(server: Server, connections: list[Streams], seconds: float) -> tuple[Load, float]:
    """One run: what the generator saw, and the server's CPU per chunk in microseconds."""
    before_s = server.cpu_s()
    load = asyncio.run(
        run(server.port, server.path, connections, seconds, check_position=server.is_carry)
    )
    return load, (server.cpu_s() - before_s) / len(load.latencies_s) * 1e6


def connections_of(count: int, streams: int, prefix: str) -> list[Streams]:
    """The streams, dealt out to the connections."""
    names = [f"{prefix}-{index:06d}" for index in range(streams)]
    return [
        Streams(names[index::count], features=FEATURES, steps=STEPS, seed=index)
        for index in range(count)
    ]


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description="Carry beside a bare FastAPI route.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--streams", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="carry-bench-") as folder:
        _compare(options, Path(folder))


def _compare(options: argparse.Namespace, folder: Path) -> None:
    (folder / "bench.yaml").write_text(SPEC)
    carry = [sys.executable, "-m", "service.cli"]
    artifact = folder / "models" / "bench"
    subprocess.run([*carry, "init", str(folder / "bench.yaml"), str(artifact)], check=True)
    ports = free_port(), free_port()
    floor = [
        sys.executable,
        "-m",
        "uvicorn",
        "tests.bench.floor:app",
        "--port",
        str(ports[0]),
        "--no-access-log",
        "--log-level",
        "warning",
    ]
    serve = [
        *carry,
        "serve",
        "--port",
        str(ports[1]),
        "--models",
        str(artifact.parent),
        "--data-dir",
        str(folder / "data"),
    ]
    with (
        started("FastAPI echo", floor, ports[0], None, folder / "floor.log") as bare,
        started(
            "carry, tensorflow", serve, ports[1], "/health/ready", folder / "carry.log"
        ) as ours,
    ):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-1:])
        print(f"{platform.machine()}, {len(cores)} cores, Python {platform.python_version()}")
        many = {
            server.name: connections_of(options.connections, options.streams, "many")
            for server in (bare, ours)
        }
        one = {server.name: connections_of(1, 1, "one") for server in (bare, ours)}
        for server in (bare, ours):
            measure(server, many[server.name], 1)
        rows: dict[str, list[tuple[Load, float, Load]]] = {bare.name: [], ours.name: []}
        for _ in range(options.rounds):
            for server in (bare, ours):
                load, cpu_us = measure(server, many[server.name], options.seconds)
                alone, _ = measure(server, one[server.name], options.seconds / 2)
                rows[server.name].append((load, cpu_us, alone))
        print(
            f"{'server':20} {'chunks/s':>9} {'CPU us/chunk':>13} {'p50 ms':>8} {'p99 ms':>8} "
            f"{'p50 ms at 1':>12} {'MiB':>6}"
        )
        for server in (bare, ours):
            seen = rows[server.name]
            print(
                f"{server.name:20} {median(load.chunks_per_s for load, _, _ in seen):9.0f} "
                f"{median(cpu for _, cpu, _ in seen):13.0f} "
                f"{median(load.percentile_ms(50) for load, _, _ in seen):8.2f} "
                f"{median(load.percentile_ms(99) for load, _, _ in seen):8.2f} "
                f"{median(a.percentile_ms(50) for _, _, a in seen):12.2f} {server.rss_mib():6.0f}"
            )
        ratios = [
            ours_run[0].chunks_per_s / bare_run[0].chunks_per_s
            for bare_run, ours_run in zip(rows[bare.name], rows[ours.name], strict=True)
        ]
        print(
            f"carry / FastAPI echo: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
