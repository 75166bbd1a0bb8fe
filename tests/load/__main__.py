"""`make load`: load a running service, check its answers, exit with the verdict.

    python -m tests.load [--url http://127.0.0.1:8000] [--scenario steady ...] [--users N] ...

Starts no service. Creates streams with a prefix of its own, and deletes them at the end. Exits
with 0 where every threshold of every scenario passed and no answer was wrong, with 1 where not,
with 2 where the load could not be run.
"""

from __future__ import annotations

# first of all: it patches what the others import
from tests.load.users import run_scenario  # isort: skip

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import gevent
import orjson

from service.client import ModelDescription
from tests.load.feeds import longest_chunk, make_feeds
from tests.load.recompute import Recompute, by_oracle, by_service, compare
from tests.load.results import Results, describe
from tests.load.scenarios import SCENARIOS, LoadError, Scenario, with_longest_chunk, with_options
from tests.load.sender import Load
from tests.load.service import Service
from tests.support.machine import describe_run

DEFAULT_URL = "http://127.0.0.1:8000"
COMPARED_STREAMS, COMPARED_EVENTS = 64, 10_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with closing(Service(options.url)) as service:
            return _run(service, options)
    except LoadError as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("load: interrupted", file=sys.stderr)
        return 130


def _run(service: Service, options: argparse.Namespace) -> int:
    unknown = [name for name in options.scenario if name not in SCENARIOS]
    if unknown:
        raise LoadError(f"--scenario {unknown[0]}: expected one of {', '.join(SCENARIOS)}")
    scenarios = [
        with_options(
            SCENARIOS[name],
            users=options.users,
            duration_s=options.duration_s,
            thresholds=options.threshold,
        )
        for name in options.scenario or SCENARIOS
    ]
    model = service.describe(options.model)
    method = (
        by_service(service.post, model)
        if options.artifact is None
        else by_oracle(options.artifact, model)
    )
    run = describe_run()
    print(f"{run['date']}, commit {run['commit']}, {run['machine']}")
    print(f"{service.url}: model {model.name} {model.version} on {', '.join(model.runtimes)}")
    prefix = f"load-{secrets.token_hex(4)}-"
    documents = []
    try:
        for scenario in scenarios:
            document = _run_scenario(service, model, scenario, method, prefix, options)
            documents.append(document)
            print("\n".join(describe(document)), flush=True)
    finally:
        if not options.keep:
            service.delete_streams(model.name, prefix)
    failed = [each["scenario"] for each in documents if not each["passed"]]
    summary = {
        **run,
        "url": service.url,
        "model": {"name": model.name, "version": model.version, "runtimes": model.runtimes},
        "seed": options.seed,
        "passed": not failed,
        "scenarios": documents,
    }
    _write(options.summary, summary)
    print(f"load: FAILED: {', '.join(failed)}" if failed else "load: every threshold passed")
    return 1 if failed else 0


def _run_scenario(
    service: Service,
    model: ModelDescription,
    scenario: Scenario,
    method: tuple[str, Recompute],
    prefix: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Run a scenario, compare its outputs, and return its document."""
    scenario = with_longest_chunk(scenario, longest_chunk(model))
    load = Load(
        model=model,
        scenario=scenario,
        feeds=make_feeds(model, scenario.longest_steps, options.feed, options.seed),
        prefix=f"{prefix}{scenario.name}-",
        results=Results(scenario),
        random=Random(options.seed),
        retry_s=options.patience_s,
        sleep=gevent.sleep,
    )
    run_scenario(service.url, load)
    compared = compare(load, method, options.compare_streams, options.compare_events)
    return load.results.as_document(compared)


def _write(path: str, summary: dict[str, Any]) -> None:
    text = orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode()
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
        help="another limit; `none` disables it; may be repeated",
    )
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
