"""Sections about other workloads than the standard one: requests, stores, feeds and networks."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import polars as pl

import models
from models.artifact.artifact import Artifact, load_artifact, write_artifact
from models.events.encode import Clock, encode
from models.events.frame import columns_from_frame
from models.examples.flights.data import flight_events
from service.core.values import StreamKey
from service.engine.runtimes.loading import open_runtime
from service.store.codec import encode_state
from service.store.settings import StoreSettings
from tests.bench.generator import HOST, Connection, Driver
from tests.bench.processes import helper_process
from tests.bench.results import FEW, Sample
from tests.bench.run import CONNECTIONS, Bench, Server, Store
from tests.bench.traffic import Media, Traffic, TrafficSpec
from tests.bench.workloads import (
    KINDS,
    PLAIN,
    STEPS,
    TRAINED_TOLERANCE,
    UNITS,
    Bodies,
    WrongOutputsError,
    check_answers,
    random_stream,
    standard_model,
    traffic_of,
    write_network,
)
from tests.support.machine import wait_until

ITEMS, MANY_CONNECTIONS = 64, 4
BATCHES = (1, 8, 32, 64, 128)
COMPUTE_S = 0.3
MANY_LOADS: dict[str, dict[str, Any]] = {
    "msgpack-64": {"media": "msgpack", "items": ITEMS},
    "json-64": {"media": "json", "items": ITEMS},
    "msgpack-1": {"media": "msgpack"},
}
CACHES = {"uncached": {"CARRY_STATE_CACHE_BYTES": "0"}, "cached": {}}
"""The two servers on each store; each has half of its streams, named by its own prefix."""

FILL_BATCH, DISTINCT_STATES = 2_000, 512
STATE_BYTES = (256, 512, 1024, 2048, 4096, 16384)
REWRITTEN_WITHIN_S = 600.0
STREAM_OF_FLIGHTS = "EWR-UA"
CUTS, LONGEST_STEPS = 64, 64
WIDTHS = (UNITS, 256)
LENGTHS = (1, 16, 128)
MEDIA: tuple[Media, ...] = ("json", "msgpack")
CHECKED_STREAMS, CHECKED_CHUNKS = 2, 8
MOST_ITEMS = 1000
"""Of one request, by Carry's default."""

PAIR_SHARE, ONE_SHARE = 0.5, 0.25
"""Of a round's time: a kind at all connections and the plain stack next to it, and at one."""

WATCHED_STREAMS = 8


class Rate(NamedTuple):
    """The compute of one batch size, without a service."""

    chunks_per_s: float
    cpu_us_per_chunk: float


def measure_many(bench: Bench) -> None:
    """Requests for many streams, 64 chunks of 16 events each, against the compute alone."""
    results = bench.results
    for kind in bench.carry_kinds():
        runtime = kind.removeprefix("carry-")
        path = str(bench.artifact.path)
        alone: list[dict[int, Rate]] = []
        with (
            helper_process(bench.cores.servers, _open_compute, runtime, path) as compute,
            bench.carry(kind) as (store, driver, server),
        ):
            for load, options in MANY_LOADS.items():
                bench.prepare(driver, f"{kind}/{load}", server, bench.bodies, **options)
            for _ in range(bench.options.rounds):
                alone.append(compute.submit(_measure_compute, STEPS, BATCHES, COMPUTE_S).result())
                for load, options in MANY_LOADS.items():
                    connections = MANY_CONNECTIONS if options.get("items") else CONNECTIONS
                    key = f"{kind}/{load}"
                    bench.closed(f"many/{load}/{kind}", driver, key, server, store, connections)
        for batch in alone[0]:
            name = f"many/compute alone {runtime} batch {batch}, chunks/s"
            results.figure(name, [rates[batch].chunks_per_s for rates in alone])
        best = [max(rate.chunks_per_s for rate in rates.values()) for rates in alone]
        least_us = [min(rate.cpu_us_per_chunk for rate in rates.values()) for rates in alone]
        for load in MANY_LOADS:
            row, shown = f"many/{load}/{kind}", "" if load == "msgpack-64" else f" {load}"
            name = f"many/{kind}{shown} over compute"
            results.ratios(name, results.values(row, "chunks_per_s"), best)
            results.ratios(f"{name}, by CPU", least_us, results.values(row, "cpu_us_per_chunk"))


