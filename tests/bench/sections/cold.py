"""From `carry serve` on an empty folder to the first correct answer, embedded store included."""

from __future__ import annotations

from tests.bench.context import Bench
from tests.bench.networks import check_answers
from tests.bench.results import MIB
from tests.bench.servers import cold_start
from tests.bench.traffic import Kept, Traffic


def run(bench: Bench) -> None:
    """Start each runtime as often as there are rounds, one after another."""
    for kind in bench.carry_kinds():
        seconds, rss_mib = [], []
        for turn in range(bench.options.rounds):
            spec = bench.bodies.traffic(f"cold-{turn}", 1, sampled=1)
            request, _ = Traffic(spec).request()
            closing = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            start = cold_start(
                kind.removeprefix("carry-"),
                bench.artifact,
                bench.cores.servers,
                bench.folder,
                closing,
            )
            check_answers(bench.artifact, spec, bench.bodies.rows, [Kept(0, 0, start.reply)])
            seconds.append(start.seconds)
            rss_mib.append(start.rss_bytes / MIB)
            bench.say(f"  cold start of {kind}: {start.seconds:.2f} s, {rss_mib[-1]:.0f} MiB")
        bench.results.figure(f"cold/{kind} s", seconds)
        bench.results.figure(f"cold/{kind} MiB after the first answer", rss_mib)
