"""How the cost of a chunk grows: with its events, the network, streams, models, connections, media
and workers.

Each curve is a section `curve-NAME` with rows `curve-NAME/X/SERVER`: Carry, and where it makes
sense the bare FastAPI route (`fastapi`) with replies of the same size. The compute alone, the
runtime's step for 32 streams without a service, is a figure `curve-NAME/X/compute`. Everything is
measured in every round, all of a point one after another. `pictures.py` draws the curves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import redis

from models.artifact.artifact import Artifact
from service.core.values import Feed, StreamKey
from service.store.codec import encode_state
from service.store.settings import StoreSettings
from tests.bench import workloads
from tests.bench.generator import Load
from tests.bench.results import Sample
from tests.bench.run import CONNECTIONS, Bench, Row, Server, helper_process
from tests.bench.traffic import Media, TrafficSpec
from tests.bench.workloads import (
    FEW,
    KINDS,
    PLAIN,
    STEPS,
    UNITS,
    Bodies,
    make_traffic,
    write_network,
)
from tests.support.forks import COMMAND
from tests.support.machine import Cores, pin_child, pin_process
from tests.support.servers import RealServer, free_port, until
from tests.support.streams import Streams

CURVE = "curve-"  # begins the names of the sections
LENGTHS = (1, 4, 16, 64, 256, 1000)
WIDTHS = (32, 64, 128, 256, 512, 1024)
DEPTHS = (1, 2, 3, 4)
MODELS = (1, 10, 100)
CONNECTION_COUNTS = (1, 4, 16, 64, 256, 1000)
MEDIA: tuple[Media, ...] = ("json", "msgpack", "v2", "perf", "grpc", "websocket")
HTTP_MEDIA = MEDIA[:4]  # those that the bare route takes
WORKERS, OWNERS = (1, 2, 4, 8), ("any", "own")
ESTIMATED_CORES = 16
"""Of the machine whose rate is estimated."""

CACHES = {"cold": {"CARRY_STATE_CACHE_BYTES": "0"}, "warm": {}}
"""Each has half of the streams of a store. Chunks of `cold` come from all of them, and each loads
its state from the store; those of `warm` come from a thousand, whose states are cached."""

MOST_COLD = 100_000
"""Streams that chunks come from, at most: more than the rounds reach."""

FILL_BATCH, SCATTER = 2_000, 15_485_863
"""Streams are written in the order of the multiples of a prime, so that those that chunks come from
are not neighbours in the store's memory."""

STATE_BYTES = (256, 512, 1024, 2048, 4096, 16384)


class Point(NamedTuple):
    """What is measured at one place of a curve."""

    x: str
    rows: Sequence[Row]
    compute: tuple[Path, int] | None = None
    """The artifact and the events of a chunk of the compute alone; None: not measured."""


@dataclass
class Curve:
    """The points of a curve, and the bare routes beside them, by the size of their replies."""

    bench: Bench
    kind: str
    name: str
    points: list[Point] = field(default_factory=list)
    floors: dict[int, Server] = field(default_factory=dict)

    def start(self, artifact: Artifact | None = None, **options: Any) -> Server:
        """Carry, with options of `Bench.start_server`."""
        return self.bench.start_server(self.kind, artifact, **options)

    def add(
        self,
        server: Server,
        x: str,
        bodies: Bodies | None = None,
        *,
        connections: int = CONNECTIONS,
        has_floor: bool = True,
        has_compute: bool = False,
        **options: Any,
    ) -> None:
        """Add a point: a server under chunks of its own streams, warmed up, its outputs checked.

        Args:
            has_floor: whether the bare route is measured beside it.
            has_compute: whether the compute alone is.
            options: as of `Bench.prepare`.
        """
        bodies = bodies or self.bench.bodies
        load = self.bench.prepare(server, x, bodies, **options)
        rows = [Row(server.name, server, x, connections)]
        if has_floor:
            floor, key = self._floor(len(load.sampled[0])), f"{x}-floor"
            self.bench.prepare(floor, key, bodies, **options)
            rows.append(Row(floor.name, floor, key, connections))
        compute = (server.artifact.path, len(bodies.rows[0])) if has_compute else None
        self.points.append(Point(x, rows, compute))

    def _floor(self, reply_bytes: int) -> Server:
        """The bare route with replies of this size, to the next hundred bytes."""
        size = round(reply_bytes, -2)
        if size not in self.floors:
            self.floors[size] = self.bench.start_server("fastapi", reply_bytes=size)
        return self.floors[size]

    def measure(self) -> None:
        """Measure every point in every round; keep the compute alone as figures."""
        process = self.bench.start(helper_process(self.bench.cores.servers))
        step = (workloads.measure_step, self.kind.removeprefix("carry-"))
        alone: dict[str, list[float]] = {}
        for _ in range(self.bench.options.rounds):
            for x, rows, compute in self.points:
                for row in rows:
                    self.bench.measure_closed(row._replace(name=f"{self.name}/{x}/{row.name}"))
                if compute is not None:
                    path, steps = compute
                    rate = process.submit(*step, path, CONNECTIONS, steps).result()
                    alone.setdefault(f"{self.name}/{x}/compute", []).append(rate.cpu_us_per_chunk)
        for name, values in alone.items():
            self.bench.results.figure(name, values)

    def samples(self, x: object, server: str) -> list[Sample]:
        """The rounds of a row."""
        return self.bench.results.rows[f"{self.name}/{x}/{server}"]


