"""Scenarios, thresholds, streams and retries, without a service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from tests.load.description import Description, Output
from tests.load.measures import Compared, Measures, findings, server_timing_ms
from tests.load.scenarios import (
    LoadError,
    Scenario,
    Stage,
    Thresholds,
    fitted,
    overridden,
    read_scenarios,
)
from tests.load.sender import Answer, Sender
from tests.load.service import Service
from tests.load.streams import Applied, Fault, Population, Stream
from tests.load.tape import Chunk, InputsTape, next_tag, tapes_of

MODEL = Description(
    name="probe",
    version="0123456789ab",
    runtimes=("numpy",),
    codes=(0, 4),
    fields=None,
    outputs=(Output("out", (2,), True),),
    invisible=True,
    max_body_bytes=100_000,
    max_chunk_steps=50,
    max_predict_steps=1000,
)
TAPE = InputsTape(MODEL, 200, 1)
STEADY = read_scenarios()["steady"]


class Scripted:
    """A service that follows a script, then answers as it should; and a clock beside it."""

    def __init__(self, *script: Callable[[Any], Answer] | Answer):
        self.script = list(script)
        self.bodies: list[bytes] = []
        self.slept: list[float] = []
        self.now_s = 100.0
        self.position = 0
        self.tag = bytes(16)
        self.measures = Measures([kind.name for kind in STEADY.kinds])

    def run(self, chunks: int, scenario: Scenario = STEADY, **options: Any) -> Population:
        population = Population(
            [TAPE], prefix="s", count=1, stream_events=10_000, appends=scenario.appends, keep=9,
            seed=1,
        )  # fmt: skip
        sender = Sender(
            model=MODEL,
            scenario=scenario,
            population=population,
            measures=self.measures,
            random=Random(3),
            clock=lambda: self.now_s,
            sleep=self.sleep,
            **options,
        )
        self.population = population
        for _ in range(chunks):
            sender.send(self.post)
        return population

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def post(self, path: str, body: bytes) -> Answer:
        self.bodies.append(body)
        self.now_s += 0.01
        step = self.script.pop(0) if self.script else self.apply
        return step(orjson.loads(body)) if callable(step) else step

    def apply(self, body: Any, **changes: Any) -> Answer:
        start, steps = self.position, len(body["inputs"])
        stream = self.population.kept[-1]
        if not stream.appends:
            chunk = Chunk(0, self._offset(body), steps, 0)
            self.tag = next_tag(self.tag, start, TAPE, chunk)
        self.position += steps
        reply = {
            "model": "probe",
            "stream": stream.name,
            "epoch": "ab" * 8,
            "position": self.position,
            "tag": self.tag.hex(),
            "outputs": {"out": [[0.5, 1.0]] * steps},
            "replayed": False,
            **({"created": True} if start == 0 else {}),
            **changes,
        }
        return Answer(
            200, orjson.dumps(reply), "queue;dur=1, load;dur=2, infer;dur=3, commit;dur=1"
        )

    def _offset(self, body: Any) -> int:
        first = orjson.dumps(body["inputs"])[1:-1]
        (offset,) = [
            index
            for index in range(TAPE.length)
            if TAPE.json(Chunk(0, index, len(body["inputs"]), 0)) == first
        ]
        return offset


def problem(status: int, code: str, **facts: Any) -> Answer:
    retryable = status == 503 or code == "conflict"
    return Answer(status, orjson.dumps({"code": code, "retryable": retryable, **facts}))


OVERLOADED = problem(503, "overloaded")
LOST = Answer(0, b"connection reset")


@pytest.mark.parametrize(
    "failure",
    [
        OVERLOADED,
        LOST,
        problem(503, "outcome_unknown"),
        problem(409, "conflict"),
        Answer(429, b"slow down"),
        Answer(502, b"<html>"),
    ],
)
def test_a_chunk_with_a_position_is_sent_again_as_it_is(failure: Answer) -> None:
    service = Scripted(failure, failure)
    service.run(1)
    assert len(set(service.bodies)) == 1
    assert len(service.bodies) == 3
    assert 0 < service.slept[0] < service.slept[1]
    measures = service.measures
    assert (measures.answered, measures.errors, measures.retries) == (1, 0, 2)
    (latency_ms,) = measures.latencies_ms["short"]
    assert latency_ms == pytest.approx(30 + sum(service.slept) * 1000)
    (rest_ms,) = measures.parts_ms["rest"]
    assert rest_ms == pytest.approx(10 - 7)


def test_the_service_is_left_alone_for_as_long_as_it_asks() -> None:
    service = Scripted(problem(503, "overloaded", retry_after_s=3))
    service.run(1)
    assert service.slept == [3]


def test_patience_comes_to_an_end() -> None:
    service = Scripted(*[OVERLOADED] * 100)
    population = service.run(1, patience_s=10)
    assert 10 <= service.now_s - 100 < 13
    assert (service.measures.answered, service.measures.errors) == (0, 1)
    assert population.kept[0].left


@pytest.mark.parametrize(("failure", "again"), [(OVERLOADED, True), (LOST, False)])
def test_an_append_is_sent_again_only_if_it_was_not_applied(failure: Answer, again: bool) -> None:
    service = Scripted(failure)
    service.run(1, replace(STEADY, delivery="appends"))
    assert len(service.bodies) == 1 + again
    assert service.measures.errors == (not again)


@pytest.mark.parametrize(("status", "code"), [(422, "invalid_input"), (404, "model_not_found")])
def test_what_will_not_pass_is_an_error_at_once(status: int, code: str) -> None:
    service = Scripted(problem(status, code))
    service.run(1)
    assert service.measures.errors == len(service.bodies) == 1
    assert service.measures.problems == {code: 1}
    assert service.measures.faults == {}


def test_a_chunk_applied_while_nobody_listened_is_skipped() -> None:
    def applied(body: Any) -> Answer:
        service.apply(body)
        return problem(409, "already_applied", position=service.position)

    service = Scripted(LOST, applied)
    population = service.run(2)
    assert service.measures.skipped == service.measures.answered == 1
    assert service.measures.faults == {}
    assert [each.outputs is None for each in population.kept[0].applied] == [True, False]


@pytest.mark.parametrize("code", ["already_applied", "position_behind"])
def test_a_refusal_that_cannot_be_is_a_wrong_answer(code: str) -> None:
    service = Scripted()
    service.script = [service.apply, problem(409, code, position=3)]
    population = service.run(2)
    assert service.measures.faults == {code: 1}
    assert population.kept[0].left


def test_a_stream_that_fell_back_goes_on_from_there() -> None:
    heads: list[tuple[int, bytes]] = []

    def remember(body: Any) -> Answer:
        heads.append((service.position, service.tag))
        return service.apply(body)

    def fall_back(body: Any) -> Answer:
        service.position, service.tag = heads[1]
        return problem(409, "position_ahead", position=service.position, tag=service.tag.hex())

    service = Scripted(remember, remember, remember, fall_back)
    population = service.run(5)
    assert service.measures.faults == {"position_ahead": 1}
    (stream,) = population.kept
    assert [each.start for each in stream.applied] == [0, heads[1][0]]
    assert not stream.left


def test_a_stream_that_is_gone_begins_anew() -> None:
    def gone(body: Any) -> Answer:
        service.position, service.tag = 0, bytes(16)
        return problem(409, "position_ahead", position=0, tag=None)

    service = Scripted()
    service.script = [service.apply, service.apply, gone]
    population = service.run(5)
    assert service.measures.faults == {"position_ahead": 1}
    first, second = population.kept[0].applied
    assert (first.start, second.start) == (0, first.chunk.steps)


@pytest.mark.parametrize("position", [1, 10_000])
def test_a_state_that_no_prefix_gives_is_a_fault(position: int) -> None:
    service = Scripted()
    refusal = problem(409, "position_ahead", position=position, tag="ab" * 16)
    service.script = [service.apply, service.apply, refusal]
    population = service.run(3)
    assert service.measures.faults == {"position_ahead": 1, "no_prefix": 1}
    assert population.kept[0].left


def laid(*spans: tuple[int, int], doubtful: int = 0) -> Stream:
    stream = Stream("s", TAPE, appends=True, doubtful=doubtful)
    stream.applied = [
        Applied(Chunk(0, 0, end - start, 0), start, b"", None) for start, end in spans
    ]
    return stream


def test_appends_must_lie_end_to_end() -> None:
    whole = laid((4, 6), (0, 4), (6, 9)).history()
    assert not isinstance(whole, Fault)
    assert [each.start for each in whole] == [0, 4, 6]
    lost, doubled = laid((0, 4), (5, 6)).history(), laid((0, 4), (3, 6)).history()
    assert isinstance(lost, Fault)
    assert isinstance(doubled, Fault)
    assert (lost.code, doubled.code) == ("lost_chunk", "doubled_chunk")
    cut_off = laid((0, 4), (5, 6), doubtful=1).history()
    assert not isinstance(cut_off, Fault)
    assert len(cut_off) == 1


def test_a_stream_with_positions_is_nobody_elses_until_given_back() -> None:
    population = Population(
        [TAPE], prefix="s", count=3, stream_events=5, appends=False, keep=4, seed=1
    )
    random = Random(2)
    out: list[Stream] = []
    for _ in range(500):
        if out and random.random() < 0.5:
            stream = out.pop(random.randrange(len(out)))
            stream.sent += 1
            population.give_back(stream)
        elif len(out) < 3:
            stream = population.take()
            assert stream not in out
            assert stream.sent < 5
            out.append(stream)
    assert population.begun > 30
    assert sum(stream.kept for stream in population.kept) == len(population.kept) == 4


def test_every_stream_has_the_same_chance_to_be_compared() -> None:
    counts = [0] * 20
    for seed in range(400):
        population = Population(
            [TAPE], prefix="", count=20, stream_events=5, appends=False, keep=5, seed=seed
        )
        while population.begun < 20:
            population.take()
        for stream in population.kept:
            counts[int(stream.name)] += 1
    assert sum(counts) == 2000
    assert min(counts) > 60
    assert max(counts) < 140


def run_of_measures() -> Measures:
    measures = Measures(["short"], wall_s=10.0)
    for latency_ms in range(1, 101):
        measures.answer(0, 2, latency_ms / 1000, 0.0, None)
    measures.errors, measures.retries = 5, 21
    return measures


@pytest.mark.parametrize(
    ("name", "holds", "broken"),
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
def test_a_threshold_holds_up_to_its_limit(name: str, holds: float, broken: float) -> None:
    scenario = replace(
        STEADY, users=10, duration_s=20, chunks_per_s_per_user=1.0, stages=(Stage(1.0, 1.0),)
    )
    for limit, wanted in ((holds, True), (broken, False)):
        asked = replace(scenario, thresholds=Thresholds(**{name: limit}))
        wrong, found = findings(asked, run_of_measures(), Compared("predict", 1, 7, 0.0))
        assert wrong.holds
        assert (found.name, found.limit, found.holds) == (name, limit, wanted)


def test_nothing_to_judge_holds_no_threshold() -> None:
    scenario = replace(STEADY, thresholds=Thresholds(max_p95_ms=1e9, max_error_share=1.0))
    wrong, *others = findings(scenario, Measures(["short"]), Compared("predict"))
    assert wrong.holds
    assert [finding.holds for finding in others] == [False, False]


def test_a_wrong_answer_is_never_allowed() -> None:
    measures = run_of_measures()
    measures.fault(Fault("wrong_tag", "here"))
    (wrong,) = findings(replace(STEADY, thresholds=Thresholds()), measures, Compared("predict"))
    assert (wrong.found, wrong.holds) == (1, False)


def test_the_parts_of_a_chunks_time() -> None:
    header = "queue;dur=0.5, load;dur=1.25,infer;dur=2, commit;dur=3.0, other;dur=9, cache"
    assert server_timing_ms(header) == {"queue": 0.5, "load": 1.25, "infer": 2.0, "commit": 3.0}
    assert server_timing_ms(None) == {}


def test_the_pace_of_all_users_over_the_stages() -> None:
    scenario = replace(
        STEADY,
        users=10,
        duration_s=20,
        chunks_per_s_per_user=2.0,
        stages=(Stage(0.1, 0.5), Stage(1.0, 0.5)),
    )
    assert scenario.asked_chunks == 2.0 * (1 * 10 + 10 * 10)
    assert replace(scenario, chunks_per_s_per_user=None).asked_chunks is None


def test_options_change_scenarios() -> None:
    texts = ["max_p95_ms=7", "steady.max_p99_ms=none", "other.max_error_share=1"]
    changed = overridden(STEADY, users=3, duration_s=1.5, thresholds=texts)
    assert (changed.users, changed.duration_s, changed.streams) == (3, 1.5, STEADY.streams)
    assert (changed.thresholds.max_p95_ms, changed.thresholds.max_p99_ms) == (7.0, None)
    assert changed.thresholds.max_error_share == STEADY.thresholds.max_error_share
    assert overridden(STEADY) == STEADY


@pytest.mark.parametrize("text", ["p95=1", "max_p95_ms", "max_p95_ms=fast", "steady.p95=1"])
def test_a_threshold_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match=f"--threshold {text}: expected"):
        overridden(STEADY, thresholds=[text])


@pytest.mark.parametrize("url", ["ftp://here", "here:8000", "http://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(LoadError, match="--url: expected an http address"):
        Service(url)


def test_events_for_a_model_that_takes_none_are_refused() -> None:
    with pytest.raises(LoadError, match="takes no events"):
        tapes_of(MODEL, 10, "events", 1)
    (tape,) = tapes_of(MODEL, 10, "both", 1)
    assert tape.member == b"inputs"


def test_no_chunk_is_longer_than_the_service_takes() -> None:
    long = read_scenarios()["long"]
    assert fitted(long, 500).kinds[1] == replace(long.kinds[1], min_steps=500, max_steps=500)
    assert fitted(long, 500).kinds[0] == long.kinds[0]


@pytest.mark.parametrize(
    ("find", "put", "said"),
    [
        ("users = 16", "users = 0", "scenario 'steady': users, streams"),
        ("users = 16", "userz = 16", "scenario 'steady': got an unexpected keyword argument"),
        ("max_p95_ms =", "max_p94_ms =", "scenario 'steady': got an unexpected keyword argument"),
        ("[1.0, 1.0]", "[1.0, 0.9]", "scenario 'steady': stages: expected shares of the duration"),
        ("share = 1.0", "share = 0.9", "scenario 'steady': kinds: expected shares"),
        ("min_steps = 1,", "min_steps = 0,", "scenario 'steady': kinds: expected 1 <= min_steps"),
        ('= "positions"', '= "guesses"', "scenario 'steady': delivery: expected one of"),
        ("[steady]", "[steady", "scenarios.toml"),
    ],
)
def test_what_is_no_scenario_is_refused(tmp_path: Path, find: str, put: str, said: str) -> None:
    text = Path(__file__).with_name("scenarios.toml").read_text()
    path = tmp_path / "scenarios.toml"
    path.write_text(text.replace(find, put, 1))
    with pytest.raises(LoadError) as error:
        read_scenarios(path)
    assert said in str(error.value)
