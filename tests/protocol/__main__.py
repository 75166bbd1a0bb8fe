"""Explore the model of the protocol: `make model`, or `python -m tests.protocol --help`.

Prints, for each scenario, how many worlds and transitions there are and how deep they go, holds
every script call against a real Valkey, and lets the model find each planted bug. Ends with 1
where a promise is broken or a planted bug is not found.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace

import structlog
import uvloop

from tests.protocol.against import compare
from tests.protocol.planted import PLANTED
from tests.protocol.scenarios import SCENARIOS
from tests.protocol.search import Found, search
from tests.protocol.story import story
from tests.protocol.world import Faults, Scenario
from tests.support.servers import real_server

END = 1_000


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.protocol", description=__doc__)
    parser.add_argument("--depth", type=int, default=END, help="steps; default: to the end")
    parser.add_argument("--faults", type=int, default=1, help="how often each fault may happen")
    parser.add_argument("--only", default="", help="scenarios whose names begin so")
    parser.add_argument("--stories", action="store_true", help="tell how each planted bug shows")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    chosen = [_more(s, options.faults) for s in SCENARIOS if s.name.startswith(options.only)]
    broken = 0
    print(f"{'scenario':12}{'worlds':>10}{'transitions':>13}{'steps':>7}{'calls':>7}{'time':>8}")
    totals = [0, 0, 0, 0.0]
    with real_server("valkey") as server, server.client() as client:
        for scenario in chosen:
            found = search(scenario, depth=options.depth)
            if found.broken:
                broken += 1
                print(story(found))
            calls = uvloop.run(compare(found.book, [*found.book.calls], server.url, client))
            print(_line(found, calls), flush=True)
            for at, more in enumerate((found.states, found.transitions, calls, found.seconds)):
                totals[at] += more
    print(f"{'all':12}{totals[0]:10,}{totals[1]:13,}{'':7}{totals[2]:7,}{totals[3]:7.1f}s")
    return 1 if broken + _planted(options.stories) else 0


def _more(scenario: Scenario, times: int) -> Scenario:
    return replace(scenario, faults=Faults(*(count * times for count in scenario.faults)))


def _line(found: Found, calls: int) -> str:
    name = found.scenario.name.partition(":")[0]
    steps = f"{found.depth}{'' if found.complete else '+'}"
    counts = f"{found.states:10,}{found.transitions:13,}{steps:>7}{calls:7,}"
    return f"{name:12}{counts}{found.seconds:7.1f}s"


def _planted(stories: bool) -> int:
    """How many planted bugs were not found."""
    missed = 0
    print(f"\n{'steps':>5}  planted bug")
    for bug in PLANTED:
        found = search(bug.scenario, bug.rules)
        missed += found.broken is None
        print(f"{len(found.path) or 'none':>5}  {bug.name}")
        if stories and found.broken:
            print(story(found), end="\n\n")
    return missed


if __name__ == "__main__":
    sys.exit(main())
