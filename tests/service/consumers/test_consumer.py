"""Consumers on real servers: events of a topic become outputs of another, exactly once."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ormsgpack
import pytest
from structlog.testing import capture_logs

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.spec.model import parse_spec
from service.codec.request_reader import RequestReader
from service.consumers.consumer import Consumer
from service.consumers.events import EventReader
from service.consumers.topic import OwnedTopic
from service.core.errors import OperatorError
from service.store.redis.topics import RedisTopics
from tests.support.consumers import (
    add,
    assert_outputs,
    consuming,
    fields_of,
    interleaved,
    outputs_of,
    until_count,
)
from tests.support.models import PRETRAINED
from tests.support.oracle import contracting_weights
from tests.support.pipelines import rows_of
from tests.support.servers import (
    RealServer,
    becomes,
    own_server,
    server,
    shared_server,
)

__all__ = ["own_server", "server", "shared_server"]

RANDOM = np.random.default_rng(3)


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


def pending(client: Any) -> int:
    return client.xpending("events", "carry")["pending"]


def letters(client: Any) -> list[dict[str, str]]:
    return [
        {name.decode(): value.decode() for name, value in fields.items()}
        for _, fields in client.xrange("events:dead")
    ]


async def test_each_event_has_its_output_once_and_in_order(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 40) for number in range(20)}
    entries = interleaved(rows)
    add(client, "events", *entries[:300])
    async with consuming(server.url, artifact) as consumer:
        add(client, "events", *entries[300:])
        await until_count(client, "scores", 800)
        await becomes(lambda: consumer.counts["committed"] == 800, "all results")
    found = outputs_of(client, "scores")
    for name, each in rows.items():
        assert_outputs(artifact, found[name], each)
    assert pending(client) == 0
    assert consumer.counts == {"committed": 800}


@pytest.mark.parametrize("stream", ["key", {"key": True}, {"constant": "events"}], ids=str)
async def test_all_entries_of_a_topic_may_be_of_one_stream(
    server: RealServer, client: Any, artifact: Artifact, stream: Any
) -> None:
    rows = rows_of(RANDOM, 10)
    add(client, "events", *[{"event": json.dumps(row.tolist())} for row in rows])
    async with consuming(server.url, artifact, stream=stream):
        await until_count(client, "scores", 10)
    assert_outputs(artifact, outputs_of(client, "scores")["events"], rows)


async def test_a_stream_that_is_queued_twice_has_one_chunk_at_a_time(
    server: RealServer, client: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a topic was lost while its streams waited for the batcher."""
    rows = {f"s{number}": rows_of(RANDOM, 30) for number in range(5)}

    def add_all(consumer: Consumer, topic: OwnedTopic, stream: str) -> None:
        consumer._ready.extend([(topic, each) for each in (stream, *rows)])
        consumer._submit_ready()

    monkeypatch.setattr(Consumer, "add", add_all)
    async with consuming(server.url, artifact):
        for at in range(0, 150, 5):
            add(client, "events", *interleaved(rows)[at : at + 5])
            await asyncio.sleep(0)
        await until_count(client, "scores", 150)
    found = outputs_of(client, "scores")
    for name, each in rows.items():
        assert_outputs(artifact, found[name], each)


