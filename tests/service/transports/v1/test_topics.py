"""The topics of consumers: their progress and their newest outputs, as far as a key allows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import Verb
from service.core.errors import StoreUnavailable
from service.store.topics import TopicRegistration
from tests.service.transports.v1.harness import Harness, harness
from tests.support.consumers import add, consuming, fields_of
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, until_async

RANDOM = np.random.default_rng(27)
REGISTRATION = TopicRegistration("carry", "events", "scores", "events:dead", "probe", False)


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    async with harness(pipeline_server, models, requires_keys=False) as running:
        yield running


async def topics_of(api: Harness, query: str = "", **request: Any) -> list[dict[str, Any]]:
    response = await api.client.get(f"/v1/topics{query}", **request)
    assert response.status_code == 200, response.text
    topics: list[dict[str, Any]] = response.json()["topics"]
    return topics


async def until_topic(api: Harness, query: str = "", **expected: Any) -> dict[str, Any]:
    """The only topic, once it has these members."""
    found: dict[str, Any] = {}

    async def has_them() -> bool:
        topics = await topics_of(api, query)
        found.update(topics[0] if topics else {})
        return expected.items() <= found.items()

    await until_async(has_them, f"a topic with {expected}")
    return found


def entry_of(stream: str, position: int, outputs: bytes = b'{"late":0.5}') -> dict[str, Any]:
    return {"stream": stream, "position": position, "time": 1_700_000_000_000, "outputs": outputs}


async def outputs_of(api: Harness, query: str, **request: Any) -> httpx.Response:
    return await api.client.get(f"/v1/topics/outputs?topic=events{query}", **request)


async def test_a_topic_has_its_progress_and_outputs_while_and_after_it_is_consumed(
    api: Harness, pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    assert await topics_of(api) == []
    with pipeline_server.client() as client:
        add(client, "events", *[fields_of("a", row) for row in rows_of(RANDOM, 5)])
        async with consuming(pipeline_server.url, models["probe"]):
            topic = await until_topic(api, entries=5, lag=0, pending=0)
            (owner,) = topic.pop("owners")
            assert ":" in owner
            assert topic == {
                "topic": "events", "group": "carry", "model": "probe", "outputs": "scores",
                "dead_letters": "events:dead", "entries": 5, "pending": 0, "lag": 0,
                "acknowledged": 5, "oldest_s": None, "partitions": [],
            }  # fmt: skip
        add(client, "events", *[fields_of("a", row) for row in rows_of(RANDOM, 2)])
        topic = await until_topic(api, "?partitions=true", entries=7, lag=2, owners=[])
        assert topic["oldest_s"] >= 0
        (partition,) = topic["partitions"]
        assert (partition["topic"], partition["owner"], partition["lag"]) == ("events", None, 2)
        written = [int(fields[b"position"]) for _, fields in client.xrange("scores")]
    found = (await outputs_of(api, "&limit=3")).json()["outputs"]
    assert written == [0, 1, 2, 3, 4]
    assert [each["position"] for each in found] == [4, 3, 2]
    assert {each["stream"] for each in found} == {"a"}
    assert all(
        isinstance(value, float | list) for each in found for value in each["outputs"].values()
    )


async def test_topics_of_partitions_are_one_with_totals(
    api: Harness, pipeline_server: RealServer
) -> None:
    registration = TopicRegistration("carry", "events", "scores", "events", "probe", True)
    await api.store.topics.register(registration)
    first, second = registration.keys(api.store.topics.space)[3:5]
    with pipeline_server.client() as client:
        for keys, count in ((first, 2), (second, 3)):
            add(client, keys.topic, *[{"stream": "a", "event": "{}"}] * count)
            client.xgroup_create(keys.topic, "carry", "0")
            add(client, keys.outputs, *[entry_of(keys.topic, at) for at in range(count)])
    topic = await until_topic(api, "?partitions=true", entries=5, lag=5, acknowledged=0)
    assert [(each["topic"], each["lag"]) for each in topic["partitions"]] == [
        ("carry{p0003}:in:events", 2),
        ("carry{p0004}:in:events", 3),
    ]
    found = (await outputs_of(api, "")).json()["outputs"]
    # of so many partitions each gives its newest output
    assert [(each["stream"], each["position"]) for each in found] == [
        ("carry{p0004}:in:events", 2),
        ("carry{p0003}:in:events", 1),
    ]


async def test_outputs_in_messagepack_are_read_and_other_entries_skipped(
    api: Harness, pipeline_server: RealServer
) -> None:
    await api.store.topics.register(REGISTRATION)
    with pipeline_server.client() as client:
        packed = msgspec.msgpack.encode({"late": 0.25})
        others = [
            {"a": "b"},
            entry_of("a", 1, b"{"),
            entry_of("a", 1, b"\xc1"),
            entry_of("a", 1, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
            entry_of("a", 1, msgspec.msgpack.encode({"late": msgspec.msgpack.Ext(5, b"")})),
            {**entry_of("a", 1), "position": "x"},
        ]
        unusual = msgspec.msgpack.encode({"late": {1: b"\0"}})
        add(client, "scores", entry_of("a", 0, packed), *others, entry_of("a", 2, unusual))
    second, first = (await outputs_of(api, "")).json()["outputs"]
    assert (first["position"], first["outputs"]) == (0, {"late": 0.25})
    assert (second["position"], second["outputs"]) == (2, {"late": {"1": "AA=="}})


async def test_a_key_sees_its_models_topics_and_its_streams_outputs(
    api: Harness, pipeline_server: RealServer
) -> None:
    await api.store.topics.register(REGISTRATION)
    with pipeline_server.client() as client:
        add(client, "events", {"stream": "a", "event": "{}"})
        client.xgroup_create("events", "carry", "0")
        add(client, "scores", entry_of("mine-1", 0), entry_of("other", 7))
    keys = {
        "mine": await api.key(verbs=(Verb.METRICS, Verb.WATCH), prefix="mine"),
        "other model": await api.key(verbs=(Verb.METRICS, Verb.WATCH), models=("small",)),
        "no verb": await api.key(verbs=(Verb.PREDICT,)),
    }
    headers = {name: {"authorization": key} for name, key in keys.items()}
    assert len(await topics_of(api, headers=headers["mine"])) == 1
    found = (await outputs_of(api, "", headers=headers["mine"])).json()["outputs"]
    assert [each["stream"] for each in found] == ["mine-1"]
    assert await topics_of(api, headers=headers["other model"]) == []
    hidden = await outputs_of(api, "", headers=headers["other model"])
    missing = await outputs_of(api, "&group=none", headers=headers["mine"])
    assert [each.json()["code"] for each in (hidden, missing)] == ["invalid_input"] * 2
    for path in ("/v1/topics", "/v1/topics/outputs?topic=events"):
        rejected = await api.client.get(path, headers=headers["no verb"])
        assert (rejected.status_code, rejected.json()["code"]) == (403, "forbidden")
        assert (await api.client.get(path)).status_code == 401


async def test_a_key_sees_no_outputs_of_other_models_in_a_topic_that_they_share(
    api: Harness, pipeline_server: RealServer
) -> None:
    await api.store.topics.register(REGISTRATION)
    with pipeline_server.client() as client:
        entries = [{**entry_of("a", 0), "model": model} for model in ("probe", "small")]
        add(client, "scores", *entries, entry_of("a", 2))
    key = await api.key(verbs=(Verb.WATCH,), models=("probe",))
    found = (await outputs_of(api, "", headers={"authorization": key})).json()["outputs"]
    assert [each["position"] for each in found] == [2, 0]
    everything = (await outputs_of(api, "", headers={"authorization": await api.key()})).json()
    assert len(everything["outputs"]) == 3


async def test_an_unavailable_store_is_an_error_and_not_an_empty_list(api: Harness) -> None:
    api.store.away = StoreUnavailable("no answer")
    for path in ("/v1/topics", "/v1/topics/outputs?topic=events"):
        assert (await api.client.get(path)).json()["code"] == "store_unavailable"
