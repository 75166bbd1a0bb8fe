"""Every lie of a service is found, and nothing that it may do is taken for one.

The load's sender runs here without Locust, in one thread, against a live service.
"""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random
from typing import Any

import httpx
import pytest

from tests.load.compare import by_the_oracle, by_the_service, settle
from tests.load.conftest import Live
from tests.load.description import Description
from tests.load.liar import LIES, busy, mute, swallowing
from tests.load.measures import Compared, Measures
from tests.load.scenarios import Kind, LoadError, Scenario, read_scenarios
from tests.load.sender import Answer, Sender
from tests.load.service import Service
from tests.load.streams import Population
from tests.load.tape import tapes_of

STEADY = read_scenarios()["steady"]
EVEN = replace(STEADY, kinds=(Kind("even", 1.0, 4, 4),))
RAGGED = replace(STEADY, kinds=(Kind("short", 0.9, 1, 9), Kind("long", 0.1, 40, 60)))


class Load:
    """Chunks sent one after another."""

    def __init__(self, live: Live, model: str, scenario: Scenario, seed: int = 5, **options: Any):
        self.service = Service(live.url)
        self.model: Description = self.service.describe(model)
        self.measures = Measures([kind.name for kind in scenario.kinds])
        self.population = Population(
            tapes_of(self.model, scenario.longest_steps, options.get("feed", "both"), seed),
            prefix=f"answers-{time.monotonic_ns()}-",
            count=3,
            stream_events=options.get("stream_events", 1000),
            appends=scenario.appends,
            keep=16,
            seed=seed,
        )
        self._sender = Sender(
            model=self.model,
            scenario=scenario,
            population=self.population,
            measures=self.measures,
            random=Random(seed),
            clock=time.monotonic,
            sleep=lambda seconds: None,
        )
        self._client = httpx.Client(
            base_url=live.url, headers={"content-type": "application/json"}, timeout=60
        )

    def send(self, chunks: int) -> None:
        for _ in range(chunks):
            self._sender.send(self._post)

    def _post(self, path: str, body: bytes) -> Answer:
        found = self._client.post(path, content=body)
        return Answer(found.status_code, found.content, found.headers.get("server-timing"))

    def resolve(self, way: Any = None) -> Compared:
        self._client.close()
        way = way or by_the_service(self.service.post, self.model)
        return settle(self.population, self.model, way, 10_000, self.measures)


@pytest.fixture(params=["small", "probe"])
def model(request: pytest.FixtureRequest) -> str:
    """One with events, one without."""
    return str(request.param)


@pytest.mark.parametrize("delivery", ["positions", "appends"])
def test_an_honest_service_is_found_to_be_one(live: Live, model: str, delivery: str) -> None:
    load = Load(live, model, replace(RAGGED, delivery=delivery), stream_events=150)
    load.send(40)
    compared = load.resolve()
    assert load.measures.faults == load.measures.problems == {}
    assert load.measures.answered == load.measures.chunks == 40
    assert load.population.begun > 3
    assert compared.events == load.measures.events
    assert compared.excess < 1e-6
    assert len(load.measures.parts_ms["infer"]) == 40
    assert min(load.measures.parts_ms["rest"]) > 0
    assert {kind: len(each) for kind, each in load.measures.latencies_ms.items()} == {
        "short": 36,
        "long": 4,
    }


@pytest.mark.parametrize("feed", ["events", "inputs"])
def test_the_float64_network_agrees(live: Live, feed: str) -> None:
    load = Load(live, "small", RAGGED, feed=feed)
    load.send(30)
    compared = load.resolve(by_the_oracle(live.models["small"].path, load.model))
    assert load.measures.faults == {}
    assert compared.how == "oracle"
    assert compared.events == load.measures.events


def test_a_model_that_depends_on_its_cuts_gets_the_same_cuts_again(live: Live) -> None:
    load = Load(live, "probe", RAGGED)
    load.send(20)
    asked = []

    def ask(path: str, body: bytes) -> Any:
        asked.append(path)
        return load.service.post(path, body)

    compared = load.resolve(by_the_service(ask, replace(load.model, invisible=False)))
    assert load.measures.faults == {}
    assert compared.events == load.measures.events
    assert len(asked) == 20
    assert all(path.endswith(".again/chunks") for path in asked)


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_found(live: Live, name: str) -> None:
    lie, code = LIES[name]
    live.liar.choose(lie)
    load = Load(live, "small", EVEN)
    load.send(20)
    live.liar.choose(None)
    load.resolve()
    assert set(load.measures.faults) == {code}
    assert load.measures.examples[code]


def test_a_lost_update_is_found(live: Live) -> None:
    live.liar.choose(swallowing)
    load = Load(live, "small", replace(EVEN, delivery="appends"))
    load.send(21)
    live.liar.choose(None)
    load.resolve()
    assert set(load.measures.faults) == {"doubled_chunk"}


def test_an_unknown_outcome_is_settled_by_the_position(live: Live) -> None:
    live.liar.choose(mute)
    load = Load(live, "small", EVEN)
    load.send(21)
    compared = load.resolve()
    assert load.measures.faults == {}
    assert load.measures.answered == 21
    assert load.measures.retries == load.measures.problems["outcome_unknown"] >= 7
    assert compared.events == load.measures.events == 84


def test_an_append_of_unknown_outcome_is_not_sent_again(live: Live) -> None:
    live.liar.choose(mute)
    load = Load(live, "small", replace(EVEN, delivery="appends"))
    load.send(21)
    load.resolve()
    assert load.measures.faults == {}
    assert load.measures.retries == 0
    assert load.measures.errors == 7


@pytest.mark.parametrize("delivery", ["positions", "appends"])
def test_a_busy_service_is_asked_again(live: Live, delivery: str) -> None:
    live.liar.choose(busy)
    load = Load(live, "probe", replace(EVEN, delivery=delivery))
    load.send(21)
    compared = load.resolve()
    assert load.measures.faults == {}
    assert load.measures.errors == 0
    assert load.measures.problems == {"overloaded": load.measures.retries}
    assert compared.events == load.measures.events == 84


def test_a_model_that_is_not_served_is_refused(live: Live) -> None:
    with pytest.raises(LoadError, match="--model none: served are probe, small"):
        Service(live.url).describe("none")
    with pytest.raises(LoadError, match="--model: choose one of probe, small"):
        Service(live.url).describe(None)