async def test_an_output_names_stream_epoch_tag_model_and_version(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    add(client, "events", fields_of("a", rows_of(RANDOM, 1)[0]))
    async with consuming(server.url, artifact):
        await until_count(client, "scores", 1)
    [(_, fields)] = client.xrange("scores")
    assert {*fields} == {
        b"stream", b"position", b"epoch", b"tag", b"model", b"version", b"time", b"outputs"
    }  # fmt: skip
    assert (fields[b"stream"], fields[b"position"], fields[b"model"]) == (b"a", b"0", b"probe")
    assert {*json.loads(fields[b"outputs"])} == {"last", "out", "steep"}


async def test_outputs_of_one_list_are_written_by_name(
    server: RealServer, client: Any, tmp_path: Path
) -> None:
    """They are encoded for a whole chunk."""
    spec = parse_spec(
        {
            "name": "probe",
            "features": 3,
            "layers": [{"kind": "lstm", "units": 4}],
            "heads": [{"kind": "sequence", "name": "last"}],
        }
    )
    one = write_artifact(tmp_path / "probe", spec, contracting_weights(spec, 1))
    rows = rows_of(RANDOM, 30)
    add(client, "events", *[fields_of("a", row) for row in rows])
    async with consuming(server.url, one):
        await until_count(client, "scores", 30)
    found = outputs_of(client, "scores")["a"]
    assert {name for _, each in found for name in each} == {"last"}
    assert_outputs(one, found, rows)


async def test_a_stopped_consumer_continues_where_it_stopped(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = {"a": rows_of(RANDOM, 60), "b": rows_of(RANDOM, 60)}
    entries = interleaved(rows)
    for part in (entries[:40], entries[40:41], entries[41:]):
        add(client, "events", *part)
        # released at the stop, or the next one would wait
        async with consuming(server.url, artifact, lease_s=300):
            await until_count(client, "scores", client.xlen("events"))
    found = outputs_of(client, "scores")
    for name, each in rows.items():
        assert_outputs(artifact, found[name], each)


async def test_pending_entries_come_before_new_ones(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 30)
    add(client, "events", *[fields_of("a", row) for row in rows[:20]])
    client.xgroup_create("events", "carry", "0")
    # an owner that died, and a plain consumer of the same group
    client.xreadgroup("carry", "carry", {"events": ">"}, count=5)
    client.xreadgroup("carry", "plain", {"events": ">"}, count=5)
    async with consuming(server.url, artifact):
        add(client, "events", *[fields_of("a", row) for row in rows[20:]])
        await until_count(client, "scores", 30)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)


async def test_repeated_positions_are_duplicates_without_outputs(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 12)
    entries = [fields_of("a", row, position=at) for at, row in enumerate(rows)]
    # a producer that retries: single ones, overlapping and whole
    sent = [*entries[:5], entries[4], entries[3], *entries[2:9], *entries]
    async with consuming(server.url, artifact) as consumer:
        add(client, "events", *sent)
        await becomes(
            lambda: sum(consumer.counts.values()) == len(sent) and not pending(client), "all"
        )
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)
    assert consumer.counts == {"committed": 12, "duplicates": len(sent) - 12}
    assert client.xlen("events:dead") == 0


BAD = [
    ({"event": "[1, 2, 3]"}, "invalid_input", "stream"),
    ({"stream": "a/b", "event": "[1, 2, 3]"}, "invalid_name", "stream"),
    ({"stream": "a"}, "invalid_input", "event"),
    ({"stream": "a", "event": "[1, 2"}, "malformed_body", "event"),
    ({"stream": "a", "event": "[" * 100_000}, "malformed_body", "event"),
    ({"stream": "a", "event": '[1, 2, 3]],"dry_run":true,"x":[[]'}, "malformed_body", "event"),
    ({"stream": "a", "event": "[1, 2]"}, "invalid_input", "inputs"),
    ({"stream": "a", "event": "7"}, "invalid_input", "events"),
    ({"stream": "a", "event": "[1, 2, 3]", "position": "-1"}, "invalid_input", "position"),
    ({"stream": "a", "event": "[1, 2, 3]", "position": "99"}, "position_ahead", "position"),
]


@pytest.mark.parametrize(("fields", "code", "place"), BAD, ids=lambda value: str(value)[:40])
async def test_an_event_that_cannot_be_read_is_a_dead_letter_and_its_stream_goes_on(
    server: RealServer, client: Any, artifact: Artifact, fields: Any, code: str, place: str
) -> None:
    rows = rows_of(RANDOM, 6)
    good = [fields_of("a", row) for row in rows]
    bad_id = add(client, "events", *good[:3], fields, *good[3:])[3]
    async with consuming(server.url, artifact):
        await until_count(client, "scores", 6)
        await until_count(client, "events:dead", 1)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)
    [letter] = letters(client)
    assert letter["carry-code"] == code
    assert place in letter["carry-reason"]
    assert letter["carry-entry"] == bad_id.decode()
    assert {name: letter[name] for name in fields} == fields
    assert pending(client) == 0


