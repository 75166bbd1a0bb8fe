"""The sections of the benchmark: which servers run under which loads, and what is compared.

Most are rows in turns (`Bench.measure_rounds`) and ratios of them. `SECTIONS` names them all.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import mean, stdev
from typing import Any

from models.artifact.artifact import Artifact
from tests.bench import workloads
from tests.bench.answers import TRAINED_TOLERANCE, WrongOutputsError, check_answers
from tests.bench.cpu_split import CannotProfileError, record_stacks, stage_of, stage_shares
from tests.bench.filling import fill_store, measure_bytes_per_stream, rewrite_file
from tests.bench.generator import Connection, make_streams, run_closed, run_open
from tests.bench.processes import await_start, helper_process, running_process
from tests.bench.results import MIB
from tests.bench.run import CONNECTIONS, Bench, Row, Server, carry_command
from tests.bench.traffic import Media, Traffic, TrafficSpec, read_positions, write_request
from tests.bench.workloads import FEW, KINDS, PLAIN, STEPS, Bodies, make_traffic
from tests.support.machine import Cores, read_usage
from tests.support.servers import free_port

FLOOR_REPLY_BYTES = 1800
"""Where there is no server whose reply the floors could imitate."""

BESIDE_CONNECTIONS = (1, 8, 16, 32, 64)
BESIDE_FIELDS = {"chunks/s": "chunks_per_s", "CPU": "cpu_us_per_chunk", "p50": "p50_ms"}
ITEMS, MANY_CONNECTIONS = 64, 4
MANY_LOADS: dict[str, dict[str, Any]] = {
    "msgpack-64": {"media": "msgpack", "items": ITEMS},
    "json-64": {"media": "json", "items": ITEMS},
    "msgpack-1": {"media": "msgpack"},
}
OPEN_PERCENTS = (50, 80)
LONG_STEPS = 10_000
CACHES = {"uncached": {"CARRY_STATE_CACHE_BYTES": "0"}, "cached": {}}
"""The two servers on each store; each has half of its streams, named by its own prefix."""

FIRST_REPLY_WITHIN_S = 180.0
WORKER_CONNECTIONS = (32, 64, 128)
"""With the first, each of two workers has batches of half the size that one has alone."""

RACERS, RACES = 16, 20
WIDTHS, LENGTHS = (workloads.UNITS, 256), (1, 16, 128)
MEDIA: tuple[Media, ...] = ("json", "msgpack")
CHECKED_STREAMS, CHECKED_CHUNKS = 2, 8
MOST_ITEMS = 1000
"""Of one request, by Carry's default."""

PAIR_SHARE, ONE_SHARE = 0.5, 0.25
"""Of a round's time: a kind at all connections and the plain stack next to it, and at one."""

SHOWN_FRAMES = 12


def per_runtime(
    measure: Callable[[Bench, str], None], runtimes: slice = slice(None)
) -> Callable[[Bench], None]:
    """A section that measures Carry on one runtime after another."""

    def section(bench: Bench) -> None:
        for kind in bench.carry_kinds()[runtimes]:
            with bench.scope:
                measure(bench, kind)

    return section


LAST_RUNTIME = slice(-1, None)


def measure_peak(bench: Bench) -> None:
    """Every server: closed loop, 32 connections and 1, interleaved."""
    carry, results, rows = bench.carry_kinds(), bench.results, []
    server, reply_bytes = None, FLOOR_REPLY_BYTES
    with bench.scope:
        # Carry first, since the floors imitate its replies.
        for kind in [*carry, *bench.available(bench.options.baselines)]:
            server = bench.start_server(kind, beside=server, reply_bytes=reply_bytes)
            load = bench.prepare(server, kind)
            if kind in carry:
                reply_bytes = len(load.sampled[0].reply)
            rows += [Row(f"peak/{n}/{kind}", server, kind, n) for n in (CONNECTIONS, 1)]
        bench.measure_rounds(rows)
    for kind in carry:
        ours = f"peak/{CONNECTIONS}/{kind}"
        for other in ("fastapi", "competent", "naive", "asgi"):
            theirs = results.rows.get(f"peak/{CONNECTIONS}/{other}", [])
            results.compare(f"peak/{kind} over {other}", results.rows[ours], theirs)
        name = f"peak/p50 at 1, {kind} over fastapi"
        results.ratio(name, f"peak/1/{kind}", "peak/1/fastapi", "p50_ms")
        results.figure(f"peak/{kind} MiB", results.values(ours, "rss_mib"))


