"""`python -m tests.faults.versions`: change the versions of a model while workers and stores are
killed.

Every reply is checked against all events of its stream: nothing lost or doubled, each output of the
version that the reply names, from the state that it announces. Exits with 1 where that does not
hold, or where a kind of fault did not occur.
"""

import argparse
import sys
from typing import Any

import uvloop

from tests.faults.planted_bugs.sitecustomize import VERSION_CODE
from tests.faults.run import report
from tests.faults.transports import TRANSPORTS
from tests.faults.versions.run import describe_failures, options_of, run
from tests.support.machine import describe_run

RUNS = (("redis", 1), ("redis", 2), ("cluster", 2))
"""Stores and numbers of workers."""
SHOWN = 20


def main() -> int:
    """Run the deployments one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.versions",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--store", choices=("redis", "valkey", "cluster"), help="instead of all deployments")
    add("--workers", type=int, choices=(1, 2), help="with --store (2)")
    add("--seed", type=int, help="seed of the faults; a new one by default")
    add("--chunks", type=int, help="acknowledged chunks, at least (40000)")
    add("--streams", type=int, help="streams (2000)")
    add("--transports", nargs="+", choices=TRANSPORTS, help="how chunks are sent (all)")
    add("--plant", choices=sorted(VERSION_CODE), help="plant a bug in the workers")
    add("--verbose", action="store_true", help="print each fault and change")
    options: dict[str, Any] = {"streams": 2000, "longest_s": 1.0, **vars(parser.parse_args())}
    options["events"] = options.pop("chunks", 40_000)
    runs, code = RUNS, 0
    if "store" in options:
        runs = ((options.pop("store"), options.pop("workers", 2)),)
    print(*(f"{name}: {value}" for name, value in describe_run().items()), sep="\n", flush=True)
    for store, workers in runs:
        one = options_of(store, workers=workers, **options)
        print(f"{store}, {workers} workers", flush=True)
        history, findings = uvloop.run(run(one))
        reasons = describe_failures(one, history, findings)
        print(*report(one, history, findings), sep="\n")
        print(*(["  FAILED", *reasons[:SHOWN]] if reasons else ["  passed"]), sep="\n", flush=True)
        code |= bool(reasons)
    return code


if __name__ == "__main__":
    sys.exit(main())