async def test_a_stream_halts_behind_an_event_that_cannot_be_read(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 4)
    bad = {"stream": "a", "event": "[1]"}
    async with consuming(server.url, artifact, on_error="halt"):
        add(client, "events", fields_of("a", rows[0]), bad, fields_of("a", rows[1]))
        add(client, "events", fields_of("b", rows[0]))
        await until_count(client, "scores", 2)
        await until_count(client, "events:dead", 2)
    add(client, "events", fields_of("a", rows[2]), fields_of("b", rows[1]))
    async with consuming(server.url, artifact, on_error="halt"):
        await until_count(client, "scores", 3)
        await until_count(client, "events:dead", 3)
    found = outputs_of(client, "scores")
    assert_outputs(artifact, found["a"], rows[:1])
    assert_outputs(artifact, found["b"], rows[:2])
    codes = [letter["carry-code"] for letter in letters(client)]
    assert codes == ["invalid_input", "previous_failed", "previous_failed"]
    assert letters(client)[1]["event"] == json.dumps(rows[1].tolist())


DEPARTURE = {
    "departed": "2013-01-01T09:00:00-05:00",
    "dep_delay": 1,
    "scheduled": "09:00",
    "origin": "EWR",
    "carrier": "UA",
    "destination": "ORD",
    "distance": 719,
}


async def test_fields_of_an_entry_are_the_members_of_its_event(
    server: RealServer, client: Any
) -> None:
    """Also names of categories that could be numbers."""
    flights = load_artifact(PRETRAINED / "flights")
    event = DEPARTURE | {"carrier": "9E"}
    add(client, "events", {"stream": "a", "event": json.dumps(event)}, {"stream": "b", **event})
    async with consuming(server.url, flights, model="flights"):
        await until_count(client, "events:dead", 1)
    client.delete("events:dead")
    config = {"model": "flights", "event": {"field": None}, "group": "flat"}
    async with consuming(server.url, flights, **config):
        await until_count(client, "scores", 2)
    found = outputs_of(client, "scores")
    assert found["a"] == found["b"]


async def test_a_field_whose_name_is_not_utf_8_is_a_dead_letter(
    server: RealServer, client: Any
) -> None:
    flights = load_artifact(PRETRAINED / "flights")
    add(client, "events", {"stream": "a", b"\xff": "1"}, {"stream": "a", **DEPARTURE})
    async with consuming(server.url, flights, model="flights", event={"field": None}):
        await until_count(client, "scores", 1)
        await until_count(client, "events:dead", 1)
    [(_, letter)] = client.xrange("events:dead")
    assert letter[b"carry-code"] == b"malformed_body"
    assert letter[b"\xff"] == b"1"


