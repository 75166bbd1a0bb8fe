"""The sections of the benchmark: which servers run under which loads, and what is compared.

Most are rows in turns (`Bench.measure_rounds`) and ratios of them. `SECTIONS` names them all.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from models.artifact.graphs import GRAPH_NAME
from tests.bench import workloads
from tests.bench.backfill import measure_backfill
from tests.bench.consume import measure_consume
from tests.bench.cost import counted_server
from tests.bench.curves import CURVE, CURVES, measure_curve
from tests.bench.detection import measure_detection
from tests.bench.generator import Connection, make_streams, run_closed, run_open, try_connect
from tests.bench.peer import measure_peer
from tests.bench.results import MIB, geometric_mean
from tests.bench.run import CONNECTIONS, WARM_S, Bench, Row, Server, helper_process
from tests.bench.shadow import measure_shadow
from tests.bench.traffic import Traffic, read_positions, write_request
from tests.bench.workloads import PLAIN, STEPS, Bodies, make_traffic
from tests.support.machine import REPOSITORY, Cores, pin_child, read_usage
from tests.support.onnx_graphs import import_here
from tests.support.servers import free_port, until
from tests.support.service import Service

BASELINES = ("fastapi", "competent")
BESIDE_CONNECTIONS = (1, 8, 16, 32, 64)
BESIDE_LOADS = ("json", "msgpack", "v2", "perf", "perf-json", "grpc", "websocket", "events")
"""Chunks of rows as JSON, as MessagePack, and as binary tensors of the V2 protocol over HTTP, as
Triton's perf_analyzer sends them too, there in JSON as well, and in streams of gRPC; MessagePack
over WebSockets; events of real departures as JSON."""
BESIDE_FIELDS = {"chunks/s": "chunks_per_s", "CPU": "cpu_us_per_chunk", "p50": "p50_ms"}
COUNTED_WINDOWS, COUNTED_CHUNKS = 16, 16
BATCHES, MANY_CONNECTIONS = (1, 8, 32, 64, 128), 4
MANY_LOADS: dict[str, dict[str, Any]] = {
    "msgpack-64": {"media": "msgpack", "items": 64},
    "json-64": {"media": "json", "items": 64},
    "msgpack-1": {"media": "msgpack"},
}
HALF_LOAD, BESIDE_LONG = "open-50", "open-50-long"
OPEN_LOADS = {HALF_LOAD: 50, "open-80": 80, BESIDE_LONG: 50}  # shares of the peak, in percent
LONG_STEPS = 10_000
FIRST_REPLY_WITHIN_S = 180.0
WORKER_CONNECTIONS = (8, 32, 128)
"""One of two workers gets all of the first two; of the last each gets half."""

HISTORY_EVENTS = (0, 64, 256)
HISTORY_FIELDS = {**BESIDE_FIELDS, "CPU of the store": "store_cpu_us_per_chunk"}
HISTORIES_READ = 8  # streams whose bytes are read

RACERS, RACES = 16, 20
LENGTHS = (1, 16, 128)
THREADS_UNITS, THREADS_BATCHES = (workloads.UNITS, 256, 1024), (1, 32)
MOST_ITEMS = 1000  # of one request, by Carry's default
OVERLOAD_QUEUE_WAIT_S, OVERLOAD_TIMES, OVERLOAD_PARTS = 0.5, 2.0, 6
OVERLOAD_STREAMS, OVERLOAD_STEPS, OVERLOAD_UNITS = 4096, 64, 256


def measure_servers(bench: Bench, _: str, *, section: str, steps: int) -> None:
    """Every server, on every runtime: closed loop, 32 connections and 1, interleaved."""
    carry, results = [f"carry-{each}" for each in bench.options.runtimes], bench.results
    rows: list[Row] = []
    reply_bytes = 0
    # Carry first, since the floor imitates its replies.
    for kind in [*carry, *BASELINES]:
        server = bench.start_server(kind, reply_bytes=reply_bytes)
        load = bench.prepare(server, kind, Bodies.random(steps))
        if kind in carry:
            reply_bytes = len(load.sampled[0])
        rows += [Row(f"{section}/{n}/{kind}", server, kind, n) for n in (CONNECTIONS, 1)]
    bench.measure_rounds(rows)
    measured = results.rows
    for kind in carry:
        ours = measured[f"{section}/{CONNECTIONS}/{kind}"]
        for other in BASELINES:
            theirs = measured[f"{section}/{CONNECTIONS}/{other}"]
            results.compare(f"{section}/{kind} over {other}", ours, theirs)
        alone = measured[f"{section}/1/{kind}"], measured[f"{section}/1/fastapi"]
        results.ratio(f"{section}/p50 at 1, {kind} over fastapi", *alone, "p50_ms")
        results.figure(f"{section}/{kind} MiB", [sample.memory_mib for sample in ours])


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
    flights, grpc_ports = workloads.flights_model(bench.artifact.path.parent), {}
    servers = []
    for name, checkout in (("this", None), ("other", other)):
        grpc_ports[name] = free_port()
        environment = {"CARRY_GRPC_PORT": str(grpc_ports[name])}
        options = {"models": flights.path.parent, "environment": environment}
        servers.append(bench.start_server(kind, name=name, checkout=checkout, **options))
    for load in bench.options.loads:
        for server in servers:
            options, bodies = {"media": load, "grpc_port": grpc_ports[server.name]}, bench.bodies
            if load == "events":
                server, bodies = (
                    replace(server, artifact=flights),
                    workloads.flights_bodies(flights),
                )
                options = {"tolerance": workloads.TRAINED_TOLERANCE}
            bench.prepare(server, f"{load}-{server.name}", bodies, **options)
        for count in BESIDE_CONNECTIONS:
            keys = [(s, f"{load}-{s.name}") for s in servers]
            rows = [Row(f"beside/{load} {count}/{s.name}", s, key, count) for s, key in keys]
            pairs = [*zip(*bench.measure_rounds(rows), strict=True)]
            for shown, of in BESIDE_FIELDS.items():
                middle, error = geometric_mean([getattr(a, of) / getattr(b, of) for a, b in pairs])
                spread = [middle / (1 + error), middle, middle * (1 + error)]
                results.figure(f"beside/{load} {count}: {shown}, this over the other", spread)


def measure_cost(bench: Bench, kind: str) -> None:
    """Python calls, allocations and instructions of a chunk, which no noise touches; with
    `--beside` also those of the other checkout."""
    runtime, results = kind.removeprefix("carry-"), bench.results
    runs = {"calls, allocations": (COUNTED_WINDOWS, COUNTED_CHUNKS)}
    if not bench.options.instructions or shutil.which("valgrind") is None:
        bench.note("cost: instructions are not counted (--no-instructions, or no valgrind)")
    else:
        runs["instructions"] = (8, 8)
    for what, (windows, chunks) in runs.items():
        costs: list[dict[str, float]] = []
        for checkout in filter(None, (REPOSITORY, bench.options.beside)):
            print(f"counting {what} of {checkout.name}")
            folder = bench.folder / f"{what.split()[-1]}-{len(costs)}"
            folder.mkdir()
            options = {"instructions": what == "instructions", "checkout": checkout}
            server = counted_server(folder, bench.artifact, bench.store.url, runtime, **options)
            with server as counted:
                costs.append(counted.measure_all(windows, chunks))
        this, *others = costs
        for name, count in this.items():
            results.figure(f"cost/{runtime} {name}", [count])
            for other in others:
                results.figure(f"cost/{runtime} {name}: this over the other", [count / other[name]])


def measure_many(bench: Bench, kind: str) -> None:
    """Requests for many streams, 64 chunks of 16 events each, against the compute alone."""
    results, server = bench.results, bench.start_server(kind)
    runtime, process = kind.removeprefix("carry-"), bench.start(helper_process(bench.cores.servers))
    rows, alone = [], []
    for load, options in MANY_LOADS.items():
        bench.prepare(server, load, **options)
        count = MANY_CONNECTIONS if "items" in options else CONNECTIONS
        rows.append(Row(f"many/{load}/{kind}", server, load, count))
    for _ in range(bench.options.rounds):
        arguments = workloads.measure_step, runtime, bench.artifact.path
        rates = [process.submit(*arguments, batch).result() for batch in BATCHES]
        alone.append(max(rate for rate in rates if rate is not None))
        for row in rows:
            bench.measure_closed(row)
    results.figure(f"many/compute alone {runtime}", [rate.chunks_per_s for rate in alone])
    for row in rows:
        shown = "" if row.key == "msgpack-64" else f" {row.key}"
        results.compare(f"many/{kind}{shown} over compute", results.rows[row.name], alone)


def measure_compute(bench: Bench, kind: str) -> None:
    """The runtime's own step by batch and events of a chunk, without a service."""
    runtime, process = kind.removeprefix("carry-"), bench.start(helper_process(bench.cores.servers))
    for batch, steps in product(BATCHES, LENGTHS):
        arguments = workloads.measure_step, runtime, bench.artifact.path, batch, steps
        rates = [process.submit(*arguments).result() for _ in range(bench.options.rounds)]
        if None not in rates:
            name = f"compute/{runtime} {batch} x {steps}, us CPU/chunk"
            bench.results.figure(name, [rate.cpu_us_per_chunk for rate in rates])


