"""Carry beside another server of the V2 protocol, in turns, loaded by Triton's own `perf_analyzer`.

The other server is already running, on the core where this run pins Carry; `perf_analyzer` and the
store are on another one. A request is a chunk of the standard workload, a sequence has 20. Rates
and latencies are the tool's; the CPU of a request is that of all processes of the server over the
number of requests in its statistics.
"""

from __future__ import annotations

import csv
import resource
import shutil
import subprocess
import time
from itertools import product
from math import nan
from typing import NamedTuple

import httpx
import psutil

from tests.bench.results import CPU_STEP_S, MIB, Results, Sample
from tests.bench.run import Bench, Server
from tests.bench.workloads import FEATURES, STEPS
from tests.support.machine import read_usage
from tests.support.servers import free_port

TOOL = "perf_analyzer"
IN_FLIGHT = (1, 16, 32, 64)
_JSON = ("--input-tensor-format", "json", "--output-tensor-format", "json")
TRANSPORTS = {
    "http": ("-i", "http"),
    "json": ("-i", "http", *_JSON),
    "grpc": ("-i", "grpc", "--streaming"),
}
"""Binary tensors over HTTP, tensors in JSON, and gRPC streams; gRPC last, since a server may not
survive it."""

SEQUENCE_LENGTH = 20
WINDOWS, MOST_WINDOWS = 3, "10"
"""The tool reports the last three of its windows; a round is so many of them, and more where they
are not stable."""

TOOL_S = 60.0
ANY_DEVIATION = "1000"  # in percent; a narrower one would measure until three windows agree

FAILURES = (AssertionError, subprocess.TimeoutExpired, httpx.HTTPError, psutil.Error)
"""Of the tool, and of a server that has ended."""


class Target(NamedTuple):
    """A server as the tool reaches it."""

    server: Server
    model: str
    grpc: str  # host and port; empty without gRPC

    @property
    def http(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server.port}"

    def address(self, transport: str) -> str:
        """The host and port of a transport; empty without it."""
        return self.grpc if transport == "grpc" else self.http

    def options(self, transport: str) -> list[str]:
        """The tool's options that differ between servers; OSError where nothing answers."""
        url = f"http://{self.http}/v2/models/{self.model}"
        inputs = httpx.get(url).raise_for_status().json()["inputs"]
        [name] = [each["name"] for each in inputs if each["datatype"] == "FP32"]
        shape, address = f"{name}:{STEPS},{FEATURES}", self.address(transport)
        return ["-m", self.model, "--shape", shape, "-u", address, *TRANSPORTS[transport]]

    def count_requests(self) -> int:
        """The requests that it has answered."""
        url = f"http://{self.http}/v2/models/{self.model}/stats"
        [stats] = httpx.get(url).raise_for_status().json()["model_stats"]
        return int(stats["inference_stats"]["success"]["count"])


def measure_peer(bench: Bench, kind: str) -> None:
    """Every transport, with 1 to 64 requests in flight, against the peer."""
    address, results = bench.options.peer, bench.results
    if address is None or shutil.which(TOOL) is None:
        bench.note(f"peer: skipped, no server is named by --peer, or no {TOOL} is on the PATH")
        return
    grpc_port = free_port()
    carry = bench.start_server(kind, environment={"CARRY_GRPC_PORT": str(grpc_port)})
    targets = [
        Target(carry, carry.artifact.spec.name, f"127.0.0.1:{grpc_port}"),
        Target(find_peer(bench, address), bench.options.peer_model, bench.options.peer_grpc),
    ]
    failed: set[str] = set()
    turns = range(-1, bench.options.rounds)  # the first one warms up
    for transport, in_flight, turn, target in product(TRANSPORTS, IN_FLIGHT, turns, targets):
        name = f"peer/{transport} {in_flight}/{target.server.name}"
        if name in failed or not target.address(transport):
            continue
        try:
            sample = run_tool(bench, target, transport, in_flight)
        except FAILURES as error:
            bench.note(f"{name} FAILED, and is not measured again: {error}")
            failed.add(name)
            continue
        if sample is None:
            bench.note(f"{name}: not every round was stable; use longer rounds")
            continue
        print(
            f"  {name}: {sample.chunks_per_s:,.0f} requests/s, {sample.cpu_us_per_chunk:,.0f} us"
            f" CPU, p50 {sample.p50_ms:.2f} ms, p99 {sample.p99_ms:.2f} ms"
            f" (generator {sample.generator_cpu:.0%}, store {sample.store_cpu:.0%} of their core)"
        )
        if turn >= 0:
            results.rows.setdefault(name, []).append(sample)
    for transport, in_flight in product(TRANSPORTS, IN_FLIGHT):
        load = f"peer/{transport} {in_flight}"
        ours, theirs = (results.rows.get(f"{load}/{each.server.name}", []) for each in targets)
        binary = results.rows.get(f"peer/http {in_flight}/{kind}", [])
        _compare(results, f"{load}: {kind} over peer", ours, theirs)
        if transport == "grpc":
            _compare(results, f"{load}: {kind} over its HTTP", ours, binary)


