"""`python -m tests.faults`: break real processes under load and check every output.

Bounded in faults and events, on the loopback only, each store in a temporary folder of its own.
The seed is printed first; it repeats the same faults in the same order (what is in flight when
they are injected depends on the machine). Exits with 1 where anything was lost, doubled or mixed,
or where an expected event did not occur.
"""

from __future__ import annotations

import argparse
import shutil
import sys

import uvloop

from tests.faults.faults import KINDS
from tests.faults.planted_bugs.sitecustomize import CODE, SCRIPTS
from tests.faults.run import RunOptions, describe_failures, new_seed, report, run

KILLS_PER_STAGE = 5


def main() -> int:
    """Run the stores one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--store", action="append", choices=sorted(KINDS), help="all of them")
    parser.add_argument("--events", type=int, default=500_000, help="events, at least (500000)")
    parser.add_argument("--faults", type=int, default=110, help="faults (110)")
    parser.add_argument("--streams", type=int, default=48, help="streams (48)")
    parser.add_argument("--seed", type=int, help="a new one")
    parser.add_argument(
        "--plant", choices=sorted({*CODE, *SCRIPTS}), help="plant a bug in the workers"
    )
    parser.add_argument(
        "--strict", action="store_true", help="cluster: acknowledge when the replicas have it"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print each fault before it is injected"
    )
    options = vars(parser.parse_args())
    stores, is_strict = options.pop("store"), options.pop("strict")
    if options["seed"] is None:
        options["seed"] = new_seed()
    code = 0
    for store in stores or sorted(KINDS, reverse=True):
        if store != "valkey" and shutil.which("redis-server") is None:
            print(f"{store}: redis-server is not on the PATH", flush=True)
            code = 1
            continue
        print(f"{store}: seed {options['seed']}", flush=True)
        strict = is_strict and store == "cluster"
        one = RunOptions(store, kills_per_stage=KILLS_PER_STAGE, strict=strict, **options)
        history, findings = uvloop.run(run(one))
        reasons = describe_failures(one, history, findings, whole=True)
        print(*report(one, history, findings), sep="\n")
        print(*(["  FAILED", *reasons] if reasons else ["  passed"]), sep="\n", flush=True)
        code |= bool(reasons)
    return code


if __name__ == "__main__":
    sys.exit(main())
