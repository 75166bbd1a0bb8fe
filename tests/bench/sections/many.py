"""Requests for many streams, 64 chunks of 16 events each, against the runtime's compute alone."""

from __future__ import annotations

from typing import Any

from tests.bench.compute import BATCHES, Rate
from tests.bench.context import CONNECTIONS, Bench
from tests.bench.networks import STEPS
from tests.bench.remote import Remote

ITEMS = 64
MANY_CONNECTIONS = 4
COMPUTE_S = 0.3
LOADS: dict[str, dict[str, Any]] = {
    "msgpack-64": {"media": "msgpack", "items": ITEMS},
    "json-64": {"media": "json", "items": ITEMS},
    "msgpack-1": {"media": "msgpack"},
}


def run(bench: Bench) -> None:
    """In each round: the compute alone, then each of the loads."""
    results = bench.results
    for kind in bench.carry_kinds():
        runtime = kind.removeprefix("carry-")
        compute = Remote(
            "tests.bench.compute:Compute", bench.cores.servers, runtime, str(bench.artifact.path)
        )
        alone: dict[int, list[Rate]] = {}
        with (
            bench.store() as store,
            bench.drivers() as [driver],
            compute,
            bench.server(kind, store) as server,
        ):
            for load, options in LOADS.items():
                bench.ready(driver, f"{kind}/{load}", server, bench.bodies, **options)
            for _ in range(bench.options.rounds):
                rates = compute.call("rates", STEPS, BATCHES, COMPUTE_S)
                for batch, rate in rates.items():
                    alone.setdefault(batch, []).append(rate)
                bench.say(f"  compute alone: {', '.join(_rates(rates))}")
                for load, options in LOADS.items():
                    connections = MANY_CONNECTIONS if options.get("items") else CONNECTIONS
                    name, key = f"many/{load}/{kind}", f"{kind}/{load}"
                    bench.closed(name, driver, key, server, store, connections)
        for batch, values in alone.items():
            results.figure(
                f"many/compute alone {runtime} batch {batch}, chunks/s",
                [rate.chunks_per_s for rate in values],
            )
        turns = list(zip(*alone.values(), strict=True))
        best = [max(rate.chunks_per_s for rate in turn) for turn in turns]
        least_us = [min(rate.cpu_us_per_chunk for rate in turn) for turn in turns]
        for load in LOADS:
            row = results.rows[f"many/{load}/{kind}"]
            name = "" if load == "msgpack-64" else f" {load}"
            results.figure(
                f"many/{kind}{name} over compute",
                [a / b for a, b in zip(row.values("chunks_per_s"), best, strict=True)],
            )
            results.figure(
                f"many/{kind}{name} over compute, by CPU",
                [a / b for a, b in zip(least_us, row.values("cpu_us_per_chunk"), strict=True)],
            )


def _rates(rates: dict[int, Rate]) -> list[str]:
    return [f"batch {batch} {rate.chunks_per_s:,.0f} chunks/s" for batch, rate in rates.items()]
