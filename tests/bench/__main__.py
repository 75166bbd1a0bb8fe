"""`make bench`: Carry and its baselines, interleaved in one run.

    python -m tests.bench [--only peak,many,...] [--jsonl FILE] [--report]
    python -m tests.bench --beside ../before --rounds 40 --seconds 0.5

The servers share the first core, the store and the load generator the last; everything stays
on the loopback, every section is bounded in time, every reply's position is checked and some
outputs are compared with the tests' float64 oracle. Prints a table of medians, the ratios with
their spread, and the targets with `reached` or `not reached`. `--report` writes
docs/reference/performance.md from the file of `--jsonl`; alone with `--only none` it measures
nothing. `--beside` compares this checkout with another one, in turns.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tests.bench import server_sections as servers
from tests.bench import workload_sections as workloads
from tests.bench.processes import CannotStartError
from tests.bench.report import write_report
from tests.bench.results import Results, format_table, read_results
from tests.bench.run import RUNTIMES, Bench, Options
from tests.bench.traffic import WrongReplyError
from tests.bench.workloads import WrongOutputsError
from tests.support import machine

BESIDE = "beside"
"""The section of a run with `--beside`, which runs no other by default."""

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "peak": servers.measure_peak,
    "many": workloads.measure_many,
    "latency": servers.measure_latency,
    "streams": workloads.measure_streams,
    "cold": servers.measure_cold_start,
    "workers": servers.measure_workers,
    "events": workloads.measure_events,
    "widths": workloads.measure_widths,
    "kinds": workloads.measure_kinds,
    "split": servers.measure_cpu_split,
    BESIDE: servers.measure_beside,
}
"""In the order in which they are run."""

BUSY_S, BUSY_CORES = 1.0, 0.2
"""How long others are watched before the run, and how many cores' worth is worth a note."""

FAILURES = (CannotStartError, WrongOutputsError, WrongReplyError, BrokenProcessPool, OSError)
"""What ends a section and not the run."""

PAGES = machine.REPOSITORY / "docs" / "reference"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print the results, and keep them where it is asked for."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="make bench", description="Measures Carry.")
    parser.add_argument("--only", help="sections, or none; all by default")
    parser.add_argument("--beside", type=Path, help="another checkout of Carry, measured in turns")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="of every row")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="of a round")
    parser.add_argument("--streams", type=int, default=defaults.streams, help="by default 1000")
    parser.add_argument("--many-streams", type=int, default=defaults.many_streams)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="of Carry")
    parser.add_argument("--jsonl", type=Path, help="append every line to this file")
    parser.add_argument("--report", action="store_true", help="write docs/reference/performance.md")
    given = parser.parse_args(arguments)
    default = BESIDE if given.beside else ",".join(name for name in SECTIONS if name != BESIDE)
    only = [name for name in (given.only or default).split(",") if name != "none"]
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"--only: expected some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    if given.beside and not (given.beside / "service" / "cli.py").is_file():
        parser.error(f"--beside: expected a checkout of Carry, got {given.beside}")
    if given.report and given.jsonl is None:
        parser.error("--report needs --jsonl FILE, which it reads")
    options = Options(
        rounds=given.rounds,
        seconds=given.seconds,
        streams=given.streams,
        many_streams=given.many_streams,
        runtimes=tuple(given.runtimes.split(",")),
        beside=given.beside and given.beside.resolve(),
    )
    failed: list[str] = []
    if only:
        results = Results(machine.describe_run())
        try:
            failed = measure(only, options, results)
        finally:
            print("\n" + format_table(results))
            if given.jsonl is not None:
                results.write(given.jsonl)
    if given.report:
        write_report(read_results(given.jsonl), PAGES)
        print(f"wrote {PAGES / 'performance.md'}")
    return 1 if failed else 0


def measure(sections: Sequence[str], options: Options, results: Results) -> list[str]:
    """Run some sections with everything they start, and stop it again.

    Returns:
        The sections that failed: a server did not start, or an answer was wrong.
    """
    signal.signal(signal.SIGTERM, _exit_in_order)
    failed = []
    cores = machine.Cores.first_and_last()
    with tempfile.TemporaryDirectory(prefix="carry-bench-") as folder:
        bench = Bench(options, cores, Path(folder), results)
        bench.say(f"{results.about['machine']}, commit {results.about['commit']}")
        bench.note(
            f"{cores.describe()}; valkey with AOF everysec on a unix socket; "
            f"{options.rounds} rounds of {options.seconds:g} s"
        )
        if (busy := machine.measure_busy_cores(BUSY_S)) > BUSY_CORES:
            bench.note(
                f"the machine was busy before the run: {busy:.1f} cores; trust the ratios by CPU"
            )
        machine.pin_process(cores.others)
        try:
            for name in sections:
                bench.say(f"== {name}")
                try:
                    SECTIONS[name](bench)
                except FAILURES as error:
                    bench.note(f"{name} FAILED: {error}")
                    failed.append(name)
        finally:
            machine.pin_process(cores.everything)
    return failed


def _exit_in_order(number: int, frame: object) -> None:
    """Leave every `with` block, so that each process started here is ended."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
