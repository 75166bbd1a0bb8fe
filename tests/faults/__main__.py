"""`python -m tests.faults`: break real processes under load and check every output.

Bounded in faults and events, on the loopback only, each store in a temporary folder of its own.
The seed is printed first; it repeats the same faults in the same order (what is in flight when they
are injected depends on the machine). Exits with 1 where anything was lost, doubled or mixed, or
where an expected event did not occur.
"""

import argparse
import shutil
import sys

import uvloop

from tests.faults.deployment import RunOptions
from tests.faults.planted_bugs.sitecustomize import CODE, SCRIPTS
from tests.faults.run import describe_failures, report, run
from tests.faults.transports import TRANSPORTS
from tests.support.machine import describe_run

STORES = ("valkey", "redis", "cluster", "sentinel")
KILLS_PER_STAGE = 5


def main() -> int:
    """Run the stores one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--store", action="append", choices=STORES, help="all of them by default")
    add("--seed", type=int, help="seed of the faults; a new one by default")
    add("--events", type=int, help="acknowledged events, at least (500000)")
    add("--faults", type=int, help="faults, spread over the events (110)")
    add("--streams", type=int, help="streams (48)")
    add("--transports", nargs="+", choices=TRANSPORTS, help="how chunks are sent (all)")
    add("--plant", choices=sorted({*CODE, *SCRIPTS}), help="plant a bug in the workers")
    add("--strict", action="store_true", help="cluster: acknowledge when the replicas have it")
    add("--verbose", action="store_true", help="print each fault before it is injected")
    options = {"kills_per_stage": KILLS_PER_STAGE, **vars(parser.parse_args())}
    print(*(f"{name}: {value}" for name, value in describe_run().items()), sep="\n", flush=True)
    code = 0
    for store in options.pop("store", STORES):
        if store == "redis" and shutil.which("redis-server") is None:
            print(f"{store}: redis-server is not on the PATH", flush=True)
            code = 1
            continue
        one = RunOptions(store, **options)
        history, findings = uvloop.run(run(one))
        reasons = describe_failures(one, history, findings, whole=True)
        print(*report(one, history, findings), sep="\n")
        print(*(["  FAILED", *reasons] if reasons else ["  passed"]), sep="\n", flush=True)
        code |= bool(reasons)
    return code


if __name__ == "__main__":
    sys.exit(main())
