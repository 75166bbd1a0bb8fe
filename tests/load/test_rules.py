"""Scenarios, thresholds, streams and retries, without a service."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from random import Random
from typing import Any

import numpy as np
import orjson
import pytest

from service.client import ModelDescription, Output, Problem, read_problem
from tests.load.feeds import Chunk, InputsFeed, make_feeds
from tests.load.results import Compared, Results, read_server_timing_ms
from tests.load.scenarios import (
    SCENARIOS,
    LoadError,
    Scenario,
    Stage,
    Thresholds,
    with_longest_chunk,
    with_options,
)
from tests.load.sender import Load, Sender
from tests.load.stream import Applied, Fault, LoadStream

MODEL = ModelDescription(
    name="probe",
    version="0123456789ab",
    runtimes=("numpy",),
    codes=(0, 4),
    fields=None,
    outputs=(Output("out", (2,), False),),
    is_cut_invariant=True,
    max_body_bytes=100_000,
    max_chunk_steps=50,
    max_predict_steps=1000,
)
FEED = InputsFeed(MODEL, 200, 1)
STEADY = replace(SCENARIOS["steady"], users=1, streams=1, stream_events=10_000)
NO_ANSWER = Problem(0, "no_answer", is_retryable=True)
Step = Problem | Callable[[Any], Any]


def problem(status: int, code: str, **members: Any) -> Problem:
    retryable = status == 503 or code == "conflict"
    return read_problem(status, {"code": code, "retryable": retryable, **members})


OVERLOADED = problem(503, "overloaded")


class Scripted:
    """A service that follows a script, then answers correctly; with a clock of its own."""

    def __init__(self, *script: Step):
        self.script = list(script)
        self.bodies: list[bytes] = []
        self.slept: list[float] = []
        self.now_s = 100.0
        self.position, self.tag = 0, bytes(16)

    def run(self, chunks: int, scenario: Scenario = STEADY, **options: Any) -> list[LoadStream]:
        self.results = Results(scenario)
        load = Load(
            *(MODEL, scenario, [FEED], "s", self.results, Random(3)),
            clock=lambda: self.now_s,
            sleep=self.sleep,
            **options,
        )
        sender = Sender(load)
        for _ in range(chunks):
            sender.send_chunk(self.post)
        return load.streams

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def post(self, path: str, body: bytes) -> tuple[Any, str]:
        self.bodies.append(body)
        self.now_s += 0.01
        self.stream = path.split("/")[-2]
        step = self.script.pop(0) if self.script else self.apply
        if isinstance(step, Problem):
            raise step
        return step(orjson.loads(body)), "queue;dur=1, load;dur=2, infer;dur=3, commit;dur=1"

    def apply(self, body: Any) -> Any:
        """The reply to a chunk, its tag by the protocol's reference."""
        start, rows = self.position, np.array(body["inputs"], "<f4")
        digest = sha256(b"I" + struct.pack("<Q", len(rows)) + rows.tobytes()).digest()
        self.tag = sha256(self.tag + struct.pack("<Q", start) + digest).digest()[:16]
        self.position += len(rows)
        return {
            "model": "probe",
            "stream": self.stream,
            "epoch": "ab" * 8,
            "position": self.position,
            "tag": self.tag.hex(),
            "outputs": {"out": [[0.5, 1.0]] * len(rows)},
            "replayed": False,
            **({"created": True} if start == 0 else {}),
        }


@pytest.mark.parametrize(
    "failure",
    [
        OVERLOADED,
        NO_ANSWER,
        problem(503, "outcome_unknown"),
        problem(409, "conflict"),
        read_problem(429, None),
        read_problem(502, None),
    ],
)
def test_chunk_with_position_is_repeated_unchanged(failure: Problem) -> None:
    service = Scripted(failure, failure)
    service.run(1)
    assert len(set(service.bodies)) == 1
    assert len(service.bodies) == 3
    assert 0 < service.slept[0] < service.slept[1]
    results = service.results
    assert (results.answered, results.errors, results.retries) == (1, 0, 2)
    (latency_ms,) = results.latencies_ms["short"]
    assert latency_ms == pytest.approx(30 + sum(service.slept) * 1000)
    (rest_ms,) = results.stages_ms["rest"]
    assert rest_ms == pytest.approx(10 - 7)


def test_retry_after_is_respected() -> None:
    service = Scripted(problem(503, "overloaded", retry_after_s=3))
    service.run(1)
    assert service.slept == [3]


def test_chunk_is_abandoned_after_the_time_limit() -> None:
    service = Scripted(*[OVERLOADED] * 100)
    (stream,) = service.run(1, retry_s=10)
    assert 10 <= service.now_s - 100 < 13
    assert (service.results.answered, service.results.errors) == (0, 1)
    assert stream.is_closed


