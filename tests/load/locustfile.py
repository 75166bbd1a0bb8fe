"""Load test of a running service: options, preparation and verdict, for Locust.

Creates streams with a prefix of its own, and deletes them at the end. Exits with 0 where every
threshold of every scenario passed and no answer was wrong, with 1 where not, with 2 where the load
could not be run, with 130 where it was interrupted.
"""

import secrets
import signal
import sys
from argparse import ArgumentTypeError, Namespace
from random import Random
from typing import Any

from locust import events
from locust.env import Environment

from carry_client import Carry, CarryError, ModelDescription, NoAnswer, Retry
from tests.load.feeds import longest_chunk, make_feeds
from tests.load.scenarios import Burst, Cold, Hot, InTurn, Long, Ramp, ScenarioUser, Steady
from tests.load.streams import (
    EXAMPLE,
    RETRY_S,
    Streams,
    check_limits,
    default_model,
    parse_threshold,
)
from tests.support.machine import describe_run

TIMEOUT_S = 120.0
COMPARED_STREAMS = 64
SCENARIOS: dict[str, type[ScenarioUser]] = {
    each.scenario(): each for each in (Steady, Ramp, Burst, Hot, Cold, Long)
}


@events.init_command_line_parser.add_listener
def add_options(parser: Any, **_: Any) -> None:
    """The options beside Locust's own, of which `--users` replaces each scenario's number."""
    add = parser.add_argument_group("Load tests").add_argument
    more = {"action": "append", "default": []}
    limit = {"type": parse_threshold, "metavar": "[SCENARIO.]NAME=VALUE"}
    add("--url", env_var="CARRY_LOAD_URL", default="http://127.0.0.1:8000", help="the service")
    add("--model", help=f"its model; default: the only one, or {EXAMPLE}")
    add("--scenario", **more, choices=SCENARIOS, help="may be repeated; every one by default")
    add("--duration-s", type=_positive, default=30.0, help="of each scenario")
    add("--threshold", **more, **limit, help="another limit; `none` disables it; may be repeated")
    add("--seed", type=int, default=1, help="of the events and the cuts")
    add("--keep", action="store_true", help="leave the streams in the service")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError("expected a number above 0")
    return value


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Describe the model, and prepare the scenarios; exit with 2 where that is impossible."""
    options = environment.parsed_options
    # until there is a verdict
    environment.process_exit_code = 2
    # Locust itself handles SIGTERM only after the shape has ended
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    environment.stop_timeout = RETRY_S + ScenarioUser.network_timeout
    try:
        load = Load(options)
    except CarryError as error:
        print(f"load: {error}", file=sys.stderr)
        sys.exit(2)
    environment.host, environment.user_classes = options.url, load.scenarios
    InTurn.waiting, InTurn.duration_s = [*load.scenarios], options.duration_s

    def finish(**_: Any) -> None:
        """Compare outputs, delete the streams, and decide; print it after Locust's statistics."""
        try:
            report, is_passed = load.finish(environment)
        except CarryError as error:
            print(f"load: {error}", file=sys.stderr)
            return
        environment.process_exit_code = 130 if InTurn.waiting else int(not is_passed)
        environment.events.quit.add_listener(lambda **_: print(report))

    environment.events.quitting.add_listener(finish)


class LoadError(CarryError):
    """The load cannot be run; the message is one sentence for the person who started it."""


