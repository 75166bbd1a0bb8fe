"""Producers: `carry produce` and the client's `Producer` write to the topic of each stream."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import redis.asyncio

from carry_client import Producer
from models.artifact.artifact import Artifact
from tests.support.cluster import Cluster, shared_cluster
from tests.support.command import carry
from tests.support.consumers import assert_outputs, consuming, outputs_of, until_count
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, emptied, server, shared_server

__all__ = ["server", "shared_cluster", "shared_server"]

RANDOM = np.random.default_rng(11)
PARTITIONS = 8
STREAMS = [f"s{number}" for number in range(10)]


def lines_of(rows: dict[str, Any], **members: Any) -> bytes:
    """Lines of events, stream by stream in turns."""
    events = [
        {"stream": stream, "event": each[at].tolist(), "position": at}
        for at in range(4)
        for stream, each in rows.items()
    ]
    return b"\n".join(json.dumps(event).encode() for event in events)


async def test_lines_of_a_file_are_written_to_partitions_of_a_cluster(
    shared_cluster: Cluster, artifact: Artifact
) -> None:
    cluster = emptied(shared_cluster)
    rows = {stream: rows_of(RANDOM, 4) for stream in STREAMS}
    words = ("produce", "-", "--to", "events", "--model", "probe", "--redis-url", cluster.url)
    for _ in range(2):
        # the second time, each event is a duplicate
        result = carry(*words, data=lines_of(rows), CARRY_PARTITIONS=str(PARTITIONS))
        assert result.stdout == b"40 events written\n", result.stderr
    async with consuming(cluster.url, artifact, {"partitions": PARTITIONS}) as consumer:
        await becomes(lambda: sum(consumer.counts.values()) == 80, "all events")
    assert consumer.counts == {"committed": 40, "duplicates": 40}
    found: dict[str, Any] = {}
    with cluster.client() as client:
        for partition in range(PARTITIONS):
            found |= outputs_of(client, f"carry{{p{partition:04d}}}:out:scores")
    for stream, each in rows.items():
        assert_outputs(artifact, found[stream], each)


@pytest.mark.parametrize("partitions", [None, PARTITIONS])
async def test_the_producer_of_the_client_writes_what_is_consumed(
    server: RealServer, artifact: Artifact, partitions: int | None
) -> None:
    rows = rows_of(RANDOM, 6)
    with server.client() as client:
        producer = Producer(client, "events", model="probe", partitions=partitions)
        for at in (0, 1, 1, 2):
            producer.send("a", rows[at].tolist(), position=at)
        async with redis.asyncio.Redis(unix_socket_path=server.socket) as other:
            later = Producer(other, "events", model="probe", partitions=partitions)
            for at in (3, 4, 5):
                assert await later.send("a", rows[at].tolist(), position=at)
        outputs = producer.topic("a").replace(":in:events", ":out:scores")
        outputs = outputs if partitions else "scores"
        settings = {"partitions": PARTITIONS}
        async with consuming(server.url, artifact, settings, partitioned=partitions is not None):
            await until_count(client, outputs, 6)
        assert_outputs(artifact, outputs_of(client, outputs)["a"], rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"event": {}}', "line 1: expected a member 'stream'"),
        (b'{"stream": "a"}', "line 1: expected a member 'event'"),
        (b'{"stream": "a/b", "event": {}}', "line 1: stream: expected 1 to 256"),
        (b'{"stream": "a", "event": {}, "at": 1}', "line 1: expected members among"),
        (b'{"stream": "a", "event": {}, "position": 1.5}', "line 1: position: Expected `int`"),
        (b'{"stream": 7, "event": {}}', "line 1: stream: Expected `str`"),
        (b'{"stream": "a", "event": "x"}', "line 1: event: expected an object or a row"),
        (b"[]", "line 1: Expected `object`"),
    ],
)
def test_an_invalid_line_is_an_error(server: RealServer, line: bytes, message: str) -> None:
    result = carry("produce", "-", "--to", "events", "--redis-url", server.url, data=line)
    assert result.exit_code == 1
    assert message in result.stderr


def test_an_invalid_line_says_how_many_events_were_written(server: RealServer) -> None:
    lines = b'{"stream": "a", "event": {}}\n' * 700 + b"{"
    with server.client() as client:
        client.delete("events")
        result = carry("produce", "-", "--to", "events", "--redis-url", server.url, data=lines)
        assert client.xlen("events") == 500
    assert result.exit_code == 1
    assert "line 701: " in result.stderr
    assert result.stderr.endswith("; 500 events were written\n")


def test_a_topic_that_is_no_stream_is_an_error_with_its_name(server: RealServer) -> None:
    line = b'{"stream": "a", "event": {}}\n'
    with server.client() as client:
        client.set("text", "x")
    result = carry("produce", "-", "--to", "text", "--redis-url", server.url, data=line)
    assert result.exit_code == 1
    assert "carry: --to text: " in result.stderr
    assert result.stderr.endswith("; 0 events were written, and perhaps some of the next 1\n")


def test_a_missing_file_is_an_error(server: RealServer) -> None:
    result = carry("produce", "no/file", "--to", "events", "--redis-url", server.url)
    assert result.exit_code == 1
    assert result.stderr.endswith("carry: no/file: No such file or directory\n")