_opened: list[Any] = []
"""The artifact and the warm runtime of the helper process."""


def _open_compute(name: str, path: str) -> None:
    artifact = load_artifact(Path(path))
    runtime = open_runtime(name, artifact, 1)
    runtime.warm()
    while runtime.warm_next():
        pass
    _opened[:] = artifact, runtime


def _measure_compute(steps: int, batches: Sequence[int], seconds: float) -> dict[int, Rate]:
    """Steps of the runtime itself on random rows and states, at each batch that it takes."""
    (artifact, runtime), rates = _opened, {}
    random = np.random.default_rng(1)
    for batch in batches:
        if batch > runtime.max_batch:
            continue
        padded, length = runtime.padded_shape(batch, steps)
        rows = random.normal(size=(padded, length, artifact.spec.input_features))
        states = random.uniform(-1, 1, (padded, artifact.state.float_size)).astype(np.float32)
        arguments = (rows.astype(np.float32), np.full(padded, steps, np.int32), states)
        runtime.step(*arguments)
        calls, started_s, cpu_before_s = 0, time.perf_counter(), time.process_time()
        while (passed_s := time.perf_counter() - started_s) < seconds or not calls:
            runtime.step(*arguments)
            calls += 1
        cpu_s = time.process_time() - cpu_before_s
        rates[batch] = Rate(calls * batch / passed_s, cpu_s / (calls * batch) * 1e6)
    return rates


def measure_streams(bench: Bench) -> None:
    """Few and very many streams in the store, cached or not, and the bytes of each."""
    many, results = bench.options.many_streams, bench.results
    for kind in bench.carry_kinds()[-1:]:
        with bench.driver() as driver, ExitStack() as stack:
            servers = {}
            for count in (FEW, many):
                store = stack.enter_context(bench.store())
                bench.say(f"filling a store with {count:,} streams")
                for cache, environment in CACHES.items():
                    spec = bench.bodies.traffic(cache, count // 2, position=STEPS)
                    fill_store(store, spec, bench.artifact)
                    key = f"{count}-{cache}"
                    server = stack.enter_context(
                        bench.server(kind, store, environment=environment, name=key)
                    )
                    servers[key] = (server, store)
                    bench.warm(driver, key, server, spec)
                _rewrite_file(store)
            for _ in range(bench.options.rounds):
                for key, (server, store) in servers.items():
                    bench.closed(f"streams/{key}/{kind}", driver, key, server, store)
            measure_bytes_per_stream(bench, store)
        for name, above, below in (
            (f"{many} over {FEW}", f"{many}-uncached", f"{FEW}-uncached"),
            (f"{FEW}, cache on over off", f"{FEW}-cached", f"{FEW}-uncached"),
            (f"{many}, cache on over off", f"{many}-cached", f"{many}-uncached"),
        ):
            results.ratio(f"streams/{name}", f"streams/{above}/{kind}", f"streams/{below}/{kind}")


def fill_store(store: Store, spec: TrafficSpec, artifact: Artifact) -> None:
    """Write every stream of a spec as the service would have left it after a first chunk."""
    size, fingerprint = artifact.state.float_size, artifact.fingerprint
    values = [
        encode_state(random_stream(seed, size, fingerprint)) for seed in range(DISTINCT_STATES)
    ]
    with store.client() as client:
        for start in range(0, spec.streams, FILL_BATCH):
            streams = range(start, min(spec.streams, start + FILL_BATCH))
            names = {stream: _state_key(spec.name(stream).decode()) for stream in streams}
            client.mset({name: values[at % DISTINCT_STATES] for at, name in names.items()})


def _state_key(stream: str) -> Any:
    return StoreSettings("unix:///nowhere").keys.state(StreamKey("bench", stream))


def _rewrite_file(store: Store) -> None:
    """Let the server rewrite its file now, so that it does not while it is measured."""
    with store.client() as client:

        def is_done() -> bool:
            info = client.info("persistence")
            return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]

        # It may have started one by itself.
        wait_until(is_done, "the end of the file's rewriting", REWRITTEN_WITHIN_S)
        client.bgrewriteaof()
        wait_until(is_done, "the end of the file's rewriting", REWRITTEN_WITHIN_S)


