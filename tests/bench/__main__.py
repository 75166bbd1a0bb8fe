"""`make bench`: Carry beside the floors and hand-written services, in one run, in turns.

    python -m tests.bench [--only peak,many,...] [--full] [--jsonl FILE] [--report]
    python -m tests.bench --beside ../before --rounds 40 --seconds 0.5

The servers share the first core, the store and the load generator the last; everything stays
on the loopback, every section is bounded in time, every reply's position is checked and some
outputs are held against the tests' float64 oracle. Prints a table of medians, the ratios with
their spread, and the targets with `reached` or `not reached`. `--report` writes
docs/reference/performance.md from the file of `--jsonl`; alone with `--only none` it measures
nothing.
`--beside` holds this checkout against another one, in turns.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from tests.bench.context import Bench, Options
from tests.bench.networks import WrongOutputsError
from tests.bench.remote import HelperFailedError
from tests.bench.report import write_report
from tests.bench.results import Results, read_results, table
from tests.bench.servers import RUNTIMES, CannotStartError
from tests.bench.targets import MANY, verdict_table
from tests.bench.traffic import WrongReplyError
from tests.support import machine

SECTIONS = (
    "peak",
    "many",
    "latency",
    "streams",
    "cold",
    "workers",
    "events",
    "widths",
    "kinds",
    "split",
)
"""In the order in which they are run; each is a module of `sections` with `run(bench)`."""

BESIDE = "beside"
"""The section of a run with `--beside`, which runs no other unless told so."""

BUSY_S, BUSY_CORES = 1.0, 0.2
"""How long others are watched before the run, and how many cores' worth is worth a note."""

FAILURES = (CannotStartError, HelperFailedError, WrongOutputsError, WrongReplyError)
"""What ends a section and not the run."""

DOCS = machine.REPOSITORY / "docs" / "reference"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print what was found, and keep it where it is asked for."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measures Carry.")
    parser.add_argument("--only", help="sections, or none; all by default")
    parser.add_argument("--beside", type=Path, help="another checkout of Carry, measured in turns")
    parser.add_argument("--full", action="store_true", help="longer rounds, a million streams")
    parser.add_argument("--rounds", type=int, help="of every row (3; full 5)")
    parser.add_argument("--seconds", type=float, help="of one closed-loop round (1; full 4)")
    parser.add_argument("--streams", type=int, default=1000, help="in the standard workload")
    parser.add_argument("--many-streams", type=int, help="100000; full 1000000")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="of Carry")
    parser.add_argument("--store", choices=("valkey", "redis"), default="valkey")
    parser.add_argument("--jsonl", type=Path, help="append every line to this file")
    parser.add_argument("--report", action="store_true", help="write docs/reference/performance.md")
    given = parser.parse_args(arguments)
    if given.only is None:
        only = [BESIDE] if given.beside else list(SECTIONS)
    else:
        only = [] if given.only == "none" else given.only.split(",")
    if unknown := set(only) - {*SECTIONS, BESIDE}:
        parser.error(f"--only: expected some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    if given.beside and not (given.beside / "service" / "cli.py").is_file():
        parser.error(f"--beside: expected a checkout of Carry, got {given.beside}")
    if given.report and given.jsonl is None:
        parser.error("--report needs --jsonl FILE, which it reads")
    options = Options(
        rounds=given.rounds or (5 if given.full else 3),
        seconds=given.seconds or (4.0 if given.full else 1.0),
        streams=given.streams,
        many_streams=given.many_streams or (MANY if given.full else 100_000),
        runtimes=tuple(given.runtimes.split(",")),
        store=given.store,
        beside=given.beside and given.beside.resolve(),
    )
    failed: list[str] = []
    if only:
        results = Results(machine.describe_run())
        try:
            failed = measure(only, options, results)
        finally:
            print("\n" + table(results) + "\n\n" + verdict_table(results))
            if given.jsonl is not None:
                results.write(given.jsonl)
    if given.report:
        write_report(read_results(given.jsonl), DOCS)
        print(f"wrote {DOCS / 'performance.md'}")
    return 1 if failed else 0


def measure(sections: Sequence[str], options: Options, results: Results) -> list[str]:
    """Run some sections with everything they start, and stop it again.

    Returns:
        The sections that failed: a server did not start, or an answer was wrong.
    """
    signal.signal(signal.SIGTERM, _leave)
    failed = []
    cores = machine.Cores.first_and_last()
    with tempfile.TemporaryDirectory(prefix="carry-bench-") as folder:
        bench = Bench(options, cores, Path(folder), results)
        bench.say(f"{results.about['machine']}, commit {results.about['commit']}")
        bench.note(
            f"{cores.describe()}; {options.store} with AOF everysec on a unix socket; "
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
                    import_module(f"tests.bench.sections.{name}").run(bench)
                except FAILURES as error:
                    bench.note(f"{name} FAILED: {error}")
                    failed.append(name)
        finally:
            machine.pin_process(cores.everything)
    return failed


def _leave(number: int, frame: object) -> None:
    """Leave in good order, so that every process started here is ended."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
