"""`carry consume --repartition`: entries of one topic are moved to those of partitions, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.consumers.config import make_config
from service.consumers.repartition import Repartitioner
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster, shared_cluster
from tests.support.command import carry
from tests.support.consumers import (
    PROBE,
    add,
    assert_outputs,
    consuming,
    fields_of,
    interleaved,
    outputs_of,
)
from tests.support.marked import assert_continued, create_streams, mark_of, stream_after
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, emptied, opened, own_server, real_server

__all__ = ["own_server", "shared_cluster"]

RANDOM = np.random.default_rng(13)
PARTITIONS = 8
OUTPUTS = [f"carry{{p{partition:04d}}}:out:scores" for partition in range(PARTITIONS)]


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    with real_server("valkey") as running:
        yield running


@asynccontextmanager
async def moving(url: str, **config: Any) -> AsyncIterator[Repartitioner]:
    """A repartitioner that runs; it is stopped at the end."""
    settings = StoreSettings(url, partitions=PARTITIONS, store_wait_s=20)
    store = RedisStore(settings)
    await store.start()
    mover = Repartitioner(store.topics, settings.keys, make_config(PROBE | config, "test"))
    task = asyncio.create_task(mover.run())
    try:
        yield mover
    finally:
        mover.stop()
        await task
        await store.close()


def written(client: Any) -> int:
    return sum(client.xlen(name) for name in OUTPUTS)


async def test_moved_events_are_consumed_on_a_cluster(
    shared_cluster: Cluster, artifact: Artifact
) -> None:
    cluster = emptied(shared_cluster)
    rows = {f"s{number}": rows_of(RANDOM, 30) for number in range(20)}
    entries = interleaved(rows)
    with cluster.client() as client:
        for fields in entries[:300]:
            client.xadd("events", fields)
        async with (
            moving(cluster.url),
            consuming(cluster.url, artifact, {"partitions": PARTITIONS}),
        ):
            for fields in [{"stream": "a/b", "event": "[]"}, *entries[300:]]:
                client.xadd("events", fields)
            await becomes(lambda: written(client) >= 600, "all outputs")
        assert written(client) == 600
        assert client.xpending("events", "carry")["pending"] == 0
        [(_, letter)] = client.xrange("{events}:dead")
        assert letter[b"carry-code"] == b"invalid_name"
        found: dict[str, Any] = {}
        for name in OUTPUTS:
            found |= outputs_of(client, name)
    for name, each in rows.items():
        assert_outputs(artifact, found[name], each)


async def test_what_was_moved_and_not_acknowledged_is_not_moved_again(
    server: RealServer, artifact: Artifact
) -> None:
    with server.client() as client:
        client.flushall()
        add(client, "events", *[fields_of("a", row) for row in rows_of(RANDOM, 20)])
        async with moving(server.url) as mover:
            await becomes(lambda: mover.counts["moved"] == 20, "all")
        [name] = client.keys("carry{*}:in:events")
        assert client.xlen(name) == 20
        # as if it had died before it acknowledged the last ten, and more had come
        client.xgroup_setid("events", "carry", client.xrange("events")[9][0])
        add(client, "events", *[fields_of("a", row) for row in rows_of(RANDOM, 5)])
        async with moving(server.url) as mover:
            await becomes(lambda: mover.counts["moved"] == 15, "all")
        assert client.xlen(name) == 25


@pytest.mark.parametrize(("source", "got"), [("nothing", "nothing"), ("text", "a string")])
def test_a_topic_that_is_missing_or_no_stream_is_an_error(
    server: RealServer, source: str, got: str
) -> None:
    with server.client() as client:
        client.set("text", "x")
        words = ("--from", source, "--model", "probe", "--redis-url", server.url)
        result = carry("consume", "--repartition", *words, CARRY_PARTITIONS=str(PARTITIONS))
        assert client.exists("nothing") == 0
    assert result.exit_code == 1
    assert f"from: expected a stream {source!r} in the store" in result.stderr
    assert result.stderr.endswith(f"got {got}\n")


async def test_entries_are_moved_once_while_the_store_is_killed(
    own_server: RealServer, artifact: Artifact
) -> None:
    with own_server.client() as client:
        add(
            client,
            "events",
            *[fields_of(f"s{at % 9}", row) for at, row in enumerate(rows_of(RANDOM, 3000))],
        )
    async with moving(own_server.url) as mover:
        for goal in (500, 1500):
            await becomes(lambda goal=goal: mover.counts["moved"] >= goal, "progress")
            own_server.kill()
            own_server.start()
        await becomes(lambda: mover.counts["moved"] >= 3000, "all")
    with own_server.client() as client:
        names = client.keys("carry{*}:in:events")
        assert sum(client.xlen(name) for name in names) == 3000


async def test_moved_events_that_a_loaded_state_contains_are_skipped(
    shared_cluster: Cluster, artifact: Artifact
) -> None:
    """They have other ids than those of the history, and say which they had."""
    cluster = emptied(shared_cluster)
    rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(10)}
    settings = {"partitions": PARTITIONS}
    with cluster.client() as client:
        ids = [client.xadd("events", fields) for fields in interleaved(rows)]
        streams = {
            name: stream_after(artifact, each[: at + 5], mark_of("events", ids[10 * (at + 4) + at]))
            for at, (name, each) in enumerate(rows.items())
        }
        async with opened(cluster.url, **settings) as store:
            await create_streams(store, streams)
        total = 200 - sum(range(5, 15))
        config = {"start": ids[39].decode()}
        async with (
            moving(cluster.url, **config),
            consuming(cluster.url, artifact, settings, **config) as consumer,
        ):
            await becomes(lambda: written(client) >= total, "all outputs")
            # of the 95 that the states contain, the group has not read the first 40
            await becomes(lambda: consumer.counts["skipped"] == 95 - 40, "the skipped events")
        found = {
            name: each for topic in OUTPUTS for name, each in outputs_of(client, topic).items()
        }
        for at, (name, each) in enumerate(rows.items()):
            assert_continued(artifact, found[name], each, at + 5)
