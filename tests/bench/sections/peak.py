"""Every server side by side on the standard workload: closed loop, 32 connections and 1."""

from __future__ import annotations

from contextlib import ExitStack

from tests.bench.context import CONNECTIONS, Bench
from tests.bench.servers import FLOORS, Server

REPLY_BYTES = 1800
"""Of the floors, where no server is there whose reply they could imitate."""


def run(bench: Bench) -> None:
    """Start them all, then measure in turns, so that a noisy moment meets none alone."""
    baselines, carry = bench.available(bench.options.baselines), bench.carry_kinds()
    reply_bytes = REPLY_BYTES
    with bench.store() as store, bench.drivers() as [driver], ExitStack() as stack:
        servers: dict[str, Server] = {}
        # Carry's first, since the floors imitate its replies.
        for kind in [*carry, *sorted(baselines, key=lambda kind: kind in FLOORS)]:
            server = stack.enter_context(bench.server(kind, store, reply_bytes=reply_bytes))
            servers[kind] = server
            load = bench.ready(driver, kind, server, bench.bodies)
            if kind in carry:
                reply_bytes = len(load.kept[0].reply)
        order = [*baselines, *carry]
        for turn in range(bench.options.rounds):
            first = turn % len(order)
            for kind in order[first:] + order[:first]:
                server = servers[kind]
                for connections in (CONNECTIONS, 1):
                    bench.closed(
                        f"peak/{connections}/{kind}", driver, kind, server, store, connections
                    )
    _figures(bench, carry)


def _figures(bench: Bench, carry: list[str]) -> None:
    results = bench.results
    for kind in carry:
        for other in ("fastapi", "competent", "naive", "asgi"):
            ours, theirs = f"peak/{CONNECTIONS}/{kind}", f"peak/{CONNECTIONS}/{other}"
            results.ratio(f"peak/{kind} over {other}", ours, theirs)
            # Where others use the machine too, this one suffers less.
            name = f"peak/{kind} over {other}, by CPU"
            results.ratio(name, theirs, ours, "cpu_us_per_chunk")
        results.ratio(
            f"peak/p50 at 1, {kind} over fastapi", f"peak/1/{kind}", "peak/1/fastapi", "p50_ms"
        )
        results.figure(
            f"peak/{kind} MiB", results.rows[f"peak/{CONNECTIONS}/{kind}"].values("rss_mib")
        )