def measure_threads(bench: Bench, kind: str) -> None:
    """The runtime's own step on two threads over that on one, by units and batch, in turns."""
    runtime, cores = kind.removeprefix("carry-"), bench.cores.everything
    processes = {threads: bench.start(helper_process(cores)) for threads in (1, 2)}
    for units in THREADS_UNITS:
        path = workloads.standard_model(bench.folder / f"threads-{units}-{kind}", units).path
        for batch in THREADS_BATCHES:
            pairs = []
            for _ in range(bench.options.rounds):
                arguments = workloads.measure_step, runtime, path, batch, STEPS
                pairs.append([of.submit(*arguments, n).result() for n, of in processes.items()])
            name = f"threads/{runtime} {units} units, {batch} x {STEPS}: "
            for shown, of in (("chunks/s", "chunks_per_s"), ("CPU", "cpu_us_per_chunk")):
                ratios = [getattr(two, of) / getattr(one, of) for one, two in pairs]
                bench.results.figure(f"{name}{shown} of two over one", ratios)


def measure_latency(bench: Bench, kind: str) -> None:
    """Open loop at shares of the peak, alone and beside a stream of long chunks; and the echo at
    half of its own peak, whose tail the machine makes."""
    seconds, results = bench.options.seconds * 2, bench.results
    server, long_driver = bench.start_server(kind), bench.start(helper_process(bench.cores.others))
    echo = bench.start_server("fastapi")
    for each in (server, echo):
        bench.prepare(each, each.name)
    long_bodies = Bodies.random(LONG_STEPS, count=1)
    long_driver.submit(make_streams, "long", make_traffic(server.artifact, long_bodies, "long", 1))
    for seed in range(1, bench.options.rounds + 1):
        for each, loads in ((echo, [HALF_LOAD]), (server, OPEN_LOADS)):
            key = each.name
            bench.measure_closed(Row(f"latency/unloaded/{key}", each, key, 1))
            peak = bench.measure_closed(Row(f"latency/peak/{key}", each, key)).chunks_per_s
            for name in loads:
                rate = peak * OPEN_LOADS[name] / 100
                load = (run_open, key, each.port, rate, seconds, seed)
                if name == BESIDE_LONG:
                    long = long_driver.submit(run_closed, "long", server.port, 1, seconds)
                bench.measure(f"latency/{name}/{key}", each, partial(bench.run, *load))
        print(f"  {long.result().chunks} chunks of {LONG_STEPS} events beside it")

    def over_unloaded(key: str, percent: int) -> list[float]:
        names = (f"latency/open-{percent}/{key}", f"latency/unloaded/{key}")
        pairs = zip(*[results.rows[name][-bench.options.rounds :] for name in names], strict=True)
        ratios = [loaded.p99_ms / unloaded.p50_ms for loaded, unloaded in pairs]
        results.figure(f"latency/{key} p99 at {percent} % over unloaded p50", ratios)
        return ratios

    halves = zip(over_unloaded(kind, 50), over_unloaded("fastapi", 50), strict=True)
    name = f"latency/{kind} p99 at 50 % over unloaded p50, over the echo's"
    results.figure(name, [ours / theirs for ours, theirs in halves])
    over_unloaded(kind, 80)
    rows = [results.rows[f"latency/{name}/{kind}"] for name in (BESIDE_LONG, HALF_LOAD)]
    results.ratio(f"latency/{kind} p99 beside long chunks over without", *rows, "p99_ms")


