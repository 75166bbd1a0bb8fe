"""Latency from an open loop at half and at 80 % of the peak, alone and beside long chunks."""

from __future__ import annotations

from functools import partial

from tests.bench.context import Bench
from tests.bench.generator import Load
from tests.bench.networks import Bodies
from tests.bench.remote import Driver
from tests.bench.servers import Server, Store

LONG_STEPS = 10_000
SHARES = (50, 80)


def run(bench: Bench) -> None:
    """For each runtime: the peak and the unloaded latency, then the shares of that peak."""
    for kind in bench.carry_kinds():
        with (
            bench.store() as store,
            bench.drivers(2) as [driver, long_driver],
            bench.server(kind, store) as server,
        ):
            bench.ready(driver, kind, server, bench.bodies)
            long = Bodies.random(LONG_STEPS, count=1).traffic(f"{kind}-long", 1)
            long_driver.traffic("long", long)
            for turn in range(bench.options.rounds):
                _round(bench, kind, server, store, driver, long_driver, turn)
        _figures(bench, kind)


def _round(
    bench: Bench,
    kind: str,
    server: Server,
    store: Store,
    driver: Driver,
    long_driver: Driver,
    turn: int,
) -> None:
    seconds = bench.options.seconds
    bench.closed(f"latency/unloaded/{kind}", driver, kind, server, store, 1)
    peak = bench.closed(f"latency/peak/{kind}", driver, kind, server, store)

    def opened(percent: int) -> Load:
        rate = peak.chunks_per_s * percent / 100
        return driver.open(kind, server.port, rate, seconds * 2, seed=turn + 1)

    for percent in SHARES:
        bench.measured(f"latency/open-{percent}/{kind}", server, store, partial(opened, percent))
    long_driver.begin("closed", "long", server.port, 1, seconds * 2)
    bench.measured(f"latency/open-50-long/{kind}", server, store, partial(opened, 50))
    chunks = long_driver.finish().chunks
    bench.say(f"  {chunks} chunks of {LONG_STEPS} events beside it")


def _figures(bench: Bench, kind: str) -> None:
    results = bench.results
    unloaded = results.rows[f"latency/unloaded/{kind}"].values("p50_ms")
    for percent in SHARES:
        p99 = results.rows[f"latency/open-{percent}/{kind}"].values("p99_ms")
        results.figure(
            f"latency/{kind} p99 at {percent} % over unloaded p50",
            [loaded / alone for loaded, alone in zip(p99, unloaded, strict=True)],
        )
    results.ratio(
        f"latency/{kind} p99 beside long chunks over without",
        f"latency/open-50-long/{kind}",
        f"latency/open-50/{kind}",
        "p99_ms",
    )
