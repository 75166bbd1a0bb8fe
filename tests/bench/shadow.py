"""What a challenger in the shadow costs the champion: servers with and without one, in turns."""

from __future__ import annotations

from typing import Any, Final

import httpx
import numpy as np

from models.artifact.writing import write_artifact
from tests.bench.results import geometric_mean
from tests.bench.run import CONNECTIONS, Bench, Row, Server
from tests.support.servers import until

NEXT: Final = "next"
"""Folder of the challenger's artifact, in that of the champion."""

HISTORY_EVENTS: Final = 64
MODERATE: Final = 4
"""Connections at which the worker is idle for part of the time."""

OVERLOAD: Final = 8
"""Times the usual connections, at which chunks always wait."""

BUDGETS: Final = ("0.2", "0.5")

FIELDS: Final = {"chunks/s": "chunks_per_s", "CPU": "cpu_us_per_chunk", "p99": "p99_ms"}


def measure_shadow(bench: Bench, kind: str) -> None:
    """The load of a server with a challenger over that of one without, both with a history; and
    which share of the chunks the challenger computes."""
    results, artifact = bench.results, bench.artifact
    weights = {name: each * np.float32(1.01) for name, each in artifact.weights.items()}
    write_artifact(artifact.path / NEXT, artifact.spec, weights)
    servers = [_start(bench, kind, "without"), *(_start(bench, kind, each) for each in BUDGETS)]
    for server in servers[1:]:
        _add_challenger(server)
    for connections in (MODERATE, CONNECTIONS, OVERLOAD * CONNECTIONS):
        rows = []
        for server in servers:
            bench.prepare(server, key := f"shadow-{connections}-{server.name}")
            rows.append(Row(f"shadow/{connections}/{server.name}", server, key, connections))
        shares = {server.name: list[float]() for server in servers[1:]}
        for turn in range(rounds := bench.options.rounds):
            first = turn % len(rows)
            for row in (*rows[first:], *rows[:first]):
                # within the round: what waits is computed while the other servers are measured
                before = _count_computed(row.server)
                load = bench.measure_closed(row)
                if row.server.name in shares:
                    share = (_count_computed(row.server) - before) / load.chunks
                    shares[row.server.name].append(share)
        without, *others = [results.rows[row.name][-rounds:] for row in rows]
        for server, samples in zip(servers[1:], others, strict=True):
            name = f"shadow/budget {server.name} over none, {connections} in flight"
            pairs = [*zip(samples, without, strict=True)]
            for shown, of in FIELDS.items():
                middle, error = geometric_mean([getattr(a, of) / getattr(b, of) for a, b in pairs])
                spread = [middle / (1 + error), middle, middle * (1 + error)]
                results.figure(f"{name}: {shown}", spread)
            results.figure(f"{name}: share computed", shares[server.name])


def _start(bench: Bench, kind: str, name: str) -> Server:
    """A server with records of its own; its name is its budget."""
    environment = {
        "CARRY_NAMESPACE": f"shadow-{name.replace('.', '-')}",
        "CARRY_HISTORY_EVENTS": str(HISTORY_EVENTS),
    }
    if name != "without":
        environment["CARRY_SHADOW_BUDGET"] = name
    return bench.start_server(kind, environment=environment, name=name)


def _ask(server: Server, method: str, path: str, body: Any = None) -> httpx.Response:
    url = f"http://127.0.0.1:{server.port}/v1/models/bench/{path}"
    return httpx.request(method, url, json=body, timeout=60)


def _count_computed(server: Server) -> int:
    """How many chunks the challenger has computed; 0 without one."""
    if server.name not in BUDGETS:
        return 0
    report = _ask(server, "GET", f"versions/{NEXT}/report").raise_for_status().json()
    return int(report["chunks"].get("computed", 0))


def _add_challenger(server: Server) -> None:
    """Load the next version, and let it compute in the shadow once it is loaded."""
    _ask(server, "POST", "versions", {"path": NEXT, "label": NEXT}).raise_for_status()
    change = {"action": "shadow", "version": NEXT}
    until(lambda: _ask(server, "POST", "aliases", change).is_success, "the challenger")