def measure_beside(bench: Bench, kind: str) -> None:
    """This checkout compared with another one, interleaved, on one store.

    A machine that others use too is now faster, now slower, for seconds at a time. So rounds are
    short, each pair has one of both, and the result is the mean of the ratios within the turns,
    with its standard error: 40 rounds of half a second tell two per cent.
    """
    results, other = bench.results, bench.options.beside
    if other is None:
        bench.note("beside: no other checkout was named with --beside")
        return
    this = bench.start_server(kind, name="this")
    that = bench.start_server(kind, beside=this, name="other", checkout=other)
    for server in (this, that):
        bench.prepare(server, server.name)
    for count in BESIDE_CONNECTIONS:
        rows = [Row(f"beside/{count}/{s.name}", s, s.name, count) for s in (this, that)]
        bench.measure_rounds(rows)
        for shown, field in BESIDE_FIELDS.items():
            values = [results.values(row.name, field) for row in rows]
            middle, error = geometric_mean([one / two for one, two in zip(*values, strict=True)])
            spread = [middle / (1 + error), middle, middle * (1 + error)]
            results.figure(f"beside/{count}: {shown}, this over the other", spread)


def geometric_mean(ratios: Sequence[float]) -> tuple[float, float]:
    """The geometric mean of ratios, and its relative standard error (0 of one alone)."""
    logs = [math.log(ratio) for ratio in ratios]
    error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return math.exp(mean(logs)), error


def measure_many(bench: Bench, kind: str) -> None:
    """Requests for many streams, 64 chunks of 16 events each, against the compute alone."""
    results, server = bench.results, bench.start_server(kind)
    runtime, process = kind.removeprefix("carry-"), bench.start(helper_process(bench.cores.servers))
    rows, alone = [], []
    for load, options in MANY_LOADS.items():
        bench.prepare(server, load, **options)
        count = MANY_CONNECTIONS if options.get("items") else CONNECTIONS
        rows.append(Row(f"many/{load}/{kind}", server, load, count))
    for _ in range(bench.options.rounds):
        alone.append(process.submit(workloads.measure_rates, runtime, bench.artifact.path).result())
        for row in rows:
            bench.measure_closed(row)
    for batch in alone[0]:
        name = f"many/compute alone {runtime} batch {batch}, chunks/s"
        results.figure(name, [rates[batch].chunks_per_s for rates in alone])
    best = [max(rates.values()) for rates in alone]
    for row in rows:
        shown = "" if row.key == "msgpack-64" else f" {row.key}"
        results.compare(f"many/{kind}{shown} over compute", results.rows[row.name], best)


