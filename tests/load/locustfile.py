"""Load scenarios for Locust: one user class each, a shape that runs them in turn, and a verdict.

Creates streams with a prefix of its own, and deletes them at the end. Exits with 0 where every
threshold of every scenario passed and no answer was wrong, with 1 where not, with 2 where the load
could not be run, with 130 where it was interrupted.

In Locust's statistics an `attempt` is one request, a `chunk` is one delivery with its retries and
the waits between them. A `stage` is a part of the last attempt, from the Server-Timing header of
its reply; `rest` is what remains of it: HTTP on both sides, the network and the generator itself.
"""

from __future__ import annotations

import secrets
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import gevent
import orjson
from locust import FastHttpUser, LoadTestShape, constant, constant_throughput, events, task
from locust.env import Environment
from locust.stats import StatsEntry

from carry_client import Problem, model_path, read_response
from tests.load.feeds import longest_chunk, make_feeds
from tests.load.recompute import by_oracle, by_service, compare
from tests.load.stream import Streams, WrongAnswerError
from tests.load.target import LoadError, Target, read_server_timing_ms
from tests.load.thresholds import DEFAULTS, Limits, change_limits, check_limits
from tests.support.machine import describe_run

SPAWNED_PER_S = 100
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
}


class ScenarioUser(FastHttpUser):
    """Sends the next chunk once the last is answered.

    Attributes:
        stages: (users, share of the duration), one after another.
        pace: chunks a second of each user; None for as fast as they are answered.
        kinds: shortest and longest chunk of each kind; thresholds are for the first.
        stream_count: how many streams take turns, shared out evenly among the users.
        streams: the streams themselves, and their failures.
        running_s, user_s: how long it ran, and that of its users together.
    """

    abstract = True
    connection_timeout = network_timeout = 30.0
    wait_time = constant(0)
    stages: ClassVar[list[tuple[int, float]]]
    pace: ClassVar[float | None] = None
    kinds: ClassVar[dict[str, tuple[int, int]]] = {"short": (1, 32)}
    stream_count: ClassVar[int]
    stream_events: ClassVar[int] = 2048
    appends: ClassVar[bool] = False
    limits: ClassVar[Limits]
    streams: ClassVar[Streams]
    running_s: ClassVar[float] = 0.0
    user_s: ClassVar[float] = 0.0
    chunks: ClassVar[int] = 0

    @classmethod
    def scenario(cls) -> str:
        """Its name on the command line."""
        return cls.__name__.lower()

    @classmethod
    def users_at(cls, share: float) -> int:
        """How many users there are after a share of the duration."""
        for users, length in cls.stages:
            share -= length
            if share < 0:
                return users
        return cls.stages[-1][0]

    def on_start(self) -> None:
        """Begin with streams of its own, at a random moment of its pace."""
        self.turns = self.streams.new_turns()
        if self.pace is not None:
            gevent.sleep(self.streams.random.uniform(0, 1 / self.pace))
            # starts the pace here; otherwise the second chunk follows the first at once
            self.wait_time()

    def on_stop(self) -> None:
        """Close the connection, which Locust leaves open."""
        self.client.client.close()

    @task
    def send_chunk(self) -> None:
        """Send the next chunk, until it is applied or abandoned."""
        kind = self.next_kind()
        stats, name = self.environment.stats, f"{self.scenario()} {kind}"
        began_s = time.perf_counter()
        try:
            self.streams.send(self.turns, self.kinds[kind], self._post, sleep=gevent.sleep)
        except (Problem, WrongAnswerError) as failure:
            stats.log_error("chunk", name, failure.code)
        else:
            for stage, stage_ms in self.stages_ms.items():
                stats.get(f"{self.scenario()} {stage}", "stage").log(stage_ms, 0)
        stats.get(name, "chunk").log((time.perf_counter() - began_s) * 1000, 0)

    def next_kind(self) -> str:
        """The kind of the next chunk."""
        return "short"

    def _post(self, path: str, body: bytes) -> Any:
        sent_s = time.perf_counter()
        with self.client.post(
            path, data=body, headers=HEADERS, catch_response=True, name=self.scenario()
        ) as response:
            attempt_ms = (time.perf_counter() - sent_s) * 1000
            headers = response.headers or {}
            try:
                if not response.status_code:
                    raise Problem(0, "no_answer", repr(response.error), is_retryable=True)
                document = read_response(
                    response.status_code, headers.get("content-type", ""), response.content or b""
                )
            except Problem as problem:
                response.failure(problem.code)
                raise
        self.stages_ms = read_server_timing_ms(headers.get("server-timing"))
        if self.stages_ms:
            self.stages_ms["rest"] = attempt_ms - sum(self.stages_ms.values())
        return document


class Steady(ScenarioUser):
    """An even pace, each stream in turn."""

    stages: ClassVar = [(16, 1.0)]
    pace, wait_time = 4.0, constant_throughput(4.0)
    stream_count = 160
    limits: ClassVar = {**DEFAULTS, "max_retry_share": 0.001, "min_rate_share": 0.9}