def _compare(results: Results, name: str, ours: list[Sample], theirs: list[Sample]) -> None:
    """The ratio of those rounds that both have."""
    if rounds := min(len(ours), len(theirs)):
        results.compare(name, ours[:rounds], theirs[:rounds])


def find_peer(bench: Bench, address: str) -> Server:
    """The process that listens on the peer's address; OSError where none does."""
    port = int(address.rpartition(":")[2])
    listening = psutil.net_connections("tcp")
    pids = [each.pid for each in listening if each.status == "LISTEN" and each.laddr.port == port]
    if not any(pids):
        raise OSError(f"expected a process of this machine to listen on {address}, got none")
    ours = bench.cores.servers
    if ours and (cores := tuple(psutil.Process(pids[0]).cpu_affinity())) != ours:
        bench.note(f"peer: it may use cores {cores}, Carry {ours}: start it by `taskset`")
    return Server("peer", port, pids[0], bench.artifact, bench.store)


def run_tool(bench: Bench, target: Target, transport: str, in_flight: int) -> Sample | None:
    """One round of the tool, None where it reports no stable windows; raises one of `FAILURES`."""
    report, milliseconds = bench.folder / "report.csv", bench.options.seconds * 1000 / WINDOWS
    options = ["--concurrency-range", str(in_flight), "--sequence-length", str(SEQUENCE_LENGTH)]
    options += ["--measurement-interval", str(round(milliseconds)), "--max-trials", MOST_WINDOWS]
    options += ["--stability-percentage", ANY_DEVIATION, "-f", str(report)]
    command = [TOOL, *target.options(transport), *options]
    report.unlink(missing_ok=True)
    before, started_s = _read_counters(target), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S)
    passed_s = time.perf_counter() - started_s
    assert not done.returncode, f"{command}: {(done.stdout + done.stderr)[-800:]}"
    if not report.exists():
        return None
    pairs = zip(_read_counters(target), before, strict=True)
    requests, server_s, store_s, tool_s = (after - earlier for after, earlier in pairs)
    [row] = csv.DictReader(report.read_text().splitlines())
    rate_per_s = float(row["Inferences/Second"])
    return Sample(
        rate_per_s,
        rate_per_s * STEPS,
        max(server_s, CPU_STEP_S) / requests * 1e6,
        float(row["p50 latency"]) / 1000,
        float(row["p99 latency"]) / 1000,
        nan,
        read_usage(target.server.pid).memory_bytes / MIB,
        tool_s / passed_s,
        store_s / passed_s,
    )


def _read_counters(target: Target) -> tuple[float, ...]:
    """Requests answered, and the seconds of CPU of server, store and tool until now."""
    servers_s = [read_usage(pid).cpu_s for pid in (target.server.pid, target.server.store.pid)]
    tool = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (target.count_requests(), *servers_s, tool.ru_utime + tool.ru_stime)
