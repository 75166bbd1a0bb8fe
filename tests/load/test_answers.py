"""Every wrong answer of a service is detected, and no correct one is reported as wrong.

The load's sender runs here without Locust, in one thread, against a live service.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from random import Random
from typing import Any

import httpx
import pytest

from service.client import read_response
from tests.load.conftest import Live
from tests.load.faulty_service import WRONG_ANSWERS, hide_outcome, lose_update, overload
from tests.load.feeds import make_feeds
from tests.load.recompute import by_oracle, by_service, compare
from tests.load.results import Compared, Results
from tests.load.scenarios import SCENARIOS, Kind, LoadError, Scenario
from tests.load.sender import Load, Sender
from tests.load.service import Service

STEADY = replace(SCENARIOS["steady"], users=1, streams=3, stream_events=1000)
EVEN = replace(STEADY, kinds=(Kind("even", 1.0, 4, 4),))
MIXED = replace(STEADY, kinds=(Kind("short", 0.9, 1, 9), Kind("long", 0.1, 40, 60)))


class Run:
    """Chunks sent one after another."""

    def __init__(self, live: Live, model: str, scenario: Scenario, feed: str = "both"):
        self.service = Service(live.url)
        self.model = self.service.describe(model)
        self.results = Results(scenario)
        self.load = Load(
            model=self.model,
            scenario=scenario,
            feeds=make_feeds(self.model, scenario.longest_steps, feed, 5),
            prefix=f"answers-{time.monotonic_ns()}-",
            results=self.results,
            random=Random(5),
            sleep=lambda seconds: None,
        )
        self._client = httpx.Client(
            base_url=live.url, headers={"content-type": "application/json"}, timeout=60
        )

    def send(self, chunks: int) -> None:
        sender = Sender(self.load)
        for _ in range(chunks):
            sender.send_chunk(self._post)
        self._client.close()

    def _post(self, path: str, body: bytes) -> tuple[Any, str | None]:
        found = self._client.post(path, content=body)
        media = found.headers["content-type"]
        document = read_response(found.status_code, media, found.content)
        return document, found.headers.get("server-timing")

    def compare(self, method: Any = None) -> Compared:
        method = method or by_service(self.service.post, self.model)
        with closing(self.service):
            return compare(self.load, method, 16, 10_000)


@pytest.fixture(params=["small", "probe"])
def model(request: pytest.FixtureRequest) -> str:
    """One with events, one without."""
    return str(request.param)


@pytest.mark.parametrize("appends", [False, True])
def test_correct_service_has_no_faults(live: Live, model: str, appends: bool) -> None:
    load = Run(live, model, replace(MIXED, appends=appends, stream_events=100))
    load.send(40)
    compared = load.compare()
    assert load.results.faults == load.results.problems == {}
    assert load.results.answered == load.results.chunks == 40
    assert len(load.load.streams) > 3
    assert compared.events == load.results.events
    assert compared.excess < 1e-6
    assert len(load.results.stages_ms["infer"]) == 40
    assert min(load.results.stages_ms["rest"]) > 0
    assert {kind: len(each) for kind, each in load.results.latencies_ms.items()} == {
        "short": 36,
        "long": 4,
    }


@pytest.mark.parametrize("feed", ["events", "inputs"])
def test_float64_network_agrees(live: Live, feed: str) -> None:
    load = Run(live, "small", MIXED, feed=feed)
    load.send(30)
    compared = load.compare(by_oracle(live.models["small"].path, load.model))
    assert load.results.faults == {}
    assert compared.how == "oracle"
    assert compared.events == load.results.events


def test_model_that_depends_on_cuts_gets_the_same_cuts_again(live: Live) -> None:
    load = Run(live, "probe", MIXED)
    load.send(20)
    asked = []

    def request(path: str, body: Any) -> Any:
        asked.append(path)
        return load.service.post(path, body)

    compared = load.compare(by_service(request, replace(load.model, is_cut_invariant=False)))
    assert load.results.faults == {}
    assert compared.events == load.results.events
    assert len(asked) == 20
    assert all(path.endswith(".again/chunks") for path in asked)


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_wrong_answer_is_detected(live: Live, name: str) -> None:
    behavior, code = WRONG_ANSWERS[name]
    live.faults.choose(behavior)
    load = Run(live, "small", EVEN)
    load.send(20)
    live.faults.choose(None)
    load.compare()
    assert set(load.results.faults) == {code}
    assert load.results.examples[code]


def test_lost_update_is_detected(live: Live) -> None:
    live.faults.choose(lose_update)
    load = Run(live, "small", replace(EVEN, appends=True))
    load.send(21)
    live.faults.choose(None)
    load.compare()
    assert set(load.results.faults) == {"doubled_chunk"}


def test_unknown_outcome_is_resolved_by_position(live: Live) -> None:
    live.faults.choose(hide_outcome)
    load = Run(live, "small", EVEN)
    load.send(21)
    compared = load.compare()
    assert load.results.faults == {}
    assert load.results.answered == 21
    assert load.results.retries == load.results.problems["outcome_unknown"] >= 7
    assert compared.events == load.results.events == 84


def test_append_of_unknown_outcome_is_not_repeated(live: Live) -> None:
    live.faults.choose(hide_outcome)
    load = Run(live, "small", replace(EVEN, appends=True))
    load.send(21)
    load.compare()
    assert load.results.faults == {}
    assert load.results.retries == 0
    assert load.results.errors == 7


@pytest.mark.parametrize("appends", [False, True])
def test_rejected_chunk_is_repeated(live: Live, appends: bool) -> None:
    live.faults.choose(overload)
    load = Run(live, "probe", replace(EVEN, appends=appends))
    load.send(21)
    compared = load.compare()
    assert load.results.faults == {}
    assert load.results.errors == 0
    assert load.results.problems == {"overloaded": load.results.retries}
    assert compared.events == load.results.events == 84


def test_unknown_model_is_rejected(live: Live) -> None:
    with closing(Service(live.url)) as service:
        with pytest.raises(LoadError, match="--model none: served are probe, small"):
            service.describe("none")
        with pytest.raises(LoadError, match="--model: choose one of probe, small"):
            service.describe(None)
