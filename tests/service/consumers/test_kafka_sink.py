"""Outputs in a topic of Kafka: keyed by stream, in order, twice only with the same position."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaException

from models.artifact.artifact import Artifact
from service.consumers import kafka_sink
from service.consumers.config import make_config
from service.core.errors import OperatorError
from tests.support.consumers import (
    PROBE,
    add,
    assert_outputs,
    consumer_processes,
    consuming,
    interleaved,
    relaying,
)
from tests.support.kafka import QUICK, Broker
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, until

RANDOM = np.random.default_rng(29)
PARTITIONS = 3
OUTBOX = "scores:carry:probe"
UNKNOWN_TOPIC, NOT_AUTHORIZED = 3, 29


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.consumers.relay.RETRY_S", 0.01)
    monkeypatch.setattr("service.consumers.relay.MAX_RETRY_S", 0.05)


def output(position: int, outputs: str = "{}") -> dict[str, Any]:
    return {"stream": "a", "epoch": "e1", "position": position, "outputs": outputs}


def delivered(broker: Broker) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Positions and outputs of each stream, each position once, in the order of first arrival.

    Records with the same position must be equal, and of one partition for each stream."""
    streams: dict[str, dict[int, Any]] = {}
    places: dict[str, int] = {}
    for record in broker.read_all("scores", PARTITIONS):
        stream = record.key().decode()
        assert places.setdefault(stream, record.partition()) == record.partition()
        headers = {name: value.decode() for name, value in record.headers()}
        content = headers["epoch"], json.loads(record.value())
        known = streams.setdefault(stream, {}).setdefault(int(headers["position"]), content)
        assert known == content
    return {
        stream: [(position, outputs) for position, (_, outputs) in each.items()]
        for stream, each in streams.items()
    }


async def test_outputs_arrive_keyed_and_in_order(
    server: RealServer, client: Any, artifact: Artifact, broker: Broker
) -> None:
    url = broker.create("scores", PARTITIONS)
    rows = {f"s{number}": rows_of(RANDOM, 30) for number in range(8)}
    add(client, "events", *interleaved(rows))
    async with consuming(server.url, artifact, to=url), relaying(server.url, to=url) as relay:
        await becomes(lambda: relay.counts["delivered"] == 240, "all outputs")
        await becomes(lambda: client.xlen(OUTBOX) == 0, "the empty outbox")
    found = delivered(broker)
    assert {*found} == {*rows}
    for name, each in rows.items():
        assert_outputs(artifact, found[name], each)
    records = broker.read_all("scores", PARTITIONS)
    assert len(records) >= 240
    names = [name for name, _ in records[0].headers()]
    assert names == ["epoch", "tag", "model", "version", "time", "position"]


