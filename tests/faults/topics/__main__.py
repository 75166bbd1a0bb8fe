"""`python -m tests.faults.topics`: break consumers and stores while events are produced.

Every event's output must be in the output topic exactly once, in order per stream, equal to the
sequential run. Exits with 1 where it is not, or where a kind of fault did not occur.
"""

import argparse
import secrets
import signal
import sys

from tests.faults.planted_bugs.sitecustomize import TOPIC_SCRIPTS
from tests.faults.topics.run import STORES, TopicOptions, kinds_of, report, run
from tests.support.machine import describe_run


def main() -> int:
    """Run the stores one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.topics",
        description=__doc__,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--store", action="append", choices=STORES, help="all of them by default")
    add("--seed", type=int, help="seed of the faults; a new one by default")
    add("--events", type=int, help="events that are appended, at least (1000000)")
    add("--faults", type=int, help="faults, spread over the events (100)")
    add("--streams", type=int, help="streams (48)")
    add("--consumers", type=int, help="consumers (3)")
    add("--plant", choices=sorted(TOPIC_SCRIPTS), help="plant a bug in the consumers")
    add("--verbose", action="store_true", help="print each fault before it is injected")
    options = {"seed": secrets.randbelow(1 << 31), **vars(parser.parse_args())}
    print(*(f"{name}: {value}" for name, value in describe_run().items()), sep="\n", flush=True)
    # so that the processes of a run end with it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    code = 0
    for store in options.pop("store", STORES):
        print(f"{store}: seed {options['seed']}", flush=True)
        running = run(TopicOptions(store, **options))
        if running.options.faults >= len(kinds_of(store)):
            missing = [kind for kind in kinds_of(store) if not running.seen[kind]]
            running.findings += [f"{kind}: never" for kind in missing]
        print(*report(running), sep="\n", flush=True)
        code |= bool(running.findings)
    return code


if __name__ == "__main__":
    sys.exit(main())
