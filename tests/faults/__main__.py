"""`python -m tests.faults`: break real processes under load and check every output.

Bounded in faults and events, on the loopback only, each store in a temporary folder of its own.
The seed is printed first; with it the same faults come in the same order (what is in flight when
they come is up to the machine). Ends with 1 where anything was lost, doubled or mixed, or where
something that can occur was not seen.
"""

from __future__ import annotations

import argparse
import shutil
import sys

import uvloop

from tests.faults.plan import KINDS
from tests.faults.report import failures, losses, report, shortened
from tests.faults.run import PLANTS, Course, Outcome, new_seed, own_folder, run

KILLS_PER_STAGE = 5


def main() -> int:
    """Run the stores one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--store", action="append", choices=sorted(KINDS), help="all of them")
    parser.add_argument("--events", type=int, default=500_000, help="events, at least (500000)")
    parser.add_argument("--faults", type=int, default=110, help="faults (110)")
    parser.add_argument("--streams", type=int, default=48, help="streams (48)")
    parser.add_argument("--seed", type=int, help="a new one")
    parser.add_argument("--plant", choices=plants(), help="plant a bug in the workers")
    parser.add_argument(
        "--strict", action="store_true", help="cluster: acknowledge when the replicas have it"
    )
    parser.add_argument("--tell", action="store_true", help="print each fault before it comes")
    given = parser.parse_args()
    seed = new_seed() if given.seed is None else given.seed
    code = 0
    for store in given.store or sorted(KINDS, reverse=True):
        if store != "valkey" and shutil.which("redis-server") is None:
            print(f"{store}: redis-server is not on the PATH", flush=True)
            code = 1
            continue
        print(f"{store}: seed {seed}", flush=True)
        course = Course(
            store,
            seed,
            given.events,
            given.faults,
            given.streams,
            kills_per_stage=KILLS_PER_STAGE,
            plant=given.plant,
            strict=given.strict and store == "cluster",
            tell=given.tell,
        )
        outcome = uvloop.run(_in_folder(course))
        found = failures(outcome, whole=True)
        print(report(outcome))
        if found:
            print(f"  RED\n{shortened(found)}\n{losses(outcome)}", flush=True)
        else:
            print("  green", flush=True)
        code |= bool(found)
    return code


def plants() -> list[str]:
    """The bugs that can be planted."""
    return sorted(path.parent.name for path in PLANTS.glob("*/sitecustomize.py"))


async def _in_folder(course: Course) -> Outcome:
    async with own_folder() as folder:
        return await run(course, folder)


if __name__ == "__main__":
    sys.exit(main())