async def test_outputs_that_were_not_acknowledged_come_again_with_the_same_position(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("scores", PARTITIONS)
    add(client, OUTBOX, *[output(position) for position in range(20)])
    async with relaying(server.url, to=url) as relay:
        await becomes(lambda: relay.counts["delivered"] == 20, "the outputs")
    # as after a crash in front of the acknowledgement
    add(client, OUTBOX, *[output(position) for position in range(10, 30)])
    async with relaying(server.url, to=url) as relay:
        await becomes(lambda: relay.counts["delivered"] == 20, "the outputs")
    assert len(broker.read_all("scores", PARTITIONS)) >= 40
    assert [position for position, _ in delivered(broker)["a"]] == [*range(30)]


async def test_outputs_wait_in_order_while_no_broker_answers(
    server: RealServer, client: Any, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_sink, "TIMEOUT_S", 0.3)
    url = broker.create("scores", PARTITIONS)
    async with relaying(server.url, to=url) as relay:
        broker.stop()
        add(client, OUTBOX, *[output(position) for position in range(1500)])
        await becomes(lambda: relay.counts["failures"] >= 2, "failed deliveries")
        broker.start()
        monkeypatch.setattr(kafka_sink, "TIMEOUT_S", 30)
        await becomes(lambda: relay.counts["delivered"] == 1500, "the outputs")
    assert [position for position, _ in delivered(broker)["a"]] == [*range(1500)]


async def test_outputs_that_are_too_large_become_dead_letters(
    server: RealServer, client: Any, broker: Broker
) -> None:
    url = broker.create("scores", PARTITIONS)
    large = json.dumps("x" * 2000)
    entries = [output(position, large if position == 7 else "{}") for position in range(20)]
    del entries[9]["outputs"]
    add(client, OUTBOX, *entries)
    async with relaying(server.url, to=url, kafka={"message.max.bytes": 1500}) as relay:
        await becomes(lambda: relay.counts["delivered"] == 18, "the others")
    letters = [fields for _, fields in client.xrange(f"{OUTBOX}:dead")]
    assert [each[b"position"] for each in letters] == [b"7", b"9"]
    assert b"Message size too large" in letters[0][b"carry-reason"]
    assert b"not an output" in letters[1][b"carry-reason"]
    found = [position for position, _ in delivered(broker)["a"]]
    assert found == [each for each in range(20) if each not in (7, 9)]


@pytest.mark.parametrize("code", [UNKNOWN_TOPIC, NOT_AUTHORIZED])
async def test_outputs_wait_while_their_topic_cannot_be_used(
    server: RealServer, client: Any, broker: Broker, code: int
) -> None:
    """That the client knows it before it sends an output is no rejection of the output."""
    url = broker.create("scores", PARTITIONS)
    settings = {"topic.metadata.refresh.interval.ms": 10, "topic.metadata.propagation.max.ms": 0}
    async with relaying(server.url, to=url, kafka=settings) as relay:
        add(client, OUTBOX, output(0))
        await becomes(lambda: relay.counts["delivered"] == 1, "the first output")
        producer = relay.sink._producer  # type: ignore[attr-defined]
        broker.set_error("scores", code)
        await becomes(lambda: is_rejected_at_once(producer), "the error of the topic")
        add(client, OUTBOX, *[output(position) for position in range(1, 5)])
        await becomes(lambda: relay.counts["failures"] >= 2, "failed deliveries")
        broker.set_error("scores", 0)
        await becomes(lambda: relay.counts["delivered"] == 5, "the outputs")
    assert not client.exists(f"{OUTBOX}:dead")
    assert [position for position, _ in delivered(broker)["a"]] == [*range(5)]


def is_rejected_at_once(producer: Any) -> bool:
    """Whether a producer knows that its topic cannot be used."""
    try:
        producer.produce("scores", b"{}", "a", headers=[("epoch", b"e1"), ("position", b"0")])
    except KafkaException:
        return True
    return False


async def test_missing_topic_is_an_error_at_the_start(broker: Broker) -> None:
    config = make_config(PROBE | {"to": f"kafka://{broker.servers}/missing"}, "test")
    assert config.kafka_sink is not None
    sink = kafka_sink.KafkaSink(config.kafka_sink, config.kafka)
    with pytest.raises(OperatorError, match="'missing': there is no such topic"):
        await sink.check()
    await sink.close()


def test_processes_that_are_killed_deliver_each_output(
    server: RealServer, client: Any, artifact: Artifact, broker: Broker, tmp_path: Path
) -> None:
    source, sink = broker.create("events", 2), broker.create("scores", PARTITIONS)
    config = {"model": "probe", "from": source, "to": sink, "lease_s": 0.5, "kafka": QUICK}
    (tmp_path / "consumer.yaml").write_text(json.dumps(config))
    rows = {f"s{number}": rows_of(RANDOM, 40) for number in range(12)}
    sent = [
        {"key": name, "value": json.dumps(each[at].tolist())}
        for at in range(40)
        for name, each in rows.items()
    ]

    def count() -> int:
        return len(broker.read_all("scores", PARTITIONS))

    with consumer_processes(server, artifact, tmp_path) as start:
        for part in range(4):
            consumer = start()
            seen = count()
            broker.produce("events", *sent[120 * part : 120 * (part + 1)])
            until(lambda seen=seen: count() > seen, "more outputs", 120, 0.01)
            if part < 3:
                consumer.fork.kill()

        def is_complete() -> bool:
            return sum(map(len, delivered(broker).values())) == len(sent)

        until(is_complete, "all outputs", 120, 0.1)
        consumer.fork.send_signal(signal.SIGTERM)
        assert consumer.fork.wait(60) == 0
    for name, each in rows.items():
        assert_outputs(artifact, delivered(broker)[name], each)
