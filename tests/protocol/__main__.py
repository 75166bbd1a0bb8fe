"""Explore the model of the protocol: `make model`, or `python -m tests.protocol --help`.

Prints the states, transitions and depth of each scenario, compares every script call with a real
Valkey, and lets the model find each planted bug. Ends with 1 where an invariant is violated or a
planted bug is not found.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog
import uvloop

from tests.protocol.chunks import ChunkSpace
from tests.protocol.consumer.scenarios import CONSUMER_SCENARIOS, PLANTED_CONSUMER_BUGS
from tests.protocol.consumer.script_comparison import compare_topic_calls
from tests.protocol.consumer.space import ConsumerSpace
from tests.protocol.explorer import explore, format_trace
from tests.protocol.scenarios import PLANTED_BUGS, SCENARIOS
from tests.protocol.script_comparison import compare_script_calls
from tests.support.servers import real_server

ROW = "{:18}{:>10,}{:>13,}{:>7}{:>7,}{:>7.1f}s"
PROTOCOLS: tuple[tuple[Callable[..., Any], Callable[..., Any], Any, Any], ...] = (
    (ChunkSpace, compare_script_calls, SCENARIOS, PLANTED_BUGS),
    (ConsumerSpace, compare_topic_calls, CONSUMER_SCENARIOS, PLANTED_CONSUMER_BUGS),
)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.protocol", description=__doc__)
    parser.add_argument("--depth", type=int, default=None, help="steps; default: to the end")
    parser.add_argument("--faults", type=int, default=1, help="how often each fault may happen")
    parser.add_argument("--only", default="", help="scenarios whose names begin with this")
    parser.add_argument("--traces", action="store_true", help="print a trace of each planted bug")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    return 1 if _explore_scenarios(options) + _find_planted_bugs(options) else 0


def _explore_scenarios(options: argparse.Namespace) -> int:
    """Print a table of the scenarios; how many violate an invariant."""
    failures, rows = 0, []
    print(f"{'scenario':18}{'states':>10}{'transitions':>13}{'steps':>7}{'calls':>7}{'time':>8}")
    with real_server("valkey") as server, server.client() as client:
        for space, compare, scenarios, _ in PROTOCOLS:
            for scenario in scenarios:
                if not scenario.name.startswith(options.only):
                    continue
                faults = scenario.faults._make(n * options.faults for n in scenario.faults)
                result = explore(space(replace(scenario, faults=faults)), options.depth)
                if result.violation:
                    failures += 1
                    print(format_trace(result))
                calls = uvloop.run(compare(result.space.model, server.url, client))
                rows.append((result.states, result.transitions, calls, result.seconds))
                steps = f"{result.depth}{'' if result.is_complete else '+'}"
                name = scenario.name.partition(":")[0]
                print(ROW.format(name, *rows[-1][:2], steps, *rows[-1][2:]), flush=True)
    states, transitions, calls, seconds = map(sum, zip(*rows, strict=True))
    print(ROW.format("all", states, transitions, "", calls, seconds))
    return failures


def _find_planted_bugs(options: argparse.Namespace) -> int:
    """Print a table of the planted bugs; how many are not found."""
    failures = 0
    print(f"\n{'steps':>5}  planted bug")
    for space, _, _, bugs in PROTOCOLS:
        for bug in bugs:
            result = explore(space(bug.scenario, bug.rules))
            failures += result.violation is None
            print(f"{len(result.path) or 'none':>5}  {bug.name}")
            if options.traces and result.violation:
                print(format_trace(result), end="\n\n")
    return failures


if __name__ == "__main__":
    sys.exit(main())
