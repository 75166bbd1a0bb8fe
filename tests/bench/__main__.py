"""`make bench`: Carry and its baselines, interleaved in one run.

    python -m tests.bench [--only peak,many,...]
    python -m tests.bench --beside ../before --rounds 40 --seconds 0.5

The servers share the first core, the store and the load generator the last; everything stays
on the loopback, every section is bounded in time, every reply's position is checked and some
outputs are compared with the tests' float64 oracle. Prints tables of medians, the ratios with
their spread, and the targets with `reached` or `not reached`, in Markdown. `--beside` compares this
checkout with another one, in turns. Ends with 1 where a section failed, and with `--strict` where a
target that was measured is not reached.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from tests.bench.curves import CURVE
from tests.bench.results import MISSED, Results, check_targets, show, write_lines
from tests.bench.run import Bench, Options
from tests.bench.sections import BESIDE, BESIDE_LOADS, SECTIONS, run_section
from tests.bench.traffic import WrongReplyError
from tests.support import machine

BUSY_S, BUSY_CORES = 1.0, 0.2
"""How long others are watched before the run, and how many cores' worth is worth a note."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections and print the results."""
    options, results = read_options(arguments), Results(machine.describe_run())
    try:
        failed = measure(options, results)
    finally:
        print(f"\n{show(results)}")
        if options.lines:
            write_lines(results, options.lines)
    is_missed = any(verdict == MISSED for *_, verdict in check_targets(results))
    return int(bool(failed) or (options.strict and is_missed))


def read_options(arguments: Sequence[str] | None) -> Options:
    """The command's arguments."""
    names = partial(str.split, sep=",")
    parser = argparse.ArgumentParser(prog="make bench", description="Measures Carry.")
    add = parser.add_argument
    add("--only", type=names, help="sections, `curves` for all curves; all by default")
    add("--beside", type=Path, help="another checkout of Carry, measured in turns")
    add("--loads", type=names, help="of the comparison: " + ",".join(BESIDE_LOADS))
    add("--rounds", type=int, help="of every row")
    add("--seconds", type=float, help="of a round")
    add("--many-streams", type=int)
    add("--runtimes", type=names, help="of Carry")
    add("--no-instructions", dest="instructions", action="store_false", help="count none: quick")
    add("--peer", help="host and port of a running server of the V2 protocol, for `peer`")
    add("--peer-grpc", help="its host and port of gRPC, if it has one")
    add("--peer-model", help="the name of the standard network there")
    add("--lines", type=Path, help="write the results to this file too, in lines of JSON")
    add("--strict", action="store_true", help="fail where a target is not reached")
    options = parser.parse_args(arguments, Options())
    if options.only is None:
        options.only = [name for name in SECTIONS if (name == BESIDE) == bool(options.beside)]
    if "curves" in options.only:
        curves = [name for name in SECTIONS if name.startswith(CURVE)]
        options.only = [*(set(options.only) - {"curves", *curves}), *curves]
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only: expected some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    if unknown := set(options.loads) - set(BESIDE_LOADS):
        parser.error(f"--loads: expected some of {','.join(BESIDE_LOADS)}, got {','.join(unknown)}")
    if options.beside is not None:
        options.beside = options.beside.resolve()
        if not (options.beside / "service" / "app.py").is_file():
            parser.error(f"--beside: expected a checkout of Carry, got {options.beside}")
    return options


def measure(options: Options, results: Results) -> list[str]:
    """Run the sections with everything they start, and stop it again; those that failed, where a
    server did not start or an answer was wrong."""
    # Leave every `with` block, so that each process started here is ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    failed = []
    cores = machine.Cores.first_and_last()
    with tempfile.TemporaryDirectory(prefix="carry-bench-") as folder:
        bench = Bench(options, cores, Path(folder), results)
        print(f"{results.about['machine']}, commit {results.about['commit']}")
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
            for name in options.only or ():
                print(f"== {name}")
                try:
                    run_section(bench, name)
                except (WrongReplyError, BrokenProcessPool, OSError, AssertionError) as error:
                    bench.note(f"{name} FAILED: {error}")
                    failed.append(name)
        finally:
            machine.pin_process(cores.everything)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