class Ramp(ScenarioUser):
    """More and more users, each as fast as it is answered."""

    stages: ClassVar = [(users, 0.2) for users in (5, 12, 24, 36, 48)]
    stream_count = 480
    limits: ClassVar = {**DEFAULTS, "min_chunks_per_s": 100.0}


class Burst(ScenarioUser):
    """Few users at an even pace, and three times suddenly ten times as many."""

    stages: ClassVar = [*[(6, 0.2), (60, 0.1)] * 3, (6, 0.1)]
    pace, wait_time = 2.0, constant_throughput(2.0)
    stream_count = 240
    limits: ClassVar = {**DEFAULTS, "min_rate_share": 0.8}


class Hot(ScenarioUser):
    """All users append to the same streams at once."""

    stages: ClassVar = [(16, 1.0)]
    stream_count, stream_events, appends = 4, 8192, True
    limits: ClassVar = {**DEFAULTS, "min_chunks_per_s": 50.0}


class Cold(ScenarioUser):
    """Many streams, each used rarely."""

    stages: ClassVar = [(16, 1.0)]
    stream_count = 20_000
    kinds: ClassVar = {"short": (1, 8)}
    limits: ClassVar = {
        **DEFAULTS,
        "max_retry_share": 0.001,
        "min_chunks_per_s": 100.0,
        "min_compared_events": 30.0,
    }


class Long(ScenarioUser):
    """Chunks of thousands of events among short ones, whose latency is limited."""

    stages: ClassVar = [(16, 1.0)]
    pace, wait_time = 2.0, constant_throughput(2.0)
    stream_count, stream_events = 160, 16_384
    kinds: ClassVar = {"short": (1, 32), "long": (1000, 8000)}
    limits: ClassVar = {**DEFAULTS, "max_p99_ms": 750.0, "min_rate_share": 0.9}

    def next_kind(self) -> str:
        """Every fiftieth chunk is long."""
        Long.chunks += 1
        return "long" if Long.chunks % 50 == 10 else "short"


SCENARIOS: dict[str, type[ScenarioUser]] = {
    each.scenario(): each for each in (Steady, Ramp, Burst, Hot, Cold, Long)
}


class InTurn(LoadTestShape):
    """The stages of each scenario, one scenario after another.

    Attributes:
        waiting: scenarios that have not ended, the first of them running.
    """

    use_common_options = True
    waiting: ClassVar[list[type[ScenarioUser]]]
    duration_s: ClassVar[float]

    def __init__(self) -> None:
        super().__init__()
        self._began_s: float | None = None
        self._last_s = 0.0

    def tick(self) -> tuple[int, float] | tuple[int, float, list[type[ScenarioUser]]] | None:
        """The users of the present stage; Locust asks once a second."""
        now_s, users, user_class = (
            self.get_run_time(),
            self.get_current_user_count(),
            self.waiting[0],
        )
        if self._began_s is not None:
            user_class.running_s += now_s - self._last_s
            user_class.user_s += (now_s - self._last_s) * users
            if now_s - self._began_s >= self.duration_s:
                self._began_s = None
                del self.waiting[0]
                return (0, SPAWNED_PER_S) if self.waiting else None
        if self._began_s is None:
            if users > 0:
                # Locust starts users of another class, but stops none for them
                return 0, SPAWNED_PER_S
            self._began_s = now_s
        self._last_s = now_s
        share = (now_s - self._began_s) / self.duration_s
        return user_class.users_at(share), SPAWNED_PER_S, [user_class]


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
        _prepare(environment, options, Target(options.url))
    except LoadError as error:
        print(f"load: {error}", file=sys.stderr)
        sys.exit(2)


