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

from tests.faults.options import RunOptions
from tests.faults.run import describe_failures, new_seed, report, run
from tests.support.machine import describe_run

STORES = ("valkey", "redis", "cluster")
KILLS_PER_STAGE = 5


def main() -> int:
    """Run the stores one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--store", action="append", choices=STORES, help="all of them")
    RunOptions.add_to(parser)
    options = vars(parser.parse_args())
    stores, is_strict = options.pop("store") or STORES, options.pop("strict")
    if options["seed"] is None:
        options["seed"] = new_seed()
    print(*(f"{name}: {value}" for name, value in describe_run().items()), sep="\n", flush=True)
    code = 0
    for store in stores:
        if store != "valkey" and shutil.which("redis-server") is None:
            print(f"{store}: redis-server is not on the PATH", flush=True)
            code = 1
            continue
        strict = is_strict and store == "cluster"
        one = RunOptions(store, strict=strict, kills_per_stage=KILLS_PER_STAGE, **options)
        history, findings = uvloop.run(run(one))
        reasons = describe_failures(one, history, findings, whole=True)
        print(*report(one, history, findings), sep="\n")
        print(*(["  FAILED", *reasons] if reasons else ["  passed"]), sep="\n", flush=True)
        code |= bool(reasons)
    return code


if __name__ == "__main__":
    sys.exit(main())