def measure_cold_start(bench: Bench, kind: str) -> None:
    """From `carry serve` on an empty folder, its own store included, to the first answer."""
    starts = [_start_cold(bench, kind, f"cold-{n}") for n in range(bench.options.rounds)]
    for index, name in enumerate(("s", "MiB after the first answer")):
        bench.results.figure(f"cold/{kind} {name}", [start[index] for start in starts])


def _start_cold(bench: Bench, kind: str, name: str) -> tuple[float, float]:
    """Seconds to the whole first reply, and MiB without the embedded store."""
    spec = make_traffic(bench.artifact, bench.bodies, name, 1, is_sampled=True)
    traffic, port = Traffic(spec), free_port()
    request, ticket = traffic.request()
    pinned = pin_child(bench.cores.servers)
    service = Service(bench.folder, bench.artifact.path, "--port", str(port), prepare=pinned)
    shutil.rmtree(service.data_dir, ignore_errors=True)
    started_s = time.perf_counter()
    service.launch(CARRY_RUNTIME=kind.removeprefix("carry-"))
    try:
        # The port is bound before anything slow begins: the answer comes when it can.
        with closing(until(lambda: try_connect(port, FIRST_REPLY_WITHIN_S))) as connection:
            reply = connection.ask(request)
        seconds = time.perf_counter() - started_s
        mib = read_usage(service.process.pid).memory_bytes / MIB
    finally:
        service.stop()
    traffic.accept(ticket, reply)
    workloads.check_answers(bench.artifact, spec, bench.bodies.rows, traffic.sampled)
    print(f"  cold start of {kind}: {seconds:.2f} s, {mib:.0f} MiB")
    return seconds, mib


