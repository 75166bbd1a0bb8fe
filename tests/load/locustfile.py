"""Load test of a running service: options, preparation and verdict, for Locust.

Creates streams with a prefix of its own, and deletes them at the end. Exits with 0 where every
threshold of every scenario passed and no answer was wrong, with 1 where not, with 2 where the load
could not be run, with 130 where it was interrupted.
"""

from __future__ import annotations

import secrets
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from random import Random
from typing import Any

import orjson
from locust import events
from locust.env import Environment

from carry_client import Carry, CarryError, Model, ModelDescription, NoAnswer, Retry
from tests.load.feeds import longest_chunk, make_feeds
from tests.load.recompute import by_oracle, by_service, compare
from tests.load.scenarios import Burst, Cold, Hot, InTurn, Long, Ramp, ScenarioUser, Steady
from tests.load.streams import Streams
from tests.load.verdict import LoadError, change_limits, check_limits, format_scenario
from tests.support.machine import describe_run

TIMEOUT_S, RETRY_S = 120.0, 30.0
SCENARIOS: dict[str, type[ScenarioUser]] = {
    each.scenario(): each for each in (Steady, Ramp, Burst, Hot, Cold, Long)
}


@events.init_command_line_parser.add_listener
def add_options(parser: Any, **_: Any) -> None:
    """The options beside Locust's own, of which `--users` replaces each scenario's number."""
    add = parser.add_argument_group("Load tests").add_argument
    add("--url", env_var="CARRY_LOAD_URL", default="http://127.0.0.1:8000", help="the service")
    add("--model", help="its model; may be left out where it serves one")
    add("--scenario", action="append", default=[], help="may be repeated; every one by default")
    add("--duration-s", type=_positive, default=30.0, help="of each scenario")
    add(
        "--threshold",
        action="append",
        default=[],
        metavar="[SCENARIO.]NAME=VALUE",
        help="another limit; `none` disables it; may be repeated",
    )
    add("--feed", choices=("both", "inputs", "events"), default="both", help="what streams send")
    add("--artifact", type=Path, help="the model's directory: compare with a float64 network")
    add("--compare-streams", type=_positive, default=64, help="how many are compared")
    add("--compare-events", type=_positive, default=10_000, help="of each stream, at most")
    add("--patience-s", type=_positive, default=30.0, help="how long one chunk is tried")
    add("--seed", type=int, default=1, help="of the events and the cuts")
    add("--summary", default=".carry/load-summary.json", help="a JSON file; - for the output")
    add("--keep", action="store_true", help="leave the streams in the service")


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Describe the model, and prepare the scenarios; exit with 2 where that is impossible."""
    options = environment.parsed_options
    # until there is a verdict
    environment.process_exit_code = 2
    # Locust itself handles SIGTERM only after the shape has ended
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    environment.stop_timeout = options.patience_s + ScenarioUser.network_timeout
    try:
        load = Load(options)
    except (LoadError, CarryError) as error:
        print(f"load: {error}", file=sys.stderr)
        sys.exit(2)
    environment.host, environment.user_classes = options.url, load.scenarios
    InTurn.waiting, InTurn.duration_s = [*load.scenarios], options.duration_s

    def finish(**_: Any) -> None:
        """Compare outputs, delete the streams, and decide; print it after Locust's statistics."""
        try:
            report, is_passed = load.finish(environment)
        except (LoadError, CarryError) as error:
            print(f"load: {error}", file=sys.stderr)
            return
        environment.process_exit_code = 130 if InTurn.waiting else int(not is_passed)
        environment.events.quit.add_listener(lambda **_: print(report))

    environment.events.quitting.add_listener(finish)