def measure_steps(curve: Curve) -> None:
    """Events of a chunk."""
    server = curve.start()
    for steps in LENGTHS:
        curve.add(server, str(steps), Bodies.random(steps), has_compute=True)
    curve.measure()


def measure_networks(curve: Curve, *, networks: Mapping[int, Mapping[str, Any]]) -> None:
    """Networks by what the curve varies, a server each."""
    for x, network in networks.items():
        artifact = write_network(curve.bench.folder / f"{curve.name}-{x}", "bench", network)
        curve.add(curve.start(artifact), str(x), has_compute=True)
    curve.measure()


def measure_streams(curve: Curve) -> None:
    """Streams in the store, a store each, and the bytes of a stream."""
    bench, results = curve.bench, curve.bench.results
    counts = [10**n for n in range(3, 9) if 10**n <= bench.options.many_streams]
    state = _random_state(bench.artifact.state.float_size, bench.artifact)
    for count in counts:
        # the file is not rewritten while it is measured
        store, rows = bench.start_store("--auto-aof-rewrite-percentage", "0"), []
        for name, environment in CACHES.items():
            server = curve.start(store=store, environment=environment, name=name)
            reached = min(count // 2, MOST_COLD if name == "cold" else FEW)
            spec = make_traffic(bench.artifact, bench.bodies, name, reached, position=STEPS)
            pin_process(bench.cores.everything)  # or it would share the store's core
            fill(store, spec, count // 2, state)
            pin_process(bench.cores.others)
            bench.warm(server, key := f"{count}-{name}", spec)
            rows.append(Row(name, server, key))
        curve.points.append(Point(str(count), rows))
    curve.measure()
    for count, name in product(counts[1:], CACHES):
        few = curve.samples(counts[0], name)
        results.compare(f"{curve.name}/{count} over {FEW}, {name}", curve.samples(count, name), few)
    shares = []
    with bench.store.client() as client:
        for raw in STATE_BYTES:
            key = _state_key(f"size-{raw}")
            client.set(key, _random_state(raw // 4, bench.artifact))
            used = client.memory_usage(key, samples=0)
            results.figure(f"{curve.name}/bytes of a stream with {raw} bytes of state", [used])
            shares.append(used / (1.25 * raw + 200))
    results.figure(f"{curve.name}/bytes over bound", [max(shares)])


def fill(store: RealServer, spec: TrafficSpec, count: int, state: bytes) -> None:
    """Write the states of so many streams into a store."""
    print(f"filling a store with {count:,} streams")
    with store.client() as client:
        for first in range(0, count, FILL_BATCH):
            numbers = range(first, min(first + FILL_BATCH, count))
            names = (spec.name(number * SCATTER % count) for number in numbers)
            client.mset(dict.fromkeys(map(_state_key, names), state))


def _random_state(floats: int, artifact: Artifact) -> bytes:
    """A stream as the service leaves it after a first chunk."""
    streams = Streams()
    stream = streams.after(streams.begin(floats=floats, ints=0), STEPS)
    return encode_state(stream._replace(fingerprint=artifact.fingerprint, feed=Feed.INPUTS))


_KEYS = StoreSettings("unix:///nowhere").keys


def _state_key(stream: str) -> Any:
    return _KEYS.state(StreamKey("bench", stream))


def measure_models(curve: Curve) -> None:
    """Models of one server, over which the same number of streams is spread."""
    for count in MODELS:
        folder = curve.bench.folder / f"{curve.name}-{count}"
        models = [write_network(folder, f"bench-{n}", KINDS[PLAIN]) for n in range(count)]
        curve.add(curve.start(models[0], models=folder), str(count), models=count)
    curve.measure()


def measure_connections(curve: Curve) -> None:
    """Connections, each with a chunk in flight."""
    server, streams = curve.start(), max(curve.bench.options.streams, *CONNECTION_COUNTS)
    for count in CONNECTION_COUNTS:
        curve.add(server, str(count), connections=count, streams=streams)
    curve.measure()


def measure_media(curve: Curve) -> None:
    """Protocols and encodings; after them, events of a topic."""
    port = free_port()
    server = curve.start(environment={"CARRY_GRPC_PORT": str(port)})
    for media in MEDIA:
        curve.add(server, media, has_floor=media in HTTP_MEDIA, media=media, grpc_port=port)
    curve.measure()
    rows = {media: curve.samples(media, server.name) for media in MEDIA}
    for media in MEDIA[1:]:
        of = f"{curve.name}/CPU of a chunk, {media} over json"
        curve.bench.results.ratio(of, rows[media], rows["json"], "cpu_us_per_chunk")
    measure_topic(curve)


def measure_topic(curve: Curve) -> None:
    """Events of a topic as `carry consume` computes them: a thousand streams with a chunk each."""
    bench, log = curve.bench, curve.bench.folder / "consumer.log"
    command = [COMMAND, "consume", "--from", "in", "--to", "out", "--model", "bench", "--create"]
    command += ["--redis-url", bench.store.url, "--models", str(bench.artifact.path)]
    print("starting carry consume")
    with log.open("wb") as output:
        environment = {**os.environ, "CARRY_RUNTIME": curve.kind.removeprefix("carry-")}
        prepare = pin_child(bench.cores.servers)
        consumer = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, preexec_fn=prepare
        )
    bench.start(consumer)
    bench.scope.callback(consumer.terminate)
    server = Server(curve.kind, 0, consumer.pid, bench.artifact, bench.store)
    with bench.store.client() as client:
        run = partial(_consume, client, consumer, bench.bodies)
        run()  # warms up
        for _ in range(bench.options.rounds):
            bench.measure(f"{curve.name}/topic/{curve.kind}", server, run)


def _consume(client: redis.Redis, consumer: subprocess.Popen[bytes], bodies: Bodies) -> Load:
    """Let a consumer compute entries that were written while it was stopped. The 16 of a stream are
    neighbours; their latencies are not measured."""
    outputs = client.xlen("out") + FEW * STEPS
    consumer.send_signal(signal.SIGSTOP)
    for number in range(FEW):
        entries = client.pipeline(transaction=False)
        for row in bodies.rows[number % len(bodies.rows)]:
            entries.xadd("in", {"stream": f"topic-{number}", "event": orjson.dumps(row.tolist())})
        entries.execute()
    started_s = time.perf_counter()
    consumer.send_signal(signal.SIGCONT)
    until(lambda: consumer.poll() is not None or client.xlen("out") >= outputs, "outputs", 60)
    assert consumer.poll() is None, "carry consume ended"
    passed_s = time.perf_counter() - started_s
    return Load(passed_s, np.full(1, np.nan), FEW, FEW * STEPS, 0.0)


def measure_workers(curve: Curve) -> None:
    """Workers on all cores, shared with everything else, with 32 connections each.

    Each connection sends the chunks of any stream (`any`), whose last chunk another worker may have
    applied, or of a stream of its own (`own`).
    """
    bench, results = curve.bench, curve.bench.results
    pinned, everything = bench.cores, bench.cores.everything
    bench.cores = Cores(everything, everything)
    bench.scope.callback(setattr, bench, "cores", pinned)
    for count in WORKERS:
        server, connections, rows = curve.start(workers=count), count * CONNECTIONS, []
        for name in OWNERS:
            key, streams = f"{count}-{name}", max(connections, bench.options.streams)
            bench.prepare(server, key, streams=streams, is_sticky=name == "own")
            rows.append(Row(name, server, key, connections))
        curve.points.append(Point(str(count), rows))
    curve.measure()
    for name in OWNERS:
        one, *_, most = (curve.samples(count, name) for count in WORKERS)
        for count in WORKERS[1:]:
            of = f"{curve.name}/CPU of a chunk, {count} workers over 1, {name}"
            results.ratio(of, curve.samples(count, name), one, "cpu_us_per_chunk")
        cpu_us = [each.cpu_us_per_chunk + each.store_cpu_us_per_chunk for each in most]
        of = f"{curve.name}/{ESTIMATED_CORES} cores, estimated chunks/s, {name}"
        results.figure(of, [ESTIMATED_CORES / us * 1e6 for us in cpu_us])
        of = f"{curve.name}/chunks/s that fill the core of one store, {name}"
        results.figure(of, [1e6 / each.store_cpu_us_per_chunk for each in most])


def _stack(units: int = UNITS, layers: int = 2) -> dict[str, Any]:
    return {"layers": [{"kind": "lstm", "units": units}] * layers}


CURVES: Mapping[str, Callable[[Curve], None]] = {
    "steps": measure_steps,
    "units": partial(measure_networks, networks={n: _stack(units=n) for n in WIDTHS}),
    "layers": partial(measure_networks, networks={n: _stack(layers=n) for n in DEPTHS}),
    "streams": measure_streams,
    "models": measure_models,
    "connections": measure_connections,
    "media": measure_media,
    "workers": measure_workers,
}


def measure_curve(bench: Bench, kind: str, *, name: str) -> None:
    """Measure one of the curves as the section `curve-NAME`."""
    CURVES[name](Curve(bench, kind, f"{CURVE}{name}"))
