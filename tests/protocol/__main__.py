"""Explore the model of the protocol: `make model`, or `python -m tests.protocol --help`.

Prints the states, transitions and depth of each scenario, compares every script call with a real
Valkey, and lets the model find each planted bug. Ends with 1 where an invariant is violated or a
planted bug is not found.
"""

import argparse
import logging
import sys
from dataclasses import replace

import structlog
import uvloop

from tests.protocol.explorer import explore, format_trace
from tests.protocol.scenarios import PLANTED_BUGS, SCENARIOS
from tests.protocol.script_comparison import compare_script_calls
from tests.protocol.state import Faults
from tests.support.servers import real_server

ROW = "{:12}{:>10,}{:>13,}{:>7}{:>7,}{:>7.1f}s"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.protocol", description=__doc__)
    parser.add_argument("--depth", type=int, default=1_000, help="steps; default: to the end")
    parser.add_argument("--faults", type=int, default=1, help="how often each fault may happen")
    parser.add_argument("--only", default="", help="scenarios whose names begin with this")
    parser.add_argument("--traces", action="store_true", help="print a trace of each planted bug")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    failures, rows = 0, []
    print(f"{'scenario':12}{'states':>10}{'transitions':>13}{'steps':>7}{'calls':>7}{'time':>8}")
    with real_server("valkey") as server, server.client() as client:
        for scenario in SCENARIOS:
            if not scenario.name.startswith(options.only):
                continue
            faults = Faults(*(count * options.faults for count in scenario.faults))
            result = explore(replace(scenario, faults=faults), depth=options.depth)
            if result.violation:
                failures += 1
                print(format_trace(result))
            calls = uvloop.run(compare_script_calls(result.model, server.url, client))
            rows.append((result.states, result.transitions, calls, result.seconds))
            steps = f"{result.depth}{'' if result.is_complete else '+'}"
            name = scenario.name.partition(":")[0]
            print(ROW.format(name, *rows[-1][:2], steps, *rows[-1][2:]), flush=True)
    states, transitions, calls, seconds = map(sum, zip(*rows, strict=True))
    print(ROW.format("all", states, transitions, "", calls, seconds))
    print(f"\n{'steps':>5}  planted bug")
    for bug in PLANTED_BUGS:
        result = explore(bug.scenario, bug.rules)
        failures += result.violation is None
        print(f"{len(result.path) or 'none':>5}  {bug.name}")
        if options.traces and result.violation:
            print(format_trace(result), end="\n\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
