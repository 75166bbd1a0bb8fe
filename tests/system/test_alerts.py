"""The shipped alerts: when each fires, when it does not, and the text that it shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.support.monitoring import RULES, Series, check_rules, rule_test
from tests.support.needs import needs_tools

pytestmark = needs_tools("promtool")

GROUPS = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}


class Case(NamedTuple):
    """One alert.

    Attributes:
        quiet: series for which it never fires, close to its threshold.
        firing: series for which it fires.
        first_m: the minute in which it first fires.
        labels: of the alert, besides its severity.
        summary: the text that is shown.
    """

    alert: str
    quiet: Series
    firing: Series
    first_m: int
    labels: Mapping[str, str]
    summary: str


def histogram(name: str, labels: str, limit: float, slow: int) -> Series:
    """A thousand observations a minute up to a limit, but for some between it and its double."""
    counts = {limit / 2: 0, limit: 1000 - slow, limit * 2: 1000, "+Inf": 1000}
    return {
        f'{name}_bucket{{{labels}le="{bound}"}}': f"0+{count}x60" for bound, count in counts.items()
    }


REQUESTS = 'carry_request_seconds_count{status="%s"}'
REFUSALS = 'carry_refusals_total{model="flights",code="%s"}'
CHUNKS = 'carry_chunks_total{model="flights"}'
CONFLICTS = 'carry_conflicts_total{model="flights"}'
SHADOW = 'carry_shadow_chunks_total{model="flights",challenger="c3d4",outcome="%s"}'
DRIFT_SAMPLES = 'carry_drift_samples_total{model="flights",version="a1"}'
DRIFT_OUTSIDE = 'carry_drift_outside_total{model="flights",version="a1",part="inputs.delay"}'
EVICTIONS = 'carry_cache_evictions_total{model="flights"}'
UP = 'up{job="carry",instance="a:8000"}'
ROUTE = 'method="POST",route="%s",status="200",'
CHUNK = ROUTE % "/v1/models/{model}/streams/{stream}/chunks"
FLIGHTS = {"model": "flights"}
OLDEST = 'carry_consumer_oldest_seconds{topic="events"}'
DEAD_LETTERS = 'carry_consumer_events_total{topic="events",result="dead_letters"}'
OWNED = 'carry_consumer_topics{topic="events"}'
EVENTS = {"topic": "events"}
NOT_DELIVERED = 'carry_relay_oldest_seconds{topic="scores"}'
REJECTED = 'carry_relay_outputs_total{topic="scores",result="dead_letters"}'
SCORES = {"topic": "scores"}

CASES = (
    Case(
        "CarryDown",
        {UP: "1x60"},
        {UP: "0x60"},
        1,
        {"job": "carry", "instance": "a:8000"},
        "a:8000 does not answer",
    ),
    Case(
        "CarryAbsent",
        {UP: "0x60"},
        {'up{job="other"}': "1x60"},
        5,
        {"job": "carry"},
        "the scrape job carry has no targets",
    ),
    Case(
        "CarryServerErrors",
        {REQUESTS % 200: "0+995x60", REQUESTS % 503: "0+5x60", REQUESTS % 429: "0+100x60"},
        {REQUESTS % 200: "0+98x60", REQUESTS % 503: "0+1x60", REQUESTS % 14: "0+1x60"},
        6,
        {},
        "2% of the requests fail",
    ),
    Case(
        "CarryStatesAtRisk",
        {REFUSALS % "state_damaged": "3x60", REFUSALS % "conflict": "0+1x60"},
        {REFUSALS % "state_damaged": "0+1x60"},
        1,
        {**FLIGHTS, "code": "state_damaged"},
        "flights: state_damaged",
    ),
    Case(
        "CarryStoreFails",
        {REFUSALS % "store_refused": "3x60", REFUSALS % "conflict": "0+1x60"},
        {REFUSALS % "store_refused": "0+1x60"},
        2,
        {"code": "store_refused"},
        "the store answers store_refused",
    ),
    Case(
        "CarryStoreDown",
        {'carry_store_up{instance="a"}': "1x60", 'carry_store_up{instance="b"}': "1x60"},
        {'carry_store_up{instance="a"}': "1x60", 'carry_store_up{instance="b"}': "0x60"},
        1,
        {},
        "the store does not accept commits",
    ),
    Case(
        "CarryStoreDegraded",
        {'carry_store_servers{state="up"}': "3x60", 'carry_store_servers{state="down"}': "0x60"},
        {'carry_store_servers{state="up"}': "1x60", 'carry_store_servers{state="down"}': "2x60"},
        2,
        {},
        "2 primaries of the store accept no commits",
    ),
    Case(
        "CarryStoreReconnects",
        {'carry_store_reconnects_total{instance="a"}': "0+1x60"},
        {'carry_store_reconnects_total{instance="a"}': "7+5x60"},
        2,
        {"instance": "a"},
        "a has lost its connection to the store 12 times",
    ),
    Case(
        "CarryStoreSlow",
        histogram("carry_store_round_trip_seconds", "", 0.1, 5),
        histogram("carry_store_round_trip_seconds", "", 0.1, 20),
        6,
        {},
        "one command in a hundred waits longer than 150ms for the store",
    ),
    Case(
        "CarryStoreMemory",
        {'carry_store_memory_ratio{instance="a"}': "0.85x60"},
        {'carry_store_memory_ratio{instance="a"}': "0.86x60"},
        5,
        {},
        "a server of the store uses 86% of its maxmemory",
    ),
    Case(
        "CarryWorkersRestart",
        {'carry_worker_restarts_total{instance="a"}': "0 1 2x60"},
        {'carry_worker_restarts_total{instance="a"}': "3+3x60"},
        1,
        {"instance": "a"},
        "a: 4 workers restarted",
    ),
    Case(
        "CarryOverloaded",
        {REFUSALS % "overloaded": "7x60", REFUSALS % "conflict": "0+20x60"},
        {REFUSALS % "overloaded": "0+15x60", REFUSALS % "stream_overloaded": "0+5x60"},
        6,
        FLIGHTS,
        "flights rejected 100 chunks in the last 5 minutes",
    ),
    Case(
        "CarryRequestsSlow",
        {
            **histogram("carry_request_seconds", CHUNK, 0.25, 5),
            # of as many streams as the client wants, and as long as it wants
            **histogram("carry_request_seconds", ROUTE % "/v1/models/{model}/chunks", 0.25, 20),
            **histogram("carry_request_seconds", ROUTE % "/health/live", 0.25, 20),
        },
        histogram("carry_request_seconds", CHUNK, 0.25, 20),
        11,
        {"route": "/v1/models/{model}/streams/{stream}/chunks"},
        "/v1/models/{model}/streams/{stream}/chunks: one request in a hundred takes longer than "
        "375ms",
    ),
    Case(
        "CarryQueueWait",
        {
            **histogram("carry_chunk_stage_seconds", 'model="flights",stage="queue",', 0.5, 5),
            **histogram("carry_chunk_stage_seconds", 'model="flights",stage="load",', 0.5, 20),
        },
        histogram("carry_chunk_stage_seconds", 'model="flights",stage="queue",', 0.5, 20),
        11,
        FLIGHTS,
        "flights: one chunk in a hundred waits longer than 750ms",
    ),
    Case(
        "CarryInferenceSlow",
        histogram("carry_batch_seconds", 'model="flights",', 0.25, 5),
        histogram("carry_batch_seconds", 'model="flights",', 0.25, 20),
        11,
        FLIGHTS,
        "flights: one inference call in a hundred takes longer than 375ms",
    ),
    Case(
        "CarryCacheEvictions",
        {CHUNKS: "0+100x60", EVICTIONS: "0+9x60"},
        {CHUNKS: "0+100x60", EVICTIONS: "0+25x60"},
        31,
        FLIGHTS,
        "flights: the state cache evicts 25 states per 100 chunks",
    ),
    Case(
        "CarryConflicts",
        {CHUNKS: "0+100x60", CONFLICTS: "0+4x60"},
        {CHUNKS: "0+100x60", CONFLICTS: "0+6x60"},
        11,
        FLIGHTS,
        "flights: 6% of the chunks conflict",
    ),
    Case(
        "CarryChallengerDropped",
        {
            SHADOW % "dropped": "0+100x60",
            SHADOW % "computed": "0+99x60",
            SHADOW % "failed": "0+1x60",
        },
        {SHADOW % "dropped": "0+75x60", SHADOW % "computed": "0+25x60"},
        11,
        {**FLIGHTS, "challenger": "c3d4"},
        "flights: challenger c3d4 dropped 75% of the chunks",
    ),
    Case(
        "CarryDrift",
        {DRIFT_SAMPLES: "0+100x60", DRIFT_OUTSIDE: "0+4x60"},
        {DRIFT_SAMPLES: "0+100x60", DRIFT_OUTSIDE: "0+6x60"},
        31,
        {**FLIGHTS, "version": "a1", "part": "inputs.delay"},
        "flights: 6% of the sampled chunks have inputs.delay outside of its range in training",
    ),
    Case(
        "CarryConsumerBehind",
        {OLDEST: "60x60"},
        {OLDEST: "61x60"},
        5,
        EVENTS,
        "events: the oldest event waits for 1m 1s",
    ),
    Case(
        "CarryTopicWithoutConsumer",
        {OWNED: "4x60"},
        {OWNED: "4 stale"},
        3,
        EVENTS,
        "events: no consumer reads it",
    ),
    Case(
        "CarryDeadLetters",
        {DEAD_LETTERS: "3x60"},
        {DEAD_LETTERS: "0 0 1x60"},
        2,
        EVENTS,
        "events: events could not be processed",
    ),
    Case(
        "CarryOutputsNotDelivered",
        {NOT_DELIVERED: "60x60"},
        {NOT_DELIVERED: "61x60"},
        5,
        SCORES,
        "scores: the oldest output waits for 1m 1s to be delivered",
    ),
    Case(
        "CarryOutputsRejected",
        {REJECTED: "3x60"},
        {REJECTED: "0 0 1x60"},
        2,
        SCORES,
        "scores: outputs were rejected",
    ),
)


def test_every_alert_has_a_case() -> None:
    assert sorted(case.alert for case in CASES) == sorted(ALERTS)


def test_alerts_fire_beyond_their_thresholds_only(tmp_path: Path) -> None:
    tests = []
    for case in CASES:
        rule = ALERTS[case.alert]
        alert = {
            "exp_labels": {**rule["labels"], **case.labels},
            "exp_annotations": {**rule["annotations"], "summary": case.summary},
        }
        silent = {"alertname": case.alert, "exp_alerts": []}
        minutes = range(case.first_m + 5)
        quiet = [{**silent, "eval_time": f"{minute}m"} for minute in minutes]
        tests.append(rule_test(f"{case.alert}, quiet", case.quiet, alert_rule_test=quiet))
        firing = [*quiet[: case.first_m], {**quiet[case.first_m], "exp_alerts": [alert]}]
        tests.append(rule_test(f"{case.alert}, firing", case.firing, alert_rule_test=firing))
    check_rules(tmp_path, tests)
