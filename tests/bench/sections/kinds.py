"""Every kind of network beside the plain stacked LSTM of the same size, all in one server.

So each is measured in the same process, beside the same models that have nothing to do. Right
before or after a kind the plain stack is measured for the same time; a ratio is of such a pair.
"""

from __future__ import annotations

import urllib.request

from models.artifact.artifact import Artifact
from tests.bench.context import CONNECTIONS, Bench
from tests.bench.generator import HOST, Connection
from tests.bench.kinds import PLAIN, judge, traffic_of, write_kinds
from tests.bench.networks import WrongOutputsError
from tests.bench.remote import Driver
from tests.bench.results import Sample
from tests.bench.servers import Server, Store
from tests.bench.traffic import Traffic, TrafficSpec

JUDGED_STREAMS, JUDGED_CHUNKS = 2, 8
"""How many streams of a kind are judged, and the chunks that each has at least by then."""

MOST_ITEMS = 1000
"""Of one request, by Carry's default."""

PAIR_SHARE, ONE_SHARE = 0.5, 0.25
"""Of a round's time: a kind at all connections and the plain stack next to it, and at one."""

WATCHED_STREAMS = 8


def run(bench: Bench) -> None:
    """For each runtime one server with every kind; in each round, the kinds one after another."""
    folder = bench.folder / "models-kinds"
    artifacts = write_kinds(folder)
    for kind in bench.carry_kinds(artifacts[PLAIN]):
        with (
            bench.store() as store,
            bench.drivers() as [driver],
            bench.server(kind, store, artifacts[PLAIN], models=folder) as server,
        ):
            specs = {
                name: _ready(bench, driver, server, artifact)
                for name, artifact in artifacts.items()
            }
            standing = {name: _standing(server, spec) for name, spec in specs.items()}
            others = [name for name in artifacts if name != PLAIN]
            _measure(bench, kind, server, store, driver, others)
            for name, spec in specs.items():
                if _standing(server, spec) != standing[name]:
                    raise WrongOutputsError(f"{name}: streams were moved by forecasts")


def _measure(
    bench: Bench, kind: str, server: Server, store: Store, driver: Driver, others: list[str]
) -> None:
    """In each round every other kind and the plain stack in pairs, and each at one connection."""

    def load(name: str, connections: int, share: float) -> Sample:
        row = f"kinds/{connections}/{name}/{kind}"
        bench.closed(row, driver, name, server, store, connections, share)
        return bench.results.rows[row].samples[-1]

    rates: dict[str, list[float]] = {name: [] for name in others}
    cpu: dict[str, list[float]] = {name: [] for name in others}
    for turn in range(bench.options.rounds):
        load(PLAIN, 1, ONE_SHARE)
        for name in others:
            pair = (name, PLAIN) if turn % 2 else (PLAIN, name)
            found = {one: load(one, CONNECTIONS, PAIR_SHARE) for one in pair}
            ours, plain = found[name], found[PLAIN]
            rates[name].append(ours.chunks_per_s / plain.chunks_per_s)
            cpu[name].append(plain.cpu_us_per_chunk / ours.cpu_us_per_chunk)
            load(name, 1, ONE_SHARE)
    for name in others:
        bench.results.figure(f"kinds/{kind} {name} over {PLAIN}", rates[name])
        bench.results.figure(f"kinds/{kind} {name} over {PLAIN}, by CPU", cpu[name])


def _ready(bench: Bench, driver: Driver, server: Server, artifact: Artifact) -> TrafficSpec:
    """Judge what a kind answers to a few streams in full batches, then warm up those measured."""
    name = artifact.spec.name
    judged = traffic_of(artifact, bench.bodies, "judged", CONNECTIONS, JUDGED_STREAMS)
    _begin(bench, server, artifact, judged)
    driver.traffic(name, judged)
    load = driver.closed(name, server.port, CONNECTIONS, 0.0, JUDGED_CHUNKS)
    if not judge(artifact, judged, bench.bodies, load.kept):
        raise WrongOutputsError(f"{name}: expected outputs to judge, got none")
    streams = bench.options.streams
    if artifact.spec.decoder is not None:
        streams = min(streams, MOST_ITEMS)
    measured = traffic_of(artifact, bench.bodies, name, streams)
    _begin(bench, server, artifact, measured)
    bench.warmed(driver, name, server, measured)
    return measured


def _begin(bench: Bench, server: Server, artifact: Artifact, spec: TrafficSpec) -> None:
    """Give each stream that will be forecast its one chunk, all in one request."""
    if spec.moves:
        return
    traffic = Traffic(
        bench.bodies.traffic(
            spec.prefix, spec.streams, model=artifact.spec.name, items=spec.streams
        )
    )
    connection = Connection(server.port)
    with connection.sock as sock:
        request, ticket = traffic.request()
        sock.sendall(request)
        while (answer := connection.receive()) is None:
            pass
    traffic.accept(ticket, *answer)


def _standing(server: Server, spec: TrafficSpec) -> list[str]:
    """The ETags of some streams that requests do not move."""
    if spec.moves:
        return []
    base, path = f"http://{HOST}:{server.port}", spec.path.removesuffix(b"/forecast")
    found = []
    for stream in range(min(WATCHED_STREAMS, spec.streams)):
        url = base + (path % spec.name(stream)).decode()
        with urllib.request.urlopen(url, timeout=10) as reply:
            found.append(reply.headers["ETag"])
    return found
