"""Two workers on all cores against one, and chunks that race for one stream."""

from __future__ import annotations

from tests.bench.context import Bench
from tests.bench.generator import Connection
from tests.bench.networks import STEPS
from tests.bench.servers import Server
from tests.bench.traffic import Traffic, position_in

CONNECTIONS = (32, 64, 128)
"""With the first, each of two workers has batches of half the size that one has alone."""

RACERS = 16
RACES = 20


def run(bench: Bench) -> None:
    """Nothing is pinned here: on two cores, two workers share them with everything else."""
    cores = bench.cores.everything
    for kind in bench.carry_kinds():
        with (
            bench.store(cores) as store,
            bench.drivers(cores=cores) as [driver],
            bench.server(kind, store, cores=cores, name="1") as one,
            bench.server(kind, store, cores=cores, workers=2, name="2") as two,
        ):
            for server in (one, two):
                bench.ready(driver, server.name, server, bench.bodies)
            for _ in range(bench.options.rounds):
                for connections in CONNECTIONS:
                    for server in (one, two):
                        name = f"workers/{connections}-{server.name}/{kind}"
                        bench.closed(name, driver, server.name, server, store, connections)
            lost = [race(bench, two, f"race-{turn}") for turn in range(RACES)]
        for connections in CONNECTIONS:
            bench.results.ratio(
                f"workers/{kind} 2 over 1, {connections} connections",
                f"workers/{connections}-2/{kind}",
                f"workers/{connections}-1/{kind}",
            )
        bench.results.figure(f"workers/{kind} lost", [max(lost)])
    for kind in bench.available([k for k in bench.options.baselines if k == "competent"]):
        with bench.store(cores) as store, bench.server(kind, store, cores=cores) as server:
            lost = [race(bench, server, f"race-{turn}") for turn in range(RACES)]
        bench.results.figure(f"workers/{kind} lost", lost)


def race(bench: Bench, server: Server, stream: str) -> int:
    """Send 16 chunks of one stream at once, without positions; how many of them were lost.

    Each must be answered with 200; a chunk is lost where two replies give one position, or
    the last position is short of all events.
    """
    request, _ = Traffic(bench.bodies.traffic(stream, 1)).request()
    head, _, body = request.partition(b"\r\n\r\n")
    body = body.replace(b'"position":0,', b"", 1)
    before, _, after = head.partition(b"Content-Length: ")
    request = b"%bContent-Length: %d%b\r\n\r\n%b" % (
        before,
        len(body),
        after.lstrip(b"0123456789"),
        body,
    )
    racers = [Connection(server.port) for _ in range(RACERS)]
    try:
        for racer in racers:
            racer.sock.sendall(request)
        found = set()
        for racer in racers:
            while (answer := racer.receive()) is None:
                pass
            reply, body_at = answer
            found.add(position_in(reply, body_at, "json"))
    finally:
        for racer in racers:
            racer.sock.close()
    every = {STEPS * (count + 1) for count in range(RACERS)}
    return len(every - found)