def measure_workers(bench: Bench, kind: str) -> None:
    """Two workers on all cores, shared with everything else, against one; then races.

    `at most` is what the cores allow, if a chunk costs with two what it costs with one: they also
    run the generator and the store.
    """
    everything, pinned, results = bench.cores.everything, bench.cores, bench.results
    bench.cores = Cores(everything, everything)
    bench.scope.callback(setattr, bench, "cores", pinned)
    one = bench.start_server(kind, name="1")
    two = bench.start_server(kind, workers=2, name="2")
    for server in (one, two):
        bench.prepare(server, server.name)
    loads = list(product(WORKER_CONNECTIONS, (two, one)))
    rows = [Row(f"workers/{n}-{s.name}/{kind}", s, s.name, n) for n, s in loads]
    measured = iter(bench.measure_rounds(rows))
    for count, ours, theirs in zip(WORKER_CONNECTIONS, measured, measured, strict=True):
        name = f"workers/{kind} 2 over 1, {count} connections"
        results.compare(name, ours, theirs)
        ceilings = [min(2.0, len(everything) * sample.server_share) for sample in theirs]
        results.figure(f"{name}, at most", ceilings)
    for name, server in ((kind, two), ("competent", bench.start_server("competent"))):
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
    artifact = workloads.flights_model(bench.folder / f"flights-{kind}")
    bodies = workloads.flights_bodies(artifact)
    server, rows = bench.start_server(kind, artifact), []
    for feed, blocks in (("events", bodies), ("inputs", replace(bodies, events=None))):
        bench.prepare(server, feed, blocks, tolerance=workloads.TRAINED_TOLERANCE)
        rows.append(Row(f"events/{feed}/{kind}", server, feed))
    measured = bench.measure_rounds(rows)
    bench.results.ratio(f"events/{kind} events over inputs", *measured, "chunks_per_s")


