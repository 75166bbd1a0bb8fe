"""This checkout beside another one of Carry, in short turns: what a change is worth.

A machine that others use too is now faster, now slower, for seconds at a time. So each round is
short, both have one in every turn, and what counts is the mean of the ratios within the turns, with
its standard error: 40 rounds of half a second tell two per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import mean, stdev

from tests.bench.context import Bench
from tests.support.machine import REPOSITORY

CONNECTIONS = (1, 8, 16, 32, 64)
FIELDS = {"chunks/s": "chunks_per_s", "CPU": "cpu_us_per_chunk", "p50": "p50_ms"}


def run(bench: Bench) -> None:
    """One runtime; the two checkouts on one store."""
    other = bench.options.beside
    if other is None:
        bench.note("beside: no other checkout was named with --beside")
        return
    results = bench.results
    for kind in bench.carry_kinds()[-1:]:
        with bench.store() as store, bench.drivers() as [driver], ExitStack() as stack:
            servers = {}
            for name, checkout in (("this", REPOSITORY), ("other", other)):
                servers[name] = stack.enter_context(
                    bench.server(kind, store, name=name, checkout=checkout)
                )
                bench.ready(driver, name, servers[name], bench.bodies)
            for connections in CONNECTIONS:
                for turn in range(bench.options.rounds):
                    for name in sorted(servers, reverse=turn % 2 == 0):
                        row = f"beside/{connections}/{name}"
                        bench.closed(row, driver, name, servers[name], store, connections)
                for shown, of in FIELDS.items():
                    this, theirs = (
                        results.rows[f"beside/{connections}/{name}"].values(of)
                        for name in ("this", "other")
                    )
                    middle, error = geometric_mean(
                        [one / two for one, two in zip(this, theirs, strict=True)]
                    )
                    spread = [middle / (1 + error), middle, middle * (1 + error)]
                    results.figure(f"beside/{connections}: {shown}, this over the other", spread)


def geometric_mean(ratios: Sequence[float]) -> tuple[float, float]:
    """The geometric mean of ratios, and its relative standard error (0 of one alone)."""
    logs = [math.log(ratio) for ratio in ratios]
    error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return math.exp(mean(logs)), error