class Load:
    """A load test of one service."""

    def __init__(self, options: Namespace):
        """Prepare the scenarios; raises LoadError where an option is wrong, or nothing answers."""
        self.options = options
        self.scenarios = [SCENARIOS[name] for name in options.scenario or SCENARIOS]
        self.prefix = f"load-{secrets.token_hex(4)}-"
        self.carry = Carry(options.url, timeout_s=TIMEOUT_S, deadline_s=RETRY_S, encoding="json")
        try:
            served = [each["name"] for each in self.carry.request("GET", "/v1/models")["models"]]
        except NoAnswer as problem:
            raise LoadError(
                f"nothing answers at {options.url} ({problem.detail}); start the service with "
                "`make run`, or name another address with --url"
            ) from problem
        name = options.model or default_model(served)
        if name not in served:
            raise LoadError(f"--model {name!r}: expected one of {', '.join(served) or 'none'}")
        self.model = self.carry.model(name)
        model = self.model.describe()
        for scenario in self.scenarios:
            self._prepare(scenario, model)
        run = describe_run()
        print(f"{run['date']}, commit {run['commit']}, {run['machine']}, seed {options.seed}")
        print(f"{options.url}: model {model.name} {model.version} on {', '.join(model.runtimes)}")

    def _prepare(self, scenario: type[ScenarioUser], model: ModelDescription) -> None:
        """Apply the options and the model's limits to a scenario, and create its streams."""
        options, name, longest = self.options, scenario.scenario(), longest_chunk(model)
        for of_scenario, limit, value in options.threshold:
            if of_scenario in ("", name):
                scenario.limits[limit] = value
        if options.num_users:
            factor = options.num_users / scenario.most_users()
            scenario.stages = [(max(1, round(n * factor)), share) for n, share in scenario.stages]
        scenario.kinds = {
            kind: (min(shortest, longest), min(most, longest))
            for kind, (shortest, most) in scenario.kinds.items()
        }
        longest = max(most for _, most in scenario.kinds.values())
        shared = 1 if scenario.appends else scenario.most_users()
        scenario.streams = Streams(
            model=model,
            feeds=make_feeds(model, longest, options.seed),
            prefix=f"{self.prefix}{name}-",
            random=Random(options.seed),
            stream_events=scenario.stream_events,
            appends=scenario.appends,
            capacity=max(1, scenario.stream_count // shared),
        )

    def _post(self, path: str, body: bytes) -> Any:
        return Retry(RETRY_S).run(lambda: self.carry.request("POST", path, body))

    def finish(self, environment: Environment) -> tuple[str, bool]:
        """Compare outputs and delete the streams: a report, and the verdict."""
        try:
            results = {each.scenario(): self._check(environment, each) for each in self.scenarios}
        finally:
            if not self.options.keep:
                self.model.delete_streams(self.prefix)
        crashes = [each["msg"] for each in environment.runner.exceptions.values()]
        failed = [name for name, (_, is_passed) in results.items() if not is_passed]
        failed += ["the load test itself"] * bool(crashes)
        verdict = f"FAILED: {', '.join(failed)}" if failed else "every threshold passed"
        verdict = f"load: {'interrupted' if InTurn.waiting else verdict}"
        crashed = [f"the load test failed: {crash}" for crash in crashes]
        reports = [report for report, _ in results.values()]
        return "\n".join([*crashed, *reports, verdict]), not failed

    def _check(self, environment: Environment, scenario: type[ScenarioUser]) -> tuple[str, bool]:
        """Compare a scenario's outputs and check its thresholds: a report with its first failures,
        and the verdict."""
        streams, name, stats = scenario.streams, scenario.scenario(), environment.stats
        compared = streams.compare(self._post, COMPARED_STREAMS)
        entries = [stats.get(f"{name} {kind}", "chunk") for kind in scenario.kinds]
        chunks = sum(entry.num_requests for entry in entries)
        retries = stats.get(name, "POST").num_requests - chunks
        errors = sum(entry.num_failures for entry in entries)
        first, duration_s = entries[0], self.options.duration_s
        users = sum(count * share for count, share in scenario.stages)
        p95_ms, p99_ms = (
            first.get_response_time_percentile(share) if first.num_requests else None
            for share in (0.95, 0.99)
        )
        values = {
            "max_wrong_answers": streams.wrong_answers.total(),
            "max_error_share": _ratio(errors, chunks),
            "max_retry_share": _ratio(retries, chunks),
            "max_p95_ms": p95_ms,
            "max_p99_ms": p99_ms,
            "min_chunks_per_s": (chunks - errors) / duration_s,
            "min_rate_share": _ratio(chunks - errors, users * duration_s * scenario.pace),
            "min_compared_events": compared,
        }
        checks = check_limits({"max_wrong_answers": 0.0, **scenario.limits}, values)
        lines = [
            f"{name}: {chunks:,} chunks of {len(streams.every):,} streams; "
            f"compared {compared:,} events"
        ]
        for code, examples in streams.examples.items():
            lines += [f"  {code}: {example}" for example in examples]
        lines += [f"  {check}" for check in checks]
        return "\n".join(lines), all(check.passed for check in checks)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
