"""Alarms through a consumer: one record for the opening, one for the closing, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.detection.alarms import CLOSED, CONTINUING, NONE, OPENED
from service.access.caller import ANYONE
from service.core.values import StreamKey
from tests.support.alarms import alarm_model, noise, raised, served_by_onnx
from tests.support.consumers import add, consuming, fields_of, relaying
from tests.support.pipelines import worker
from tests.support.receiver import receiving
from tests.support.servers import RealServer, becomes, opened, real_server

SECRET = "whsec_" + "c" * 44
QUIET, RAISED, AFTER = 60, 5, 80
ALARM = "surprise.alarm"
CONFIG = {"model": "sensors"}


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with real_server("valkey") as running:
        yield running


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture(scope="module")
def sensors(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return alarm_model(tmp_path_factory.mktemp("models"))


def records(client: Any) -> list[dict[str, Any]]:
    """The output entries, with their outputs decoded."""
    found = []
    for _, fields in client.xrange("scores"):
        record: dict[str, Any] = {name.decode(): each.decode() for name, each in fields.items()}
        found.append(record | {"outputs": json.loads(record["outputs"])})
    return found


async def consume(
    server: RealServer, client: Any, artifact: Artifact, where: str, *parts: Any
) -> list[dict[str, Any]]:
    """What a consumer writes of the events of a pump, each part consumed before the next."""
    async with consuming(server.url, artifact, **CONFIG, where=where) as consumer:
        total = 0
        for rows in parts:
            add(client, "events", *[fields_of("pump", row) for row in rows])
            total += len(rows)
            await becomes(lambda: consumer.counts["committed"] == total, "all events")  # noqa: B023
    return records(client)


@pytest.mark.parametrize("is_divided", [False, True])
async def test_a_condition_of_the_name_alone_chooses_openings_and_closings(
    server: RealServer, client: Any, sensors: Artifact, is_divided: bool
) -> None:
    rows = [noise(QUIET), raised(RAISED), noise(AFTER, seed=6)]
    parts = rows if is_divided else [np.concatenate(rows)]
    found = await consume(server, client, sensors, "alarm", *parts)
    assert [each["outputs"][ALARM] for each in found[:2]] == [OPENED, CLOSED]
    assert {each["outputs"][ALARM] for each in found} == {OPENED, CLOSED}
    first, second = found[:2]
    assert (first["position"], first["alarm"], second["alarm"]) == (str(QUIET), "opened", "closed")
    assert float(second["severity"]) >= float(first["severity"]) > 1
    assert "value" in first["cause"]


async def test_a_consumer_continues_an_acknowledged_stream_with_every_event_once(
    server: RealServer, client: Any, sensors: Artifact
) -> None:
    parts = [np.concatenate([noise(QUIET), raised(RAISED)]), raised(10, seed=8)]
    async with consuming(server.url, sensors, **CONFIG, where="alarm != 9") as consumer:
        for total, rows in zip((QUIET + RAISED, QUIET + RAISED + 10), parts, strict=True):
            add(client, "events", *[fields_of("pump", row) for row in rows])
            await becomes(lambda: consumer.counts["committed"] == total, "all events")  # noqa: B023
            if rows is parts[0]:
                async with worker(
                    server.url, sensors, runtime=served_by_onnx(sensors).runtime
                ) as one:
                    _, was_open = await one.alarms.acknowledge(ANYONE, StreamKey("sensors", "pump"))
                    assert was_open
    found = records(client)
    assert [each["position"] for each in found] == [str(at) for at in range(len(found))]
    codes = [each["outputs"][ALARM] for each in found]
    assert codes[QUIET : QUIET + RAISED] == [OPENED, *[CONTINUING] * (RAISED - 1)]
    assert set(codes[QUIET + RAISED :]) == {NONE}


async def test_continuing_alarms_are_written_if_asked_for(
    server: RealServer, client: Any, sensors: Artifact
) -> None:
    rows = np.concatenate([noise(QUIET), raised(RAISED)])
    found = await consume(server, client, sensors, "alarm > 0", rows)
    codes = [each["outputs"][ALARM] for each in found]
    assert codes == [OPENED, *[CONTINUING] * (RAISED - 1)]
    assert ["alarm" in each for each in found] == [True, *[False] * (RAISED - 1)]


async def test_an_alarm_of_a_consumer_is_indexed_and_its_webhook_reads_as_text(
    server: RealServer, client: Any, sensors: Artifact
) -> None:
    rows = np.concatenate([noise(QUIET), raised(RAISED)])
    (record,) = await consume(server, client, sensors, "alarm", rows)
    async with opened(server.url) as store:
        (entry,) = await store.alarms.page("sensors", None, 10)
        assert entry.key.stream == "pump"
    async with receiving() as receiver:
        webhook = {"url": receiver.url, "secret": SECRET}
        async with relaying(server.url, **CONFIG, webhook=webhook):
            await becomes(lambda: receiver.accepted, "the delivery")
    body = json.loads(receiver.accepted[0].body)
    (output,) = body["data"]
    assert output["severity"] == float(record["severity"])
    line = f"`pump`: alarm opened, severity {output['severity']}: {record['cause']}"
    assert body["text"] == line