class Load:
    """A load test of one service."""

    def __init__(self, options: Namespace):
        """Prepare the scenarios.

        Raises:
            LoadError: an option is wrong, or nothing answers.
        """
        unknown = [name for name in options.scenario if name not in SCENARIOS]
        if unknown:
            raise LoadError(f"--scenario {unknown[0]}: expected one of {', '.join(SCENARIOS)}")
        self.options = options
        self.scenarios = [SCENARIOS[name] for name in options.scenario or SCENARIOS]
        self.prefix = f"load-{secrets.token_hex(4)}-"
        self.carry = Carry(options.url, timeout_s=TIMEOUT_S, deadline_s=RETRY_S, encoding="json")
        self.model = self._choose_model()
        model = self.model.describe()
        for scenario in self.scenarios:
            self._prepare(scenario, model)
        self.method = by_service(self._post, model)
        if options.artifact:
            self.method = by_oracle(options.artifact, model)
        self.run = {
            **describe_run(),
            "url": self.carry.url,
            "model": {"name": model.name, "version": model.version, "runtimes": model.runtimes},
            "seed": options.seed,
        }
        print(f"{self.run['date']}, commit {self.run['commit']}, {self.run['machine']}")
        print(f"{options.url}: model {model.name} {model.version} on {', '.join(model.runtimes)}")

    def _choose_model(self) -> Model:
        """The model of that name; without one, the only one that is served."""
        try:
            self.carry.request("GET", "/v1/models")
        except NoAnswer as problem:
            raise LoadError(
                f"nothing answers at {self.carry.url} ({problem.detail}); start the service with "
                "`make run`, or name another address with --url"
            ) from problem
        served, name = [model.name for model in self.carry.models()], self.options.model
        if name not in served and (name or len(served) != 1):
            wanted = f"--model {name}: served are" if name else "--model: choose one of"
            raise LoadError(f"{wanted} {', '.join(served) or 'none'}")
        return self.carry.model(name or served[0])

    def _prepare(self, scenario: type[ScenarioUser], model: ModelDescription) -> None:
        """Apply the options and the model's limits to a scenario, and create its streams."""
        options, name = self.options, scenario.scenario()
        scenario.limits = change_limits(name, scenario.limits, options.threshold)
        if options.num_users:
            factor = options.num_users / scenario.most_users()
            scenario.stages = [
                (max(1, round(users * factor)), share) for users, share in scenario.stages
            ]
        longest = longest_chunk(model)
        scenario.kinds = {
            kind: (min(shortest, longest), min(most, longest))
            for kind, (shortest, most) in scenario.kinds.items()
        }
        longest = max(most for _, most in scenario.kinds.values())
        shared = 1 if scenario.appends else scenario.most_users()
        scenario.streams = Streams(
            model=model,
            feeds=make_feeds(model, longest, options.feed, options.seed),
            prefix=f"{self.prefix}{name}-",
            random=Random(options.seed),
            stream_events=scenario.stream_events,
            appends=scenario.appends,
            capacity=max(1, scenario.stream_count // shared),
            retry_s=options.patience_s,
        )

    def _post(self, path: str, body: Any) -> Any:
        return Retry(RETRY_S).run(lambda: self.carry.request("POST", path, body))

    def finish(self, environment: Environment) -> tuple[str, bool]:
        """Compare outputs, delete the streams and write the summary: a report, and the verdict."""
        try:
            reports, documents = zip(
                *(self._check(environment, each) for each in self.scenarios), strict=True
            )
        finally:
            if not self.options.keep:
                self.model.delete_streams(self.prefix)
        crashes = [each["msg"] for each in environment.runner.exceptions.values()]
        failed = [each["scenario"] for each in documents if not each["passed"]]
        failed += ["the load test itself"] * bool(crashes)
        summary = {
            **self.run,
            "passed": not failed,
            "failed": failed,
            "crashes": crashes,
            "scenarios": documents,
            "statistics": [entry.to_dict() for entry in environment.stats.entries.values()],
        }
        text = orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode()
        if self.options.summary != "-":
            file = Path(self.options.summary)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n", encoding="utf-8")
            text = f"summary: {file}"
        verdict = f"FAILED: {', '.join(failed)}" if failed else "every threshold passed"
        verdict = f"load: {'interrupted' if InTurn.waiting else verdict}"
        crashed = [f"the load test failed: {crash}" for crash in crashes]
        return "\n".join([*crashed, *reports, text, verdict]), not failed

    def _check(
        self, environment: Environment, scenario: type[ScenarioUser]
    ) -> tuple[str, dict[str, Any]]:
        """Compare a scenario's outputs and check its thresholds: a report, and its document."""
        streams, name, stats = scenario.streams, scenario.scenario(), environment.stats
        limits = int(self.options.compare_streams), int(self.options.compare_events)
        compared = compare(streams, self.method, *limits)
        entries = [stats.get(f"{name} {kind}", "chunk") for kind in scenario.kinds]
        attempts = stats.get(name, "POST").num_requests
        chunks = sum(entry.num_requests for entry in entries)
        errors = sum(entry.num_failures for entry in entries)
        first, scheduled = entries[0], scenario.user_s * scenario.pace
        p95_ms, p99_ms = (
            first.get_response_time_percentile(share) if first.num_requests else None
            for share in (0.95, 0.99)
        )
        values = {
            "max_wrong_answers": streams.wrong_answers.total(),
            "max_error_share": _ratio(errors, chunks),
            "max_retry_share": _ratio(attempts - chunks, chunks),
            "max_p95_ms": p95_ms,
            "max_p99_ms": p99_ms,
            "min_chunks_per_s": _ratio(chunks - errors, scenario.running_s),
            "min_rate_share": _ratio(chunks - errors, scheduled),
            "min_compared_events": compared.events,
        }
        checks = check_limits({"max_wrong_answers": 0.0, **scenario.limits}, values)
        document = {
            "scenario": name,
            "passed": all(check.passed for check in checks),
            "users": scenario.most_users(),
            "duration_s": scenario.running_s,
            "chunks": chunks,
            "errors": errors,
            "retries": attempts - chunks,
            "streams": len(streams.every),
            "wrong_answers": dict(streams.wrong_answers),
            "examples": streams.examples,
            "compared": compared._asdict(),
            "thresholds": [check._asdict() for check in checks],
        }
        return format_scenario(document, checks), document


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError("expected a number above 0")
    return value