async def test_an_unexpected_error_of_a_commit_is_logged_and_the_event_processed_again(
    server: RealServer, client: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, failed = RedisTopics.commit, asyncio.Event()

    async def fail_once(*args: Any) -> Any:
        if failed.is_set():
            return await commit(*args)
        failed.set()
        raise RuntimeError("planted")

    monkeypatch.setattr(RedisTopics, "commit", fail_once)
    with capture_logs() as logged:
        async with consuming(server.url, artifact):
            add(client, "events", {"stream": "a", "event": "no JSON"})
            await until_count(client, "events:dead", 1)
    assert [each["event"] for each in logged if each.get("exc_info")] == ["commit_failed"]


async def test_events_whose_chunk_failed_unexpectedly_are_processed_again_in_order(
    server: RealServer, client: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, make, calls = rows_of(RANDOM, 30), RequestReader.chunk, itertools.count(1)

    def fail_second(*args: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("planted")
        return make(*args)

    monkeypatch.setattr(RequestReader, "chunk", fail_second)
    add(client, "events", *[fields_of("a", row) for row in rows])
    with capture_logs() as logged:
        async with consuming(server.url, artifact):
            await until_count(client, "scores", 30)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)
    assert [each["event"] for each in logged if each.get("exc_info")] == ["chunk_failed"]


async def test_an_entry_that_raises_an_unexpected_error_becomes_a_dead_letter(
    server: RealServer, client: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, read = rows_of(RANDOM, 30), EventReader._value

    def fail_on_planted(reader: EventReader, values: dict[bytes, bytes]) -> Any:
        if b"planted" in values:
            raise RuntimeError("planted")
        return read(reader, values)

    monkeypatch.setattr(EventReader, "_value", fail_on_planted)
    entries = [fields_of("a", row) for row in rows]
    with capture_logs() as logged:
        async with consuming(server.url, artifact):
            add(client, "events", *entries[:10], entries[10] | {"planted": "1"}, *entries[10:])
            await until_count(client, "scores", 30)
            await until_count(client, "events:dead", 1)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)
    assert letters(client)[0]["carry-code"] == "internal_error"
    assert [each["event"] for each in logged if each.get("exc_info")] == ["entry_failed"]
    assert pending(client) == 0


async def test_an_unexpected_error_of_a_renewal_ends_the_consumer(
    server: RealServer, client: Any, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew, failed = RedisTopics.renew, asyncio.Event()

    async def fail(topics: RedisTopics, *args: Any) -> Any:
        if args[3] == 0:
            # a release
            return await renew(topics, *args)
        failed.set()
        raise RuntimeError("planted")

    monkeypatch.setattr(RedisTopics, "renew", fail)

    async def consume() -> None:
        async with consuming(server.url, artifact, lease_s=0.3) as consumer:
            await failed.wait()
            await becomes(lambda: consumer.count_owned() == 0, "the end")

    with pytest.raises(RuntimeError, match="planted"):
        await consume()


async def test_messagepack_is_read_and_written(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 8)
    packed = [{"name": "a", "row": ormsgpack.packb(row.tolist())} for row in rows]
    add(client, "events", *packed)
    config = {"stream": {"field": "name"}, "event": {"field": "row", "format": "msgpack"}}
    async with consuming(server.url, artifact, **config, outputs="msgpack"):
        await until_count(client, "scores", 8)
    outputs = [ormsgpack.unpackb(fields[b"outputs"]) for _, fields in client.xrange("scores")]
    found = [(at, each) for at, each in enumerate(outputs)]
    assert_outputs(artifact, found, rows)


async def test_a_missing_topic_fails_the_start(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    with pytest.raises(OperatorError, match=r"from: expected a stream 'events' .*got nothing"):
        async with consuming(server.url, artifact, create=False):
            pass


@pytest.mark.parametrize("name", ["events", "scores", "events:dead"])
async def test_a_topic_that_is_no_stream_fails_the_start(
    server: RealServer, client: Any, artifact: Artifact, name: str
) -> None:
    client.set(name, "text")
    with pytest.raises(OperatorError, match=f"expected a stream '{name}' .*got a string"):
        async with consuming(server.url, artifact):
            pass


async def test_outputs_of_blocks_have_the_positions_of_their_events(
    server: RealServer, client: Any, tmp_path: Path
) -> None:
    """The outputs of a block come with the event that completes its window."""
    spec = parse_spec(
        {
            "name": "probe",
            "features": 3,
            "blocks": {"size": 3, "lookahead": 4},
            "layers": [{"kind": "bidirectional", "units": 3}],
            "heads": [{"kind": "sequence", "name": "last"}],
        }
    )
    blocks = write_artifact(tmp_path / "probe", spec, contracting_weights(spec, 1))
    add(client, "events", *[fields_of("a", row) for row in rows_of(RANDOM, 15)])
    async with consuming(server.url, blocks) as consumer:
        await becomes(lambda: consumer.counts["committed"] == 15, "all events")
    assert [position for position, _ in outputs_of(client, "scores")["a"]] == [*range(9)]