@pytest.mark.parametrize(("failure", "repeated"), [(OVERLOADED, True), (NO_ANSWER, False)])
def test_append_is_repeated_only_if_it_was_not_applied(failure: Problem, repeated: bool) -> None:
    service = Scripted(failure)
    service.run(1, replace(STEADY, appends=True))
    assert len(service.bodies) == 1 + repeated
    assert service.results.errors == (not repeated)


@pytest.mark.parametrize(("status", "code"), [(422, "invalid_input"), (404, "model_not_found")])
def test_problem_that_is_not_retryable_is_an_error_at_once(status: int, code: str) -> None:
    service = Scripted(problem(status, code))
    service.run(1)
    assert service.results.errors == len(service.bodies) == 1
    assert service.results.problems == {code: 1}
    assert service.results.faults == {}


def test_chunk_whose_reply_was_lost_and_expired_is_skipped() -> None:
    def applied(body: Any) -> Any:
        service.apply(body)
        raise problem(409, "already_applied", position=service.position)

    service = Scripted(NO_ANSWER, applied)
    (stream,) = service.run(2)
    assert service.results.skipped == service.results.answered == 1
    assert service.results.faults == {}
    assert [each.outputs is None for each in stream.applied] == [True, False]


@pytest.mark.parametrize("code", ["already_applied", "position_behind"])
def test_impossible_position_problem_is_a_fault(code: str) -> None:
    service = Scripted()
    service.script = [service.apply, problem(409, code, position=3)]
    (stream,) = service.run(2)
    assert service.results.faults == {code: 1}
    assert stream.is_closed


@pytest.mark.parametrize("acknowledged", [0, 1])
def test_stream_that_was_rolled_back_continues_from_its_position(acknowledged: int) -> None:
    heads: list[tuple[int, bytes]] = []

    def remember(body: Any) -> Any:
        heads.append((service.position, service.tag))
        return service.apply(body)

    def roll_back(body: Any) -> Any:
        service.position, service.tag = heads[acknowledged]
        tag = service.tag.hex() if acknowledged else None
        raise problem(409, "position_ahead", position=service.position, tag=tag)

    service = Scripted(remember, remember, remember, roll_back)
    (stream,) = service.run(5)
    assert service.results.faults == {"position_ahead": 1}
    assert [each.start for each in stream.applied] == [
        *([0] if acknowledged else []),
        heads[acknowledged][0],
    ]
    assert not stream.is_closed


@pytest.mark.parametrize("position", [1, 10_000])
def test_position_that_no_prefix_gives_is_a_fault(position: int) -> None:
    service = Scripted()
    rejection = problem(409, "position_ahead", position=position, tag="ab" * 16)
    service.script = [service.apply, service.apply, rejection]
    (stream,) = service.run(3)
    assert service.results.faults == {"position_ahead": 1, "no_prefix": 1}
    assert stream.is_closed


def appended(*spans: tuple[int, int], unknown: int = 0) -> LoadStream:
    stream = LoadStream("s", FEED, appends=True, unknown_appends=unknown)
    stream.applied = [
        Applied(Chunk(0, 0, end - start, 0), start, b"", None) for start, end in spans
    ]
    return stream


def test_appends_must_be_contiguous() -> None:
    whole = appended((4, 6), (0, 4), (6, 9)).history()
    assert not isinstance(whole, Fault)
    assert [each.start for each in whole] == [0, 4, 6]
    lost, doubled = appended((0, 4), (5, 6)).history(), appended((0, 4), (3, 6)).history()
    assert isinstance(lost, Fault)
    assert isinstance(doubled, Fault)
    assert (lost.code, doubled.code) == ("lost_chunk", "doubled_chunk")
    cut_off = appended((0, 4), (5, 6), unknown=1).history()
    assert not isinstance(cut_off, Fault)
    assert len(cut_off) == 1


@pytest.mark.parametrize("appends", [False, True])
def test_streams_take_turns_and_are_replaced_when_old(appends: bool) -> None:
    """Without positions two users share the streams; with positions each has its own."""
    scenario = replace(STEADY, users=2, streams=6, stream_events=100, appends=appends)
    load = Load(MODEL, scenario, [FEED], "s", Results(scenario), Random(3))
    senders = [Sender(load), Sender(load)]
    seen: list[set[str]] = [set(), set()]
    for turn in range(300):
        stream = senders[turn % 2]._next_stream()
        assert not stream.is_closed
        seen[turn % 2].add(stream.name)
        load.cut(stream)
    assert (seen[0] & seen[1] != set()) == appends
    assert len(load.streams) > 12
    assert sum(not stream.is_closed for stream in load.streams) <= 6
    assert all(100 <= stream.sent < 132 for stream in load.streams if stream.is_closed)


