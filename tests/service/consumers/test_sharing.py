"""Consumers that share topics: assignments, leases, fences, rebalances; on a cluster too."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from models.artifact.artifact import Artifact
from service.consumers.assignment import assign_topics
from service.consumers.consumer import Consumer
from service.core.errors import OperatorError, StoreUnavailable
from service.core.values import StreamKey
from service.store.keys import KeySpace
from tests.support.cluster import Cluster, shared_cluster
from tests.support.consumers import (
    assert_outputs,
    consuming,
    fields_of,
    outputs_of,
    until_count,
)
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, emptied, server, shared_server

__all__ = ["server", "shared_cluster", "shared_server"]

RANDOM = np.random.default_rng(5)
PARTITIONS = 8
SPACE = KeySpace("carry", PARTITIONS)
STREAMS = [f"s{number}" for number in range(24)]


def topic_of(stream: str, kind: str = "in", name: str = "events") -> str:
    prefix = SPACE.partition_prefix(SPACE.partition(StreamKey("probe", stream)))
    return f"{prefix}:{kind}:{name}"


def produce(client: Any, rows: dict[str, Any], start: int, stop: int) -> None:
    for at in range(start, stop):
        for stream, each in rows.items():
            client.xadd(topic_of(stream), fields_of(stream, each[at]))


def found_in(client: Any) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for partition in range(PARTITIONS):
        found |= outputs_of(client, f"{SPACE.partition_prefix(partition)}:out:scores")
    return found


def written(client: Any) -> int:
    names = [f"{SPACE.partition_prefix(each)}:out:scores" for each in range(PARTITIONS)]
    return sum(client.xlen(name) for name in names)


def owned(*consumers: Consumer) -> list[str]:
    return sorted(
        name for each in consumers for name, topic in each.topics.items() if topic.fence is not None
    )


async def test_several_consumers_share_the_topics_of_partitions(
    server: RealServer, artifact: Artifact
) -> None:
    rows = {stream: rows_of(RANDOM, 30) for stream in STREAMS}
    settings = {"partitions": PARTITIONS}

    def start() -> Any:
        return consuming(server.url, artifact, settings, partitioned=True, lease_s=300)

    with server.client() as client:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(start())
            produce(client, rows, 0, 10)
            await becomes(lambda: written(client) >= 100, "progress")
            second = await stack.enter_async_context(start())
            await becomes(lambda: (len(owned(first)), len(owned(second))) == (4, 4), "a rebalance")
            produce(client, rows, 10, 20)
            async with start() as third:
                await becomes(lambda: len(owned(third)) >= 2, "a rebalance")
                assert len(set(owned(first, second, third))) == len(owned(first, second, third))
            await becomes(lambda: len(owned(first, second)) == 8, "a rebalance")
            produce(client, rows, 20, 30)
            await becomes(lambda: written(client) >= 30 * len(STREAMS), "all outputs")
        assert written(client) == 30 * len(STREAMS)
        found = found_in(client)
    for stream, each in rows.items():
        assert_outputs(artifact, found[stream], each)
    # the lease is far from its end: topics move by releases
    assert all(each.counts["losses"] == 0 for each in (first, second, third))


async def test_topics_move_a_few_at_a_time(
    server: RealServer, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.consumers.shared_topics.MOVES_AT_ONCE", 1)
    released: list[int] = []

    def start() -> Any:
        return consuming(server.url, artifact, {"partitions": PARTITIONS}, partitioned=True)

    async with start() as first:
        await becomes(lambda: len(owned(first)) == PARTITIONS, "all topics")
        async with start() as second:

            def is_shared() -> bool:
                released.append(sum(each._is_releasing for each in first.topics.values()))
                return (len(owned(first)), len(owned(second))) == (4, 4)

            await becomes(is_shared, "a rebalance")
    assert max(released) <= 1


async def test_a_topic_that_frees_memory_does_not_pass_those_that_wait(
    server: RealServer, artifact: Artifact
) -> None:
    async with consuming(server.url, artifact) as consumer:
        await becomes(lambda: len(owned(consumer)) == 1, "the topic")
        consumer.stop()
        await becomes(lambda: not owned(consumer), "its release")
        order: list[str] = []

        async def take(name: str) -> None:
            await consumer.reserve(1)
            order.append(name)

        await consumer.reserve(10**9)
        waiting = asyncio.create_task(take("waiting"))
        await asyncio.sleep(0)
        consumer.release(2)
        await take("passing")
        await waiting
    assert order == ["waiting", "passing"]


async def test_a_cluster_needs_partitions(shared_cluster: Cluster, artifact: Artifact) -> None:
    cluster = emptied(shared_cluster)
    with pytest.raises(OperatorError, match="partitioned: expected true"):
        async with consuming(cluster.url, artifact, partitioned=False):
            pass


async def test_a_stream_in_the_topic_of_another_partition_is_a_dead_letter(
    server: RealServer, artifact: Artifact
) -> None:
    stream, other = "s0", next(each for each in STREAMS if topic_of(each) != topic_of("s0"))
    with server.client() as client:
        client.xadd(topic_of(other), fields_of(stream, rows_of(RANDOM, 1)[0]))
        async with consuming(server.url, artifact, {"partitions": PARTITIONS}, partitioned=True):
            await until_count(client, topic_of(other, "dead"), 1)
        [(_, letter)] = client.xrange(topic_of(other, "dead"))
    assert letter[b"carry-code"] == b"invalid_input"
    assert b"another partition" in letter[b"carry-reason"]


async def test_consumers_of_a_group_that_write_to_different_topics_are_logged(
    server: RealServer, artifact: Artifact
) -> None:
    with capture_logs() as lines:
        for sink in ("scores", "scores", "others"):
            async with consuming(server.url, artifact, to=sink):
                pass
    [line] = [each for each in lines if each["event"] == "topics_changed"]
    assert (line["group"], line["topic"], line["log_level"]) == ("carry", "events", "warning")
    assert (line["earlier"]["sink"], line["now"]["sink"]) == ("scores", "others")


async def test_a_store_that_does_not_answer_is_logged_once(
    server: RealServer, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with consuming(server.url, artifact) as consumer:
        await becomes(lambda: bool(consumer.topics), "the assignment")
        failures: list[str] = []

        async def fail(*_: Any) -> Any:
            failures.append("")
            raise StoreUnavailable("it does not answer")

        with capture_logs() as lines:
            monkeypatch.setattr(consumer.store, "join", fail)
            await becomes(lambda: len(failures) > 2, "three failures")
            monkeypatch.undo()
    assert [each["event"] for each in lines].count("members_unknown") == 1


def test_assignments_are_balanced_and_stable() -> None:
    topics = [f"t{number}" for number in range(64)]
    members = ["a", "b", "c"]
    before = assign_topics(topics, members)
    assert before == assign_topics(topics, reversed(members))
    assert sorted(Counter(before.values()).values()) == [20, 22, 22]
    after = assign_topics(topics, [*members, "d"])
    moved = [topic for topic in topics if after[topic] != before[topic]]
    assert sum(after[topic] == "d" for topic in topics) == 16
    assert len(moved) < 32
    assert assign_topics(topics, []) == {}