def measure_bytes_per_stream(bench: Bench, store: Store) -> None:
    """The memory of streams of several sizes in the store, without their replies."""
    shares = []
    with store.client() as client:
        for raw in STATE_BYTES:
            key = _state_key(f"size-{raw:07d}")
            stream = random_stream(raw, raw // 4, bench.artifact.fingerprint)
            client.set(key, encode_state(stream))
            used = client.memory_usage(key, samples=0)
            client.delete(key)
            bench.results.figure(f"streams/bytes of a stream with {raw} bytes of state", [used])
            shares.append(used / (1.25 * raw + 200))
    bench.results.figure("streams/bytes over bound", [max(shares)])


def measure_events(bench: Bench) -> None:
    """The flights model fed by `events` and by the rows its encoder makes of them, ragged."""
    artifact = flights_model(bench.folder)
    bodies = ragged_flights(artifact)
    feeds = {"events": bodies, "inputs": replace(bodies, events=None)}
    for kind in bench.carry_kinds(artifact):
        with bench.carry(kind, artifact) as (store, driver, server):
            options = {"artifact": artifact, "tolerance": TRAINED_TOLERANCE, "model": "flights"}
            for feed, blocks in feeds.items():
                bench.prepare(driver, feed, server, blocks, **options)
            for _ in range(bench.options.rounds):
                for feed in feeds:
                    bench.closed(f"events/{feed}/{kind}", driver, feed, server, store)
        name = f"events/{kind} events over inputs"
        bench.results.ratio(name, f"events/events/{kind}", f"events/inputs/{kind}")


def flights_model(folder: Path) -> Artifact:
    """The pretrained model, packaged again so that it has a graph for every runtime."""
    shipped = load_artifact(Path(models.__file__).parent / "pretrained" / "flights")
    return write_artifact(folder / "models-flights" / "flights", shipped.spec, shipped.weights)


def ragged_flights(artifact: Artifact) -> Bodies:
    """Consecutive real departures in chunks of 1 to 64, both as events and as rows."""
    schema = artifact.spec.events
    assert schema is not None
    cuts = np.random.default_rng(1).integers(1, LONGEST_STEPS, CUTS, endpoint=True)
    ends = np.cumsum(cuts)
    frame = flight_events().filter(pl.col("stream") == STREAM_OF_FLIGHTS).head(int(ends[-1]))
    rows, _ = encode(schema, columns_from_frame(schema, frame), Clock())
    wire = frame.select(
        pl.col(field.name).dt.epoch("ms") if field.kind == "timestamp" else pl.col(field.name)
        for field in schema.fields
    ).to_dicts()
    events = [{name: value for name, value in event.items() if value is not None} for event in wire]
    slices = [slice(end - cut, end) for cut, end in zip(cuts.tolist(), ends.tolist(), strict=True)]
    written = tuple(orjson.dumps(events[cut]) for cut in slices)
    return Bodies(tuple(rows[cut] for cut in slices), written)


def measure_widths(bench: Bench) -> None:
    """Chunks of 1, 16 and 128 events, networks of width 64 and 256, JSON and MessagePack."""
    loads = [(steps, media) for steps in LENGTHS for media in MEDIA]
    for units in WIDTHS:
        artifact = bench.artifact
        if units != UNITS:
            artifact = standard_model(bench.folder / f"models-{units}", units)
        for kind in bench.carry_kinds(artifact):
            with bench.carry(kind, artifact) as (store, driver, server):
                for steps, media in loads:
                    key, bodies = f"T{steps}-{media}", Bodies.random(steps)
                    bench.prepare(driver, key, server, bodies, artifact=artifact, media=media)
                for _ in range(bench.options.rounds):
                    for steps, media in loads:
                        key = f"T{steps}-{media}"
                        row = f"widths/{units}-{key}/{kind}"
                        bench.closed(row, driver, key, server, store)


def measure_kinds(bench: Bench) -> None:
    """Every kind of network beside the plain stacked LSTM of the same size, all in one server.

    Right before or after a kind the plain stack is measured for the same time; a ratio is of such
    a pair.
    """
    folder = bench.folder / "models-kinds"
    artifacts = {name: write_network(folder, name, network) for name, network in KINDS.items()}
    for kind in bench.carry_kinds(artifacts[PLAIN]):
        with bench.carry(kind, artifacts[PLAIN], models=folder) as (store, driver, server):
            specs = {
                name: _prepare_kind(bench, driver, server, artifact)
                for name, artifact in artifacts.items()
            }
            etags = {name: _read_etags(server, spec) for name, spec in specs.items()}
            _measure_pairs(bench, kind, server, store, driver)
            for name, spec in specs.items():
                if _read_etags(server, spec) != etags[name]:
                    raise WrongOutputsError(f"{name}: forecasts changed their streams")


def _measure_pairs(bench: Bench, kind: str, server: Server, store: Store, driver: Driver) -> None:
    """In each round every other kind and the plain stack in pairs, and each at one connection."""

    def load(name: str, connections: int, share: float) -> Sample:
        row = f"kinds/{connections}/{name}/{kind}"
        bench.closed(row, driver, name, server, store, connections, share)
        return bench.results.rows[row][-1]

    pairs: dict[str, list[tuple[Sample, Sample]]] = {name: [] for name in KINDS if name != PLAIN}
    for turn in range(bench.options.rounds):
        load(PLAIN, 1, ONE_SHARE)
        for name, measured in pairs.items():
            order = (name, PLAIN) if turn % 2 else (PLAIN, name)
            samples = {one: load(one, CONNECTIONS, PAIR_SHARE) for one in order}
            measured.append((samples[name], samples[PLAIN]))
            load(name, 1, ONE_SHARE)
    for name, measured in pairs.items():
        title = f"kinds/{kind} {name} over {PLAIN}"
        rates = [one.chunks_per_s / plain.chunks_per_s for one, plain in measured]
        bench.results.figure(title, rates)
        cpu = [plain.cpu_us_per_chunk / one.cpu_us_per_chunk for one, plain in measured]
        bench.results.figure(f"{title}, by CPU", cpu)


def _prepare_kind(bench: Bench, driver: Driver, server: Server, artifact: Artifact) -> TrafficSpec:
    """Check a kind's answers to a few streams in full batches, then warm up those measured."""
    name = artifact.spec.name
    checked = traffic_of(artifact, bench.bodies, "checked", CONNECTIONS, CHECKED_STREAMS)
    _begin_streams(bench, server, artifact, checked)
    driver.traffic(name, checked)
    load = driver.closed(name, server.port, CONNECTIONS, 0.0, CHECKED_CHUNKS)
    if not check_answers(artifact, checked, bench.bodies.rows, load.sampled):
        raise WrongOutputsError(f"{name}: expected outputs to check, got none")
    streams = bench.options.streams
    if artifact.spec.decoder is not None:
        streams = min(streams, MOST_ITEMS)
    measured = traffic_of(artifact, bench.bodies, name, streams)
    _begin_streams(bench, server, artifact, measured)
    bench.warm(driver, name, server, measured)
    return measured


def _begin_streams(bench: Bench, server: Server, artifact: Artifact, spec: TrafficSpec) -> None:
    """Give each stream that will be forecast its one chunk, all in one request."""
    if spec.moves:
        return
    model, count = artifact.spec.name, spec.streams
    traffic = Traffic(bench.bodies.traffic(spec.prefix, count, model=model, items=count))
    connection = Connection(server.port)
    with connection.sock as sock:
        request, ticket = traffic.request()
        sock.sendall(request)
        while (reply := connection.receive()) is None:
            pass
    traffic.accept(ticket, *reply)


def _read_etags(server: Server, spec: TrafficSpec) -> list[str]:
    """The ETags of some streams that requests do not change."""
    etags: list[str] = []
    if not spec.moves:
        path = spec.path.removesuffix(b"/forecast")
        for stream in range(min(WATCHED_STREAMS, spec.streams)):
            url = f"http://{HOST}:{server.port}" + (path % spec.name(stream)).decode()
            with urllib.request.urlopen(url, timeout=10) as reply:
                etags.append(reply.headers["ETag"])
    return etags