def _prepare(environment: Environment, options: Namespace, target: Target) -> None:
    unknown = [name for name in options.scenario if name not in SCENARIOS]
    if unknown:
        raise LoadError(f"--scenario {unknown[0]}: expected one of {', '.join(SCENARIOS)}")
    chosen = [SCENARIOS[name] for name in options.scenario or SCENARIOS]
    model = target.describe(options.model)
    prefix = f"load-{secrets.token_hex(4)}-"
    for each in chosen:
        each.limits = change_limits(each.scenario(), each.limits, options.threshold)
        if options.num_users:
            height = max(users for users, _ in each.stages)
            each.stages = [
                (max(1, round(users * options.num_users / height)), share)
                for users, share in each.stages
            ]
        longest = longest_chunk(model)
        each.kinds = {
            kind: (min(shortest, longest), min(most, longest))
            for kind, (shortest, most) in each.kinds.items()
        }
        height = max(users for users, _ in each.stages)
        each.streams = Streams(
            model=model,
            feeds=make_feeds(
                model, max(most for _, most in each.kinds.values()), options.feed, options.seed
            ),
            prefix=f"{prefix}{each.scenario()}-",
            random=Random(options.seed),
            stream_events=each.stream_events,
            appends=each.appends,
            capacity=each.stream_count if each.appends else max(1, each.stream_count // height),
            retry_s=options.patience_s,
        )
    environment.host = target.url
    environment.user_classes = chosen
    InTurn.waiting, InTurn.duration_s = [*chosen], options.duration_s
    method = (
        by_service(target.post, model)
        if options.artifact is None
        else by_oracle(options.artifact, model)
    )
    run = {
        **describe_run(),
        "url": target.url,
        "model": {"name": model.name, "version": model.version, "runtimes": model.runtimes},
        "seed": options.seed,
    }
    print(f"{run['date']}, commit {run['commit']}, {run['machine']}")
    print(f"{target.url}: model {model.name} {model.version} on {', '.join(model.runtimes)}")
    summary: dict[str, Any] = {}

    def finish(**_: Any) -> None:
        """Compare outputs, delete the streams, and decide."""
        try:
            try:
                documents = [_check(environment, each, method, options) for each in chosen]
            finally:
                if not options.keep:
                    target.request("DELETE", f"{model_path(model.name)}/streams", prefix=prefix)
        except LoadError as error:
            print(f"load: {error}", file=sys.stderr)
            return
        crashes = [each["msg"] for each in environment.runner.exceptions.values()]
        failed = [each["scenario"] for each in documents if not each["passed"]]
        failed += ["the load test itself"] * bool(crashes)
        summary.update(
            run,
            passed=not failed,
            failed=failed,
            crashes=crashes,
            scenarios=documents,
            statistics=[entry.to_dict() for entry in environment.stats.entries.values()],
        )
        environment.process_exit_code = 130 if InTurn.waiting else int(bool(failed))

    def report(**_: Any) -> None:
        """Print the verdict after Locust's statistics."""
        if summary:
            print("\n".join(_describe(summary)))
            _write(options.summary, summary)
            verdict = f"FAILED: {', '.join(summary['failed'])}"
            verdict = verdict if summary["failed"] else "every threshold passed"
            print("load: interrupted" if InTurn.waiting else f"load: {verdict}")

    environment.events.quitting.add_listener(finish)
    environment.events.quit.add_listener(report)


def _check(
    environment: Environment, user_class: type[ScenarioUser], method: Any, options: Namespace
) -> dict[str, Any]:
    """Compare a scenario's outputs, check its thresholds, and return its document."""
    streams, name = user_class.streams, user_class.scenario()
    compared = compare(streams, method, int(options.compare_streams), int(options.compare_events))
    entries = [environment.stats.get(f"{name} {kind}", "chunk") for kind in user_class.kinds]
    attempts = environment.stats.get(name, "POST").num_requests
    chunks = sum(entry.num_requests for entry in entries)
    errors = sum(entry.num_failures for entry in entries)
    scheduled = user_class.user_s * (user_class.pace or 0.0)
    values = {
        "max_wrong_answers": streams.wrong_answers.total(),
        "max_error_share": _ratio(errors, chunks),
        "max_retry_share": _ratio(attempts - chunks, chunks),
        "max_p95_ms": _percentile(entries[0], 0.95),
        "max_p99_ms": _percentile(entries[0], 0.99),
        "min_chunks_per_s": _ratio(chunks - errors, user_class.running_s),
        "min_rate_share": _ratio(chunks - errors, scheduled),
        "min_compared_events": compared.events,
    }
    checks = check_limits(user_class.limits, values)
    return {
        "scenario": name,
        "passed": all(check.passed for check in checks),
        "users": max(users for users, _ in user_class.stages),
        "duration_s": user_class.running_s,
        "chunks": chunks,
        "errors": errors,
        "retries": attempts - chunks,
        "streams": len(streams.every),
        "wrong_answers": dict(streams.wrong_answers),
        "examples": streams.examples,
        "compared": compared._asdict(),
        "thresholds": [check._asdict() for check in checks],
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percentile(entry: StatsEntry, share: float) -> float | None:
    return float(entry.get_response_time_percentile(share)) if entry.num_requests else None


def _describe(summary: dict[str, Any]) -> list[str]:
    lines = [f"the load test failed: {crash}" for crash in summary["crashes"]]
    for document in summary["scenarios"]:
        compared = document["compared"]
        lines.append(
            f"{document['scenario']}: {document['chunks']:,} chunks of {document['streams']:,} "
            f"streams; compared {compared['events']:,} events of {compared['streams']} by "
            f"{compared['how']}: |a-b| - 1e-5|b| at most {compared['excess']:.1e}"
        )
        for code, examples in document["examples"].items():
            lines += [f"  {code}: {example}" for example in examples]
        for check in document["thresholds"]:
            value = "nothing measured" if check["value"] is None else f"{check['value']:,.6g}"
            verdict = "passed" if check["passed"] else "FAILED"
            lines.append(f"  {check['name']:20} {check['limit']:>10,.6g}  {verdict}  {value}")
    return lines


def _write(path: str, summary: dict[str, Any]) -> None:
    text = orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode()
    if path == "-":
        print(text)
        return
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"summary: {file}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError("expected a number above 0")
    return value