def measure_history(bench: Bench, kind: str) -> None:
    """Streams with a history beside those without one, on one store, by the events of a chunk, and
    what a full history takes in the store."""
    results, servers = bench.results, []
    for events in HISTORY_EVENTS:
        environment = {"CARRY_HISTORY_EVENTS": str(events)}
        servers.append(bench.start_server(kind, environment=environment, name=f"{events}"))
    for steps in (1, STEPS):
        rows = []
        for server in servers:
            bench.prepare(server, key := f"history-{steps}-{server.name}", Bodies.random(steps))
            rows.append(Row(f"history/{steps}/{server.name} events", server, key))
        without, *others = bench.measure_rounds(rows)
        for server, samples in zip(servers[1:], others, strict=True):
            name = f"history/{server.name} events over none, {steps} a chunk"
            pairs = [*zip(samples, without, strict=True)]
            for shown, of in HISTORY_FIELDS.items():
                middle, error = geometric_mean([getattr(a, of) / getattr(b, of) for a, b in pairs])
                spread = [middle / (1 + error), middle, middle * (1 + error)]
                results.figure(f"{name}: {shown}", spread)
        for server in servers[1:]:
            used = _measure_history_bytes(bench, server, steps)
            results.figure(f"history/bytes of {server.name} events, {steps} a chunk", used)


def _measure_history_bytes(bench: Bench, server: Server, steps: int) -> list[float]:
    """The bytes in the store of the histories of a few streams, which are full."""
    key = f"full-{steps}-{server.name}"
    bench.prepare(server, key, Bodies.random(steps), streams=HISTORIES_READ)
    used: list[float] = []
    with bench.store.client() as client:
        events = [*client.scan_iter(f"carry{{p*}}:h:bench:{key}*")]

        def are_full() -> bool:
            bench.run(run_closed, key, server.port, HISTORIES_READ, WARM_S)
            return all(client.llen(each) * steps >= int(server.name) for each in events)

        until(are_full, "full histories")
        for each in events:
            names = each, each.replace(b":h:", b":v:", 1)
            used.append(sum(client.memory_usage(name, samples=0) for name in names))
    return used


def measure_kinds(bench: Bench, kind: str) -> None:
    """Every kind of network in turns with the plain stacked LSTM of the same size, in one server;
    then each at one connection. `imported` is the plain one's graph, imported again."""
    results, folder = bench.results, bench.folder / f"kinds-{kind}"
    kinds = workloads.KINDS
    artifacts = {name: workloads.write_network(folder, name, kinds[name]) for name in kinds}
    graph = artifacts[PLAIN].path / GRAPH_NAME
    artifacts[IMPORTED] = import_here(graph, folder / IMPORTED, IMPORTED).artifact
    server = bench.start_server(kind, artifacts[PLAIN], models=folder)
    streams = min(bench.options.streams, MOST_ITEMS)
    rows = {}
    for name, artifact in artifacts.items():
        bench.prepare(replace(server, artifact=artifact), name, streams=streams)
        rows[name] = Row(f"kinds/{CONNECTIONS}/{name}/{kind}", server, name)
    for name, row in rows.items():
        if name != PLAIN:
            measured = bench.measure_rounds([row, rows[PLAIN]])
            results.compare(f"kinds/{kind} {name} over {PLAIN}", *measured)
        bench.measure_rounds([Row(f"kinds/1/{name}/{kind}", server, name, 1)])