def measure_latency(bench: Bench, kind: str) -> None:
    """Open loop at shares of the peak, alone and beside a stream of long chunks."""
    seconds, results = bench.options.seconds * 2, bench.results
    server, long_driver = bench.start_server(kind), bench.start(helper_process(bench.cores.others))
    bench.prepare(server, kind)
    long_bodies = Bodies.random(LONG_STEPS, count=1)
    long_driver.submit(make_streams, "long", make_traffic(server.artifact, long_bodies, "long", 1))
    for seed in range(1, bench.options.rounds + 1):
        bench.measure_closed(Row(f"latency/unloaded/{kind}", server, kind, 1))
        peak = bench.measure_closed(Row(f"latency/peak/{kind}", server, kind)).chunks_per_s
        loads = {
            share: partial(
                server.run, run_open, kind, server.port, peak * share / 100, seconds, seed
            )
            for share in OPEN_PERCENTS
        }
        for percent, load in loads.items():
            bench.measure(f"latency/open-{percent}/{kind}", server, load)
        long = long_driver.submit(run_closed, "long", server.port, 1, seconds)
        bench.measure(f"latency/open-50-long/{kind}", server, loads[50])
        bench.say(f"  {long.result().chunks} chunks of {LONG_STEPS} events beside it")
    unloaded = results.values(f"latency/unloaded/{kind}", "p50_ms")
    for percent in OPEN_PERCENTS:
        p99 = results.values(f"latency/open-{percent}/{kind}", "p99_ms")
        results.ratios(f"latency/{kind} p99 at {percent} % over unloaded p50", p99, unloaded)
    name, rows = f"latency/{kind} p99 beside long chunks over without", "latency/open-50"
    results.ratio(name, f"{rows}-long/{kind}", f"{rows}/{kind}", "p99_ms")


