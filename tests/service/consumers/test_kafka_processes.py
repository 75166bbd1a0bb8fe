"""Consumers of a topic of Kafka that are killed, suspended and stopped while others continue."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.artifact.artifact import Artifact
from tests.support.command import carry
from tests.support.consumers import (
    ConsumerProcess,
    assert_outputs,
    consumer_processes,
    outputs_of,
)
from tests.support.kafka import QUICK, Broker, record_of
from tests.support.metrics import read, series
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, until

RANDOM = np.random.default_rng(23)
KAFKA_PARTITIONS = 6
PARTITIONS = 4
INPUT = "events:carry:probe"
OUTPUTS = [f"carry{{p{partition:04d}}}:out:scores" for partition in range(PARTITIONS)]


@pytest.fixture
def start(
    server: RealServer,
    broker: Broker,
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., ConsumerProcess]]:
    """Starts consumers of the topic `events`, with short leases and sessions."""
    monkeypatch.setenv("CARRY_PARTITIONS", str(PARTITIONS))
    url = broker.create("events", KAFKA_PARTITIONS)
    config = {
        "model": "probe", "from": url, "to": "scores", "partitioned": True, "lease_s": 0.5,
        "kafka": QUICK,
    }  # fmt: skip
    (tmp_path / "consumer.yaml").write_text(json.dumps(config))
    with consumer_processes(server, artifact, tmp_path) as start_one:
        yield start_one


def test_members_that_are_killed_and_suspended_lose_and_repeat_nothing(
    client: Any, start: Callable[..., ConsumerProcess], broker: Broker, artifact: Artifact
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 60) for number in range(24)}
    sent = [record_of(name, each[at]) for at in range(60) for name, each in rows.items()]

    def count() -> int:
        return sum(map(client.xlen, OUTPUTS))

    def produce(part: int) -> None:
        broker.produce("events", *sent[240 * part : 240 * (part + 1)])

    first = start()
    produce(0)
    until(lambda: count() > 0, "the first outputs")
    second, third = start(), start()
    produce(1)
    second.wait_for("kafka_assigned")
    third.wait_for("kafka_assigned")
    produce(2)
    first.fork.kill()
    produce(3)
    until(lambda: count() > 720, "outputs of records behind the kill")
    second.fork.send_signal(signal.SIGSTOP)
    produce(4)
    until(lambda: count() == 1200, "outputs without the suspended member")
    second.fork.send_signal(signal.SIGCONT)
    fourth = start()
    produce(5)
    fourth.wait_for("kafka_assigned")
    until(lambda: count() >= len(sent), "all outputs")
    third.fork.send_signal(signal.SIGTERM)
    assert third.fork.wait(60) == 0
    found = {name: each for topic in OUTPUTS for name, each in outputs_of(client, topic).items()}
    assert {*found} == {*rows}
    for name, each in rows.items():
        assert_outputs(artifact, found[name], each)


def test_health_metrics_status_and_graceful_stop(
    server: RealServer,
    client: Any,
    start: Callable[..., ConsumerProcess],
    broker: Broker,
    tmp_path: Path,
) -> None:
    broker.produce("events", *[record_of("a", row) for row in rows_of(RANDOM, 5)])
    consumer = start("--port", "0")
    port = consumer.wait_for("port_bound")["port"]
    until(lambda: sum(map(client.xlen, OUTPUTS)) == 5, "the outputs")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        until(lambda: http.get("/health/ready").status_code == 200, "readiness", poll_s=0.1)
        appended = series("carry_kafka_records_total", topic=INPUT, result="appended")
        lag = series("carry_kafka_lag", topic=INPUT, partition="0")
        until(
            lambda: read(http.get("/metrics").content).get(appended) == 5, "the metric", poll_s=0.1
        )
        assert read(http.get("/metrics").content).get(lag) == 0
    consumer.fork.send_signal(signal.SIGTERM)
    assert consumer.fork.wait(60) == 0
    shown = carry("consume", "status", str(tmp_path / "consumer.yaml"), "--redis-url", server.url)
    assert shown.exit_code == 0
    assert f"carry{{p0000}}:in:{INPUT}" in shown.stdout.decode()


def test_missing_topic_ends_the_process_with_an_error(
    server: RealServer, client: Any, broker: Broker, artifact: Artifact
) -> None:
    ended = carry(
        "consume", "--from", f"kafka://{broker.servers}/missing", "--to", "scores",
        "--model", "probe", "--redis-url", server.url, "--models", str(artifact.path),
    )  # fmt: skip
    assert ended.exit_code != 0
    assert "'missing': there is no such topic" in str(ended.stderr)