def measure_overload(bench: Bench, kind: str) -> None:
    """Twice the peak on a service that rejects what would wait for longer than half a second.

    The peak is measured in a closed loop before and after, the overload in an open one. A rejected
    chunk must not have been applied: the stream's next one has the same position and other events,
    so that a wrong position ends the section, as does another status than 200 and 429.
    """
    results, model = (
        bench.results,
        workloads.standard_model(bench.folder / "overload", OVERLOAD_UNITS),
    )
    limits = {"CARRY_MAX_QUEUE_WAIT_S": str(OVERLOAD_QUEUE_WAIT_S)}
    # on a busy machine the turn of a connection comes late
    limits["CARRY_KEEP_ALIVE_S"] = "60"
    server = bench.start_server(kind, model, environment=limits)
    options: dict[str, Any] = {"media": "msgpack", "may_reject": True}
    bodies, key = Bodies.random(OVERLOAD_STEPS), "overload"
    bench.warm(server, key, make_traffic(model, bodies, key, OVERLOAD_STREAMS, **options))
    peak, over = (
        Row(f"overload/peak/{kind}", server, key, 2 * CONNECTIONS),
        f"overload/twice/{kind}",
    )
    rate_per_s = OVERLOAD_TIMES * bench.measure_closed(peak).chunks_per_s
    # each has one chunk in flight: more than the queue takes within its longest wait
    connections = int(min(OVERLOAD_STREAMS, max(1024, OVERLOAD_QUEUE_WAIT_S * rate_per_s)))
    loads = []
    for seed in range(OVERLOAD_PARTS):
        load = (key, server.port, rate_per_s, bench.options.seconds, seed, connections)
        loads.append(bench.measure(over, server, partial(bench.run, run_open, *load)))
    bench.measure_closed(peak)
    best = max(results.rows[peak.name])
    results.compare(f"overload/{kind} goodput over peak", results.rows[over], [best] * len(loads))
    p99_s = [float(np.percentile(load.latencies_s, 99)) for load in loads]
    results.figure(f"overload/{kind} p99 of accepted chunks, s", p99_s)
    rejected = [load.rejected / (load.rejected + load.chunks) for load in loads]
    results.figure(f"overload/{kind} rejected share", rejected)
    first, *_, last = results.rows[over]
    results.figure(f"overload/{kind} memory, last over first", [last.memory_mib / first.memory_mib])


IMPORTED = "imported"
BESIDE = "beside"  # the section of a run with `--beside`, which runs no other by default
SECTIONS: Mapping[str, Callable[[Bench, str], None]] = {
    "cost": measure_cost,
    "peak": partial(measure_servers, section="peak", steps=STEPS),
    "single": partial(measure_servers, section="single", steps=1),
    "many": measure_many,
    "compute": measure_compute,
    "threads": measure_threads,
    "detection": measure_detection,
    "backfill": measure_backfill,
    "latency": measure_latency,
    "cold": measure_cold_start,
    "workers": measure_workers,
    "events": measure_events,
    "history": measure_history,
    "shadow": measure_shadow,
    "kinds": measure_kinds,
    "overload": measure_overload,
    "consume": measure_consume,
    **{f"{CURVE}{name}": partial(measure_curve, name=name) for name in CURVES},
    "peer": measure_peer,
    BESIDE: measure_beside,
}
"""In the order in which they are run."""
ONCE = (
    "cost",
    "peak",
    "single",
    "threads",
    "detection",
    "backfill",
    "overload",
    "consume",
    "history",
    "shadow",
    "peer",
    BESIDE,
)
"""The sections, beside the curves, that are not run for each runtime."""


def run_section(bench: Bench, name: str) -> None:
    """Run a section for each runtime, or once for the last one, and end what it started."""
    is_once = name in ONCE or name.startswith(CURVE)
    for runtime in bench.options.runtimes[-1:] if is_once else bench.options.runtimes:
        with bench.scope:
            SECTIONS[name](bench, f"carry-{runtime}")
