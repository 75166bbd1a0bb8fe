"""Sections about servers on the standard workload: rates, latency, starts, workers, CPU time."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from statistics import mean, stdev

from tests.bench.cpu_split import CannotProfileError, record_stacks, stage_of, stage_shares
from tests.bench.generator import HOST, Connection, Driver
from tests.bench.processes import CannotStartError, await_start, read_tail, running_process
from tests.bench.results import MIB
from tests.bench.run import CONNECTIONS, FLOORS, Bench, Server, Store, carry_command
from tests.bench.traffic import Sampled, Traffic, position_in
from tests.bench.workloads import STEPS, Bodies, check_answers
from tests.support.machine import REPOSITORY, read_usage
from tests.support.servers import free_port

BESIDE_CONNECTIONS = (1, 8, 16, 32, 64)
BESIDE_FIELDS = {"chunks/s": "chunks_per_s", "CPU": "cpu_us_per_chunk", "p50": "p50_ms"}
FLOOR_REPLY_BYTES = 1800
"""Where there is no server whose reply the floors could imitate."""

OPEN_PERCENTS = (50, 80)
LONG_STEPS = 10_000
WORKER_CONNECTIONS = (32, 64, 128)
"""With the first, each of two workers has batches of half the size that one has alone."""

RACERS = 16
RACES = 20
SHOWN_FRAMES = 12
FIRST_REPLY_WITHIN_S = 180.0


def measure_peak(bench: Bench) -> None:
    """Every server: closed loop, 32 connections and 1, interleaved."""
    baselines, carry = bench.available(bench.options.baselines), bench.carry_kinds()
    reply_bytes, results = FLOOR_REPLY_BYTES, bench.results
    with bench.store() as store, bench.driver() as driver, ExitStack() as stack:
        servers: dict[str, Server] = {}
        # Carry's first, since the floors imitate its replies.
        for kind in [*carry, *sorted(baselines, key=lambda kind: kind in FLOORS)]:
            servers[kind] = stack.enter_context(bench.server(kind, store, reply_bytes=reply_bytes))
            load = bench.prepare(driver, kind, servers[kind], bench.bodies)
            if kind in carry:
                reply_bytes = len(load.sampled[0].reply)
        order = [*baselines, *carry]
        for turn in range(bench.options.rounds):
            first = turn % len(order)
            for kind in order[first:] + order[:first]:
                for count in (CONNECTIONS, 1):
                    bench.closed(f"peak/{count}/{kind}", driver, kind, servers[kind], store, count)
    for kind in carry:
        ours = f"peak/{CONNECTIONS}/{kind}"
        for other in ("fastapi", "competent", "naive", "asgi"):
            theirs = f"peak/{CONNECTIONS}/{other}"
            results.ratio(f"peak/{kind} over {other}", ours, theirs)
            # Where others use the machine too, this one suffers less.
            results.ratio(f"peak/{kind} over {other}, by CPU", theirs, ours, "cpu_us_per_chunk")
        name = f"peak/p50 at 1, {kind} over fastapi"
        results.ratio(name, f"peak/1/{kind}", "peak/1/fastapi", "p50_ms")
        results.figure(f"peak/{kind} MiB", results.values(ours, "rss_mib"))


def measure_beside(bench: Bench) -> None:
    """This checkout compared with another one, interleaved, on one store.

    A machine that others use too is now faster, now slower, for seconds at a time. So rounds are
    short, each pair has one of both, and the result is the mean of the ratios within the turns,
    with its standard error: 40 rounds of half a second tell two per cent.
    """
    results, other = bench.results, bench.options.beside
    if other is None:
        bench.note("beside: no other checkout was named with --beside")
        return
    for kind in bench.carry_kinds()[-1:]:
        with bench.store() as store, bench.driver() as driver, ExitStack() as stack:
            servers = {}
            for name, checkout in (("this", REPOSITORY), ("other", other)):
                servers[name] = stack.enter_context(
                    bench.server(kind, store, name=name, checkout=checkout)
                )
                bench.prepare(driver, name, servers[name], bench.bodies)
            for count in BESIDE_CONNECTIONS:
                rows = {name: f"beside/{count}/{name}" for name in servers}
                for turn in range(bench.options.rounds):
                    for name in sorted(servers, reverse=turn % 2 == 0):
                        bench.closed(rows[name], driver, name, servers[name], store, count)
                for shown, field in BESIDE_FIELDS.items():
                    values = [results.values(rows[name], field) for name in ("this", "other")]
                    middle, error = geometric_mean(
                        [one / two for one, two in zip(*values, strict=True)]
                    )
                    spread = [middle / (1 + error), middle, middle * (1 + error)]
                    results.figure(f"beside/{count}: {shown}, this over the other", spread)


def geometric_mean(ratios: Sequence[float]) -> tuple[float, float]:
    """The geometric mean of ratios, and its relative standard error (0 of one alone)."""
    logs = [math.log(ratio) for ratio in ratios]
    error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return math.exp(mean(logs)), error


def measure_latency(bench: Bench) -> None:
    """Open loop at shares of the peak, alone and beside a stream of long chunks."""
    for kind in bench.carry_kinds():
        with bench.carry(kind) as (store, driver, server), bench.driver() as long_driver:
            bench.prepare(driver, kind, server, bench.bodies)
            long_driver.traffic("long", Bodies.random(LONG_STEPS, count=1).traffic("long", 1))
            for turn in range(bench.options.rounds):
                _measure_latency_once(bench, kind, server, store, driver, long_driver, turn + 1)
        results = bench.results
        unloaded = results.values(f"latency/unloaded/{kind}", "p50_ms")
        for percent in OPEN_PERCENTS:
            p99 = results.values(f"latency/open-{percent}/{kind}", "p99_ms")
            results.ratios(f"latency/{kind} p99 at {percent} % over unloaded p50", p99, unloaded)
        name, rows = f"latency/{kind} p99 beside long chunks over without", "latency/open-50"
        results.ratio(name, f"{rows}-long/{kind}", f"{rows}/{kind}", "p99_ms")


def _measure_latency_once(
    bench: Bench,
    kind: str,
    server: Server,
    store: Store,
    driver: Driver,
    long_driver: Driver,
    seed: int,
) -> None:
    bench.closed(f"latency/unloaded/{kind}", driver, kind, server, store, 1)
    peak = bench.closed(f"latency/peak/{kind}", driver, kind, server, store)
    seconds = bench.options.seconds * 2
    loads = {
        percent: partial(
            driver.open, kind, server.port, peak.chunks_per_s * percent / 100, seconds, seed
        )
        for percent in OPEN_PERCENTS
    }
    for percent, load in loads.items():
        bench.measured(f"latency/open-{percent}/{kind}", server, store, load)
    long = long_driver.start("closed", "long", server.port, 1, seconds)
    bench.measured(f"latency/open-50-long/{kind}", server, store, loads[50])
    bench.say(f"  {long.result().chunks} chunks of {LONG_STEPS} events beside it")


def measure_cold_start(bench: Bench) -> None:
    """From `carry serve` on an empty folder, its own store included, to the first answer."""
    for kind in bench.carry_kinds():
        seconds, rss_mib = [], []
        for turn in range(bench.options.rounds):
            spec = bench.bodies.traffic(f"cold-{turn}", 1, sampled=1)
            request, _ = Traffic(spec).request()
            closing = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            took_s, reply, rss_bytes = _start_cold(bench, kind, closing)
            sampled = Sampled(0, 0, reply.partition(b"\r\n\r\n")[2])
            check_answers(bench.artifact, spec, bench.bodies.rows, [sampled])
            seconds.append(took_s)
            rss_mib.append(rss_bytes / MIB)
            bench.say(f"  cold start of {kind}: {took_s:.2f} s, {rss_mib[-1]:.0f} MiB")
        bench.results.figure(f"cold/{kind} s", seconds)
        bench.results.figure(f"cold/{kind} MiB after the first answer", rss_mib)


def _start_cold(bench: Bench, kind: str, request: bytes) -> tuple[float, bytes, int]:
    """Seconds to the whole first reply, the reply, and memory without the embedded store."""
    port = free_port()
    log, data = bench.folder / f"cold-{port}.log", bench.folder / f"data-{port}"
    command = carry_command(bench.artifact.path, port, "--data-dir", str(data))
    runtime = {"CARRY_RUNTIME": kind.removeprefix("carry-")}
    started_s = time.perf_counter()
    with running_process(command, bench.cores.servers, log, runtime) as process:
        with await_start(process, lambda: _connect(port), log) as connection:
            # The port is bound before anything slow begins: the answer comes when it can.
            connection.settimeout(FIRST_REPLY_WITHIN_S)
            connection.sendall(request)
            reply = b""
            while data_read := connection.recv(1 << 16):
                reply += data_read
        seconds = time.perf_counter() - started_s
        if not reply.startswith(b"HTTP/1.1 200 "):
            raise CannotStartError(f"expected status 200, got {reply[:300]!r}\n{read_tail(log)}")
        return seconds, reply, read_usage(process.pid).rss_bytes


def _connect(port: int) -> socket.socket | None:
    try:
        return socket.create_connection((HOST, port), 1)
    except OSError:
        return None


def measure_workers(bench: Bench) -> None:
    """Two workers on all cores, shared with everything else, against one; then races."""
    cores, results = bench.cores.everything, bench.results
    for kind in bench.carry_kinds():
        with (
            bench.store(cores) as store,
            bench.driver(cores) as driver,
            bench.server(kind, store, cores=cores, name="1") as one,
            bench.server(kind, store, cores=cores, workers=2, name="2") as two,
        ):
            for server in (one, two):
                bench.prepare(driver, server.name, server, bench.bodies)
            for _ in range(bench.options.rounds):
                for count in WORKER_CONNECTIONS:
                    for server in (one, two):
                        row = f"workers/{count}-{server.name}/{kind}"
                        bench.closed(row, driver, server.name, server, store, count)
            lost = [race(bench, two, f"race-{turn}") for turn in range(RACES)]
        for count in WORKER_CONNECTIONS:
            name, rows = f"workers/{kind} 2 over 1, {count} connections", f"workers/{count}"
            results.ratio(name, f"{rows}-2/{kind}", f"{rows}-1/{kind}")
        results.figure(f"workers/{kind} lost", [max(lost)])
    for kind in bench.available([k for k in bench.options.baselines if k == "competent"]):
        with bench.store(cores) as store, bench.server(kind, store, cores=cores) as server:
            lost = [race(bench, server, f"race-{turn}") for turn in range(RACES)]
        results.figure(f"workers/{kind} lost", lost)


def race(bench: Bench, server: Server, stream: str) -> int:
    """Send 16 chunks of one stream at once, without positions; how many of them were lost.

    Each must be answered with 200; a chunk is lost where two replies give one position, or
    the last position is short of all events.
    """
    request, _ = Traffic(bench.bodies.traffic(stream, 1)).request()
    head, _, body = request.partition(b"\r\n\r\n")
    body = body.replace(b'"position":0,', b"", 1)
    head = head.rpartition(b" ")[0] + b" %d\r\n\r\n" % len(body)
    racers = [Connection(server.port) for _ in range(RACERS)]
    positions = set()
    try:
        for racer in racers:
            racer.sock.sendall(head + body)
        for racer in racers:
            while (reply := racer.receive()) is None:
                pass
            positions.add(position_in(*reply, "json"))
    finally:
        for racer in racers:
            racer.sock.close()
    return len({STEPS * (count + 1) for count in range(RACERS)} - positions)


def measure_cpu_split(bench: Bench) -> None:
    """The CPU of a chunk without the profiler, times the shares of stages under it."""
    for kind in bench.carry_kinds():
        with bench.carry(kind) as (store, driver, server):
            bench.prepare(driver, kind, server, bench.bodies)
            for _ in range(bench.options.rounds):
                bench.closed(f"split/32/{kind}", driver, kind, server, store)
            seconds = math.ceil(bench.options.seconds * 2)
            load = driver.start("closed", kind, server.port, CONNECTIONS, seconds + 1.0)
            try:
                stacks = record_stacks(server.pid, seconds, bench.cores.others)
            except CannotProfileError as error:
                bench.note(f"the CPU of {kind} is not split: {error}")
                continue
            finally:
                load.result()
        cpu_us = bench.results.median(f"split/32/{kind}", "cpu_us_per_chunk")
        for stage, share in stage_shares(stacks).items():
            bench.results.figure(f"split/{kind} {stage}, us a chunk", [share * cpu_us])
        inner: Counter[tuple[str, str]] = Counter()
        for stack, count in stacks.items():
            inner[stage_of(stack), stack.rpartition(";")[2]] += count
        for (stage, frame), count in inner.most_common(SHOWN_FRAMES):
            bench.say(f"  {count / max(1, stacks.total()):6.1%}  {stage:7} {frame}")
