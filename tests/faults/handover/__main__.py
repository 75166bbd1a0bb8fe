"""`python -m tests.faults.handover`: load the history of many streams while their events go on.

Producers append to topics, and clients send chunks, while `carry backfill` computes the history and
`carry streams load` writes its states; loader, workers and consumers are killed. Every event's
output must be in the history's files, the output topics or the replies exactly once, in order,
equal to the sequential run. Exits with 1 where it is not, or where a kind of fault did not occur.
"""

import argparse
import secrets
import sys

import uvloop

from tests.faults.handover.run import KINDS, LOADED_AGAIN, LOADER_KILLED, RunOptions, report, run
from tests.faults.planted_bugs.sitecustomize import HANDOVER_CODE
from tests.support.machine import describe_run

RUNS = ((True, "beginning"), (False, "lowest"))
"""Whether the topics are those of partitions, and where consumers start."""


def main() -> int:
    """Run both kinds of topics, one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.handover",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--store", choices=("valkey", "redis"), help="the store (redis)")
    add("--seed", type=int, help="seed of the faults; a new one by default")
    add("--streams", type=int, help="streams (100000)")
    add("--events", type=int, help="events while consumers read, at least (300000)")
    add("--kills", type=int, help="faults of each kind (10)")
    add("--plant", choices=sorted(HANDOVER_CODE), help="plant a bug in loader and consumers")
    add("--verbose", action="store_true", help="print what happens")
    options = {"store": "redis", "seed": secrets.randbelow(1 << 31), **vars(parser.parse_args())}
    print(*(f"{name}: {value}" for name, value in describe_run().items()), sep="\n", flush=True)
    code = 0
    for partitioned, start in RUNS:
        chosen = RunOptions(**options, partitioned=partitioned, start=start)
        running = uvloop.run(run(chosen))
        missing = [each for each in (*KINDS, LOADED_AGAIN, LOADER_KILLED) if not running.seen[each]]
        running.findings += [f"{kind}: never" for kind in missing]
        print(*report(running), sep="\n", flush=True)
        code |= bool(running.findings)
    return code


if __name__ == "__main__":
    sys.exit(main())
