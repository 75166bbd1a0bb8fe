"""`make load`: load a running service, check its answers, and say whether all held.

    python -m tests.load [--url http://127.0.0.1:8000] [--scenario steady ...] [--users N] ...

Starts no service. Streams of its own names are made, and forgotten at the end. Exits with 0
where every threshold of every scenario held and no answer was wrong, with 1 where not, with 2
where the load could not be run.
"""

from __future__ import annotations

# first of all: it patches what the others import
from tests.load.running import run_scenario  # isort: skip

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tests.load.compare import Recompute, by_the_oracle, by_the_service, settle
from tests.load.description import Description
from tests.load.measures import findings
from tests.load.scenarios import (
    SCENARIOS,
    LoadError,
    Scenario,
    fitted,
    overridden,
    read_scenarios,
)
from tests.load.service import Service
from tests.load.streams import Population
from tests.load.summary import document_of, head_lines, lines_of, run_of
from tests.load.tape import longest_chunk, tapes_of

DEFAULT_URL = "http://127.0.0.1:8000"
COMPARED_STREAMS, COMPARED_EVENTS = 64, 10_000


@dataclass(frozen=True, slots=True)
class Run:
    """What the scenarios of one run share."""

    service: Service
    model: Description
    way: tuple[str, Recompute]
    options: argparse.Namespace
    prefix: str

    def scenario(self, scenario: Scenario) -> dict[str, Any]:
        """Run a scenario, compare its outputs, and give its document."""
        options = self.options
        population = Population(
            tapes_of(self.model, scenario.longest_steps, options.feed, options.seed),
            prefix=f"{self.prefix}{scenario.name}-",
            count=scenario.streams,
            stream_events=scenario.stream_events,
            appends=scenario.appends,
            keep=options.compare_streams,
            seed=options.seed,
        )
        measures = run_scenario(
            self.service.url,
            self.model,
            scenario,
            population,
            seed=options.seed,
            patience_s=options.patience_s,
        )
        compared = settle(population, self.model, self.way, options.compare_events, measures)
        return document_of(scenario, measures, compared, findings(scenario, measures, compared))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except LoadError as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("load: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    known = read_scenarios(options.scenarios)
    unknown = [name for name in options.scenario if name not in known]
    if unknown:
        raise LoadError(f"--scenario {unknown[0]}: expected one of {', '.join(known)}")
    chosen = [
        overridden(
            known[name],
            users=options.users,
            duration_s=options.duration_s,
            thresholds=options.threshold,
        )
        for name in options.scenario or known
    ]
    service = Service(options.url)
    model = service.describe(options.model)
    way = (
        by_the_service(service.post, model)
        if options.artifact is None
        else by_the_oracle(options.artifact, model)
    )
    document = run_of(service.url, model, options.seed)
    run = Run(service, model, way, options, f"load-{secrets.token_hex(4)}-")
    for line in head_lines(document):
        print(line, flush=True)
    found = []
    try:
        for scenario in chosen:
            found.append(run.scenario(fitted(scenario, longest_chunk(model))))
            for line in lines_of(found[-1]):
                print(line, flush=True)
    finally:
        if not options.keep:
            service.forget(model.name, run.prefix)
    document |= {"passed": all(each["passed"] for each in found), "scenarios": found}
    _write(options.summary, document)
    broken = [each["scenario"] for each in found if not each["passed"]]
    print(f"load: FAILED: {', '.join(broken)}" if broken else "load: every threshold held")
    return 1 if broken else 0


def _write(path: str, document: dict[str, Any]) -> None:
    text = orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()
    if path == "-":
        print(text)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n", encoding="utf-8")
    print(f"summary: {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make load", description="Load a running service and check its answers."
    )
    add = parser.add_argument
    add("--url", default=os.environ.get("CARRY_LOAD_URL", DEFAULT_URL), help="the service")
    add("--model", help="its model; may be left out where it serves one")
    add("--scenario", action="append", default=[], help="may be repeated; every one by default")
    add("--users", type=_positive, help="instead of each scenario's own number")
    add("--duration-s", type=_seconds, help="instead of each scenario's own duration")
    add(
        "--threshold",
        action="append",
        default=[],
        metavar="[SCENARIO.]NAME=VALUE",
        help="instead of the file's; `none` asks it no longer; may be repeated",
    )
    add("--scenarios", type=Path, default=SCENARIOS, help="another file of scenarios")
    add("--feed", choices=("both", "inputs", "events"), default="both", help="what streams send")
    add("--artifact", type=Path, help="the model's directory: compare with a float64 network")
    add("--compare-streams", type=_positive, default=COMPARED_STREAMS, help="how many are compared")
    add("--compare-events", type=_positive, default=COMPARED_EVENTS, help="of each stream, at most")
    add("--patience-s", type=_seconds, default=30.0, help="how long one chunk is tried")
    add("--seed", type=int, default=1, help="of the events and the cuts")
    add("--summary", default=".carry/load-summary.json", help="a JSON file; - for the output")
    add("--keep", action="store_true", help="leave the streams in the service")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("expected seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