@pytest.mark.parametrize(
    ("name", "passing", "failing"),
    [
        ("max_error_share", 0.05, 0.04),
        ("max_retry_share", 0.2, 0.19),
        ("max_p95_ms", 96, 95),
        ("max_p99_ms", 99.1, 98),
        ("min_chunks_per_s", 10, 10.1),
        ("min_rate_share", 0.5, 0.51),
        ("min_compared_events", 7, 8),
    ],
)
def test_threshold_passes_up_to_its_limit(name: str, passing: float, failing: float) -> None:
    scenario = replace(STEADY, users=10, duration_s=20, chunks_per_s_per_user=1.0)
    for limit, expected in ((passing, True), (failing, False)):
        results = Results(replace(scenario, thresholds=only(**{name: limit})), wall_s=10.0)
        for latency_ms in range(1, 101):
            results.add_answer(Chunk(0, 0, 2, 0), latency_ms / 1000, 0.0, None)
        results.errors, results.retries = 5, 21
        wrong, check = results.check(Compared("predict", 1, 7, 0.0))
        assert wrong.passed
        assert (check.name, check.limit, check.passed) == (name, limit, expected)
    results.add_fault(Fault("wrong_tag", "here"))
    wrong = results.check(Compared("predict"))[0]
    assert (wrong.value, wrong.passed) == (1, False)


def only(**limits: float) -> Thresholds:
    """No other thresholds than these."""
    return Thresholds(**{**dict.fromkeys(Thresholds.__slots__), **limits})


def test_threshold_without_a_measured_value_fails() -> None:
    results = Results(replace(STEADY, thresholds=only(max_p95_ms=1e9, max_error_share=1.0)))
    wrong, *others = results.check(Compared("predict"))
    assert wrong.passed
    assert [check.passed for check in others] == [False, False]


def test_server_timing_gives_the_known_stages() -> None:
    header = "queue;dur=0.5, load;dur=1.25,infer;dur=2, commit;dur=3.0, other;dur=9, cache"
    assert read_server_timing_ms(header) == {
        "queue": 0.5, "load": 1.25, "infer": 2.0, "commit": 3.0
    }  # fmt: skip
    assert read_server_timing_ms(None) == {}


def test_scheduled_chunks_sum_up_the_stages() -> None:
    stages = (Stage(0.1, 0.5), Stage(1.0, 0.5))
    scenario = replace(STEADY, users=10, duration_s=20, chunks_per_s_per_user=2.0, stages=stages)
    assert scenario.scheduled_chunks == 2.0 * (1 * 10 + 10 * 10)
    assert replace(scenario, chunks_per_s_per_user=None).scheduled_chunks is None


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_shares_of_a_scenario_add_up(scenario: Scenario) -> None:
    assert sum(stage.duration_share for stage in scenario.stages) == pytest.approx(1)
    assert sum(kind.share for kind in scenario.kinds) == pytest.approx(1)


def test_options_change_scenarios() -> None:
    texts = ["max_p95_ms=7", "steady.max_p99_ms=none", "other.max_error_share=1"]
    changed = with_options(STEADY, users=3, duration_s=1.5, thresholds=texts)
    assert (changed.users, changed.duration_s, changed.streams) == (3, 1.5, STEADY.streams)
    assert (changed.thresholds.max_p95_ms, changed.thresholds.max_p99_ms) == (7.0, None)
    assert changed.thresholds.max_error_share == STEADY.thresholds.max_error_share
    assert with_options(STEADY) == STEADY


@pytest.mark.parametrize("text", ["p95=1", "max_p95_ms", "max_p95_ms=fast", "steady.p95=1"])
def test_unknown_threshold_is_rejected(text: str) -> None:
    with pytest.raises(LoadError, match=f"--threshold {text}: expected"):
        with_options(STEADY, thresholds=[text])


def test_events_for_a_model_without_events_are_rejected() -> None:
    with pytest.raises(LoadError, match="takes no events"):
        make_feeds(MODEL, 10, "events", 1)
    (feed,) = make_feeds(MODEL, 10, "both", 1)
    assert feed.member == "inputs"


def test_no_chunk_is_longer_than_the_service_accepts() -> None:
    long = SCENARIOS["long"]
    kinds = with_longest_chunk(long, 500).kinds
    assert kinds == (long.kinds[0], replace(long.kinds[1], min_steps=500, max_steps=500))
