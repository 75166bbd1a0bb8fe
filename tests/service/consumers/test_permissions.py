"""The users of `deploy/redis/consumers.acl`: what they may do is enough, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import redis

from carry_client import Producer
from models.artifact.artifact import Artifact
from service.core.errors import OperatorError
from tests.support.cluster import Cluster, shared_cluster
from tests.support.command import carry
from tests.support.consumers import assert_outputs, consuming, outputs_of, relaying
from tests.support.pages import ROOT
from tests.support.pipelines import rows_of
from tests.support.receiver import receiving
from tests.support.servers import KINDS, RealServer, becomes, emptied, free_port, real_server

__all__ = ["shared_cluster"]

LINES = (ROOT / "deploy" / "redis" / "consumers.acl").read_text().splitlines()
RULES = {line.split()[1]: line.split()[3:] for line in LINES}
PARTITIONS = 4
RANDOM = np.random.default_rng(3)


@contextmanager
def users(*nodes: RealServer) -> Iterator[None]:
    """The users of the file, without passwords' hashes, on these servers."""
    for node in nodes:
        for name, rules in RULES.items():
            others = [rule for rule in rules if not rule.startswith("#")]
            node.ask("ACL", "SETUSER", name, "reset", "on", f">{name}", *others)
        node.ask("ACL", "LOG", "RESET")
    try:
        yield
    finally:
        for node in nodes:
            node.ask("ACL", "DELUSER", *RULES)


def produce(client: Any, rows: dict[str, Any]) -> None:
    producer = Producer(client, "events", model="probe", partitions=PARTITIONS)
    for name, each in rows.items():
        for position, row in enumerate(each):
            producer.send(name, row.tolist(), position)


def outputs(client: Any) -> dict[str, Any]:
    """The outputs of all partitions, by stream."""
    found: dict[str, Any] = {}
    for partition in range(PARTITIONS):
        found |= outputs_of(client, f"carry{{p{partition:04d}}}:out:scores")
    return found


def denied(*nodes: RealServer) -> set[tuple[str, str]]:
    """Whom the servers denied a command or a key, and which one."""
    found = set()
    for node in nodes:
        for line in node.ask("ACL", "LOG"):
            fields = dict(zip(line[::2], line[1::2], strict=True))
            found.add((fields[b"username"].decode(), fields[b"object"].decode()))
    # redis-py names itself, and goes on without
    return {each for each in found if each[1] != "client|setinfo"}


@pytest.mark.parametrize("kind", KINDS)
async def test_consumer_and_producer_may_do_their_work_and_no_more(
    kind: str, artifact: Artifact
) -> None:
    rows = {name: rows_of(RANDOM, 5) for name in ("a", "b", "c")}
    at = f"127.0.0.1:{(port := free_port())}"
    url = f"redis://consumer:consumer@{at}"
    bad = "carry{p0000}:in:events"
    options = ("--bind", "127.0.0.1", "--port", str(port))
    with real_server(kind, *options) as server, users(server), server.client() as client:
        producing = redis.Redis.from_url(f"redis://producer:producer@{at}")
        produce(producing, rows)
        # what a plain consumer left pending is claimed, and what is invalid becomes a dead letter
        client.xadd(bad, {"stream": "bad", "event": "[1]"})
        client.xgroup_create(bad, "carry", "0")
        client.xreadgroup("carry", "plain", {bad: ">"}, 1)
        flags = {"partitions": PARTITIONS, "history_events": "2", "history_snapshots": 2}
        async with consuming(
            url, artifact, flags, partitioned=True, keep=1000, delete=True, on_error="halt"
        ) as consumer:
            await becomes(lambda: consumer.counts["committed"] == 15, "the outputs")
            await becomes(lambda: client.xlen("carry{p0000}:dead:events") == 1, "a dead letter")
            await consumer.read_status()
        for name, each in rows.items():
            assert_outputs(artifact, outputs(client)[name], each)
        words = ("--from", "events", "--partitioned", "--redis-url", url)
        replay = ("dlq", "replay", "--stream", "bad")
        for command in (("consume", "status"), ("dlq", "list"), replay):
            done = await asyncio.to_thread(carry, *command, *words, CARRY_PARTITIONS="4")
            assert done.exit_code == 0, done.stderr
        assert denied(server) == set()
        with pytest.raises(OperatorError, match=r"from: topic 'events': .* permissions"):
            async with consuming(url, artifact, flags):
                pass
        consuming_client = redis.Redis.from_url(url)
        calls: list[Callable[[], Any]] = [
            lambda: consuming_client.hset("carry:keys", "a", "b"),
            lambda: consuming_client.flushall(),
            lambda: consuming_client.xadd("other", {"a": "b"}),
            lambda: producing.get("carry:keys"),
            lambda: producing.xadd("carry{p0000}:out:scores", {"a": "b"}),
            lambda: producing.xrange("carry{p0000}:in:events"),
        ]
        for call in calls:
            with pytest.raises(redis.exceptions.NoPermissionError):
                call()
        consuming_client.close()
        producing.close()


async def test_consumer_and_producer_may_do_their_work_on_a_cluster(
    shared_cluster: Cluster, artifact: Artifact
) -> None:
    rows = {name: rows_of(RANDOM, 5) for name in ("a", "b", "c")}
    hosts = emptied(shared_cluster).url.partition("://")[2]
    with users(*shared_cluster.nodes), shared_cluster.client() as client:
        host, _, port = hosts.split(",")[0].partition(":")
        with redis.RedisCluster(
            host=host, port=int(port), username="producer", password="producer"
        ) as producing:
            produce(producing, rows)
        url = f"redis+cluster://consumer:consumer@{hosts}"
        async with consuming(url, artifact, {"partitions": PARTITIONS}) as consumer:
            await becomes(lambda: consumer.counts["committed"] == 15, "the outputs")
        for name, each in rows.items():
            assert_outputs(artifact, outputs(client)[name], each)
        async with receiving() as receiver:
            config = {"url": receiver.url, "secret": "A" * 44}
            async with relaying(url, {"partitions": PARTITIONS}, webhook=config):
                await becomes(lambda: receiver.count() == 15, "the delivery of the outputs")
        assert receiver.outputs() == outputs(client)
        assert denied(*shared_cluster.nodes) == set()
