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

from tests.faults.plan import KINDS
from tests.faults.report import describe_failures, failures, report
from tests.faults.run import PLANTED_BUGS, Outcome, RunOptions, new_seed, run, temporary_folder

KILLS_PER_STAGE = 5


def main() -> int:
    """Run the stores one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--store", action="append", choices=sorted(KINDS), help="all of them")
    parser.add_argument("--events", type=int, default=500_000, help="events, at least (500000)")
    parser.add_argument("--faults", type=int, default=110, help="faults (110)")
    parser.add_argument("--streams", type=int, default=48, help="streams (48)")
    parser.add_argument("--seed", type=int, help="a new one")
    parser.add_argument("--plant", choices=planted_bugs(), help="plant a bug in the workers")
    parser.add_argument(
        "--strict", action="store_true", help="cluster: acknowledge when the replicas have it"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print each fault before it is injected"
    )
    given = parser.parse_args()
    seed = new_seed() if given.seed is None else given.seed
    code = 0
    for store in given.store or sorted(KINDS, reverse=True):
        if store != "valkey" and shutil.which("redis-server") is None:
            print(f"{store}: redis-server is not on the PATH", flush=True)
            code = 1
            continue
        print(f"{store}: seed {seed}", flush=True)
        options = RunOptions(
            store,
            seed,
            given.events,
            given.faults,
            given.streams,
            kills_per_stage=KILLS_PER_STAGE,
            plant=given.plant,
            strict=given.strict and store == "cluster",
            verbose=given.verbose,
        )
        outcome = uvloop.run(_in_folder(options))
        found = failures(outcome, whole=True)
        print(report(outcome))
        if found:
            print(f"  FAILED\n{describe_failures(outcome, found)}", flush=True)
        else:
            print("  passed", flush=True)
        code |= bool(found)
    return code


def planted_bugs() -> list[str]:
    """The bugs that can be planted."""
    return sorted(path.parent.name for path in PLANTED_BUGS.glob("*/sitecustomize.py"))


async def _in_folder(options: RunOptions) -> Outcome:
    async with temporary_folder() as folder:
        return await run(options, folder)


if __name__ == "__main__":
    sys.exit(main())