def measure_streams(bench: Bench, kind: str) -> None:
    """Few and very many streams in the store, cached or not, and the bytes of each."""
    many, results, rows = bench.options.many_streams, bench.results, []
    for count in (FEW, many):
        server = None
        for cache, environment in CACHES.items():
            key = f"{count}-{cache}"
            server = bench.start_server(kind, beside=server, environment=environment, name=key)
            spec = make_traffic(bench.artifact, bench.bodies, cache, count // 2, position=STEPS)
            bench.say(f"filling the store with {spec.streams:,} streams")
            fill_store(server.store, spec, bench.artifact)
            bench.warm(server, key, spec)
            rows.append(Row(f"streams/{key}/{kind}", server, key))
        rewrite_file(server.store)
    bench.measure_rounds(rows)
    measure_bytes_per_stream(server.store, bench.artifact, results)
    for name, above, below in (
        (f"{many} over {FEW}", f"{many}-uncached", f"{FEW}-uncached"),
        (f"{FEW}, cache on over off", f"{FEW}-cached", f"{FEW}-uncached"),
        (f"{many}, cache on over off", f"{many}-cached", f"{many}-uncached"),
    ):
        results.ratio(f"streams/{name}", f"streams/{above}/{kind}", f"streams/{below}/{kind}")


def measure_cold_start(bench: Bench, kind: str) -> None:
    """From `carry serve` on an empty folder, its own store included, to the first answer."""
    starts = [_start_cold(bench, kind, f"cold-{n}") for n in range(bench.options.rounds)]
    for index, name in enumerate(("s", "MiB after the first answer")):
        bench.results.figure(f"cold/{kind} {name}", [start[index] for start in starts])


def _start_cold(bench: Bench, kind: str, name: str) -> tuple[float, float]:
    """Seconds to the whole first reply, and MiB without the embedded store."""
    spec = make_traffic(bench.artifact, bench.bodies, name, 1, sampled=1)
    traffic, port = Traffic(spec), free_port()
    request, ticket = traffic.request()
    log, data = bench.folder / f"{name}-{port}.log", bench.folder / f"data-{port}"
    command = carry_command(bench.artifact.path, port, "--data-dir", str(data))
    runtime = {"CARRY_RUNTIME": kind.removeprefix("carry-")}
    started_s = time.perf_counter()
    with running_process(command, bench.cores.servers, log, runtime) as process:
        # The port is bound before anything slow begins: the answer comes when it can.
        with closing(await_start(process, lambda: _connect(port), log)) as connection:
            connection.sock.sendall(request)
            reply = connection.receive()
        seconds = time.perf_counter() - started_s
        mib = read_usage(process.pid).rss_bytes / MIB
    traffic.accept(ticket, reply)
    check_answers(bench.artifact, spec, bench.bodies.rows, traffic.sampled)
    bench.say(f"  cold start of {kind}: {seconds:.2f} s, {mib:.0f} MiB")
    return seconds, mib


def _connect(port: int) -> Connection | None:
    try:
        return Connection(port, FIRST_REPLY_WITHIN_S)
    except OSError:
        return None


def measure_workers(bench: Bench, kind: str) -> None:
    """Two workers on all cores, shared with everything else, against one; then races."""
    everything, results = bench.cores.everything, bench.results
    cores = Cores(everything, everything)
    one = bench.start_server(kind, cores=cores, name="1")
    two = bench.start_server(kind, beside=one, cores=cores, workers=2, name="2")
    for server in (one, two):
        bench.prepare(server, server.name)
    loads = list(product(WORKER_CONNECTIONS, (one, two)))
    bench.measure_rounds([Row(f"workers/{n}-{s.name}/{kind}", s, s.name, n) for n, s in loads])
    for count in WORKER_CONNECTIONS:
        name, rows = f"workers/{kind} 2 over 1, {count} connections", f"workers/{count}"
        results.ratio(name, f"{rows}-2/{kind}", f"{rows}-1/{kind}")
    racing = {kind: two}
    if "competent" in bench.available(bench.options.baselines):
        racing["competent"] = bench.start_server("competent", beside=one, cores=cores)
    for name, server in racing.items():
        lost = [race(bench, server, f"race-{turn}") for turn in range(RACES)]
        results.figure(f"workers/{name} lost", [max(lost)])


def race(bench: Bench, server: Server, stream: str) -> int:
    """Send 16 chunks of one stream at once, without positions; how many of them were lost.

    Each must be answered with 200; a chunk is lost where two replies give one position, or
    the last position is short of all events.
    """
    content = {"inputs": bench.bodies.rows[0].tolist()}
    request = write_request(f"/v1/models/bench/streams/{stream}/chunks", "json", content)
    racers = [Connection(server.port) for _ in range(RACERS)]
    for racer in racers:
        racer.sock.sendall(request)
    positions = {read_positions(racer.receive(), "json")[0] for racer in racers}
    for racer in racers:
        racer.close()
    return len({STEPS * (count + 1) for count in range(RACERS)} - positions)


def measure_events(bench: Bench, kind: str) -> None:
    """The flights model fed by `events` and by the rows its encoder makes of them, ragged."""
    artifact = workloads.flights_model(bench.folder)
    bodies = workloads.flights_bodies(artifact)
    server, rows = bench.start_server(kind, artifact), []
    for feed, blocks in (("events", bodies), ("inputs", replace(bodies, events=None))):
        bench.prepare(server, feed, blocks, tolerance=TRAINED_TOLERANCE)
        rows.append(Row(f"events/{feed}/{kind}", server, feed))
    bench.measure_rounds(rows)
    bench.results.ratio(f"events/{kind} events over inputs", *(row.name for row in rows))


def measure_widths(bench: Bench, kind: str) -> None:
    """Chunks of 1, 16 and 128 events, networks of width 64 and 256, JSON and MessagePack."""
    rows, server = [], None
    for units in WIDTHS:
        artifact = workloads.standard_model(bench.folder / f"models-{units}", units)
        server = bench.start_server(kind, artifact, beside=server)
        for steps, media in product(LENGTHS, MEDIA):
            key = f"{units}-T{steps}-{media}"
            bench.prepare(server, key, Bodies.random(steps), media=media)
            rows.append(Row(f"widths/{key}/{kind}", server, key))
    bench.measure_rounds(rows)


def measure_kinds(bench: Bench, kind: str) -> None:
    """Every kind of network beside the plain stacked LSTM of the same size, all in one server.

    Right before or after a kind the plain stack is measured for the same time; a ratio is of such
    a pair.
    """
    results, folder = bench.results, bench.folder / f"kinds-{kind}"
    artifacts = [workloads.write_network(folder, name, KINDS[name]) for name in KINDS]
    server = bench.start_server(kind, artifacts[0], models=folder)
    for artifact in artifacts:
        _prepare_kind(bench, server, artifact)
    # the plain stack is the first of them
    plain, *others = (Row(f"kinds/{CONNECTIONS}/{name}/{kind}", server, name) for name in KINDS)
    for turn in range(bench.options.rounds):
        for row in others:
            for one in (row, plain) if turn % 2 else (plain, row):
                bench.measure_closed(one, PAIR_SHARE)
        for row in (plain, *others):
            alone = row._replace(name=f"kinds/1/{row.key}/{kind}", connections=1)
            bench.measure_closed(alone, ONE_SHARE)
    for index, row in enumerate(others):
        ours, theirs = results.rows[row.name], results.rows[plain.name][index :: len(others)]
        results.compare(f"kinds/{kind} {row.key} over {PLAIN}", ours, theirs)


def _prepare_kind(bench: Bench, server: Server, artifact: Artifact) -> None:
    """Check a kind's answers to a few streams in full batches, then warm up those measured."""
    name, bodies = artifact.spec.name, bench.bodies
    checked = make_traffic(artifact, bodies, "checked", CONNECTIONS, sampled=CHECKED_STREAMS)
    streams = bench.options.streams
    if artifact.spec.decoder is not None:
        streams = min(streams, MOST_ITEMS)
    measured = make_traffic(artifact, bodies, name, streams)
    for spec in (checked, measured):
        if not spec.moves:
            _begin_streams(bench, server, artifact, spec)
    server.run(make_streams, name, checked)
    load = server.run(run_closed, name, server.port, CONNECTIONS, 0.0, CHECKED_CHUNKS)
    if not check_answers(artifact, checked, bodies.rows, load.sampled):
        raise WrongOutputsError(f"{name}: expected outputs to check, got none")
    bench.warm(server, name, measured)


def _begin_streams(bench: Bench, server: Server, artifact: Artifact, spec: TrafficSpec) -> None:
    """Give each stream that will be forecast its one chunk, all in one request."""
    count = spec.streams
    traffic = Traffic(make_traffic(artifact, bench.bodies, spec.prefix, count, items=count))
    request, ticket = traffic.request()
    with closing(Connection(server.port)) as connection:
        connection.sock.sendall(request)
        traffic.accept(ticket, connection.receive())


def measure_cpu_split(bench: Bench, kind: str) -> None:
    """The CPU of a chunk without the profiler, times the shares of stages under it."""
    server = bench.start_server(kind)
    row = Row(f"split/{CONNECTIONS}/{kind}", server, kind)
    bench.prepare(server, kind)
    bench.measure_rounds([row])
    seconds = math.ceil(bench.options.seconds * 2)
    load = server.driver.submit(run_closed, kind, server.port, CONNECTIONS, seconds + 1.0)
    try:
        stacks = record_stacks(server.pid, seconds, bench.cores.others)
    except CannotProfileError as error:
        bench.note(f"the CPU of {kind} is not split: {error}")
        return
    finally:
        load.result()
    cpu_us = bench.results.median(row.name, "cpu_us_per_chunk")
    for stage, share in stage_shares(stacks).items():
        bench.results.figure(f"split/{kind} {stage}, us a chunk", [share * cpu_us])
    inner: Counter[tuple[str, str]] = Counter()
    for stack, count in stacks.items():
        inner[stage_of(stack), stack.rpartition(";")[2]] += count
    for (stage, frame), count in inner.most_common(SHOWN_FRAMES):
        bench.say(f"  {count / max(1, stacks.total()):6.1%}  {stage:7} {frame}")


BESIDE = "beside"
"""The section of a run with `--beside`, which runs no other by default."""

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "peak": measure_peak,
    "many": per_runtime(measure_many),
    "latency": per_runtime(measure_latency),
    "streams": per_runtime(measure_streams, LAST_RUNTIME),
    "cold": per_runtime(measure_cold_start),
    "workers": per_runtime(measure_workers),
    "events": per_runtime(measure_events),
    "widths": per_runtime(measure_widths),
    "kinds": per_runtime(measure_kinds),
    "split": per_runtime(measure_cpu_split),
    BESIDE: per_runtime(measure_beside, LAST_RUNTIME),
}
"""In the order in which they are run."""
