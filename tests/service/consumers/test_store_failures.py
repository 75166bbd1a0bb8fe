"""Consumers while the store is killed, loses commits, or is full."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from models.artifact.artifact import Artifact
from tests.support.consumers import (
    add,
    assert_outputs,
    consuming,
    fields_of,
    interleaved,
    outputs_of,
    until_count,
)
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, own_server

__all__ = ["own_server"]

RANDOM = np.random.default_rng(3)


def has_outputs(client: Any, count: int) -> bool:
    return client.xlen("scores") >= count


async def test_the_store_is_killed_while_events_are_consumed(
    own_server: RealServer, artifact: Artifact
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 200) for number in range(10)}
    with own_server.client() as client:
        add(client, "events", *interleaved(rows))
    async with consuming(own_server.url, artifact, {"store_wait_s": 20}):
        for goal in (100, 700):
            # what was written counts: the reply to a commit may be lost with the server
            with own_server.client() as client:
                enough = partial(has_outputs, client, goal)
                await becomes(enough, "progress")
            own_server.kill()
            own_server.start()
        with own_server.client() as client:
            await until_count(client, "scores", 2000)
            found = outputs_of(client, "scores")
    for name, each in rows.items():
        assert_outputs(artifact, found[name], each)


async def test_commits_that_the_store_lost_are_made_again(
    own_server: RealServer, artifact: Artifact
) -> None:
    """Streams, outputs and acknowledgements go back together, while the consumer goes on."""
    rows = rows_of(RANDOM, 30)
    entries = [fields_of("a", row) for row in rows]
    with own_server.client() as client:
        add(client, "events", *entries[:10])
        async with consuming(own_server.url, artifact) as consumer:
            await until_count(client, "scores", 10)
            keys = client.keys("*")
            before = {key: client.dump(key) for key in keys}
            add(client, "events", *entries[10:20])
            await until_count(client, "scores", 20)
            await becomes(lambda: consumer.counts["committed"] == 20, "results")
            pipe = client.pipeline(transaction=True)
            for key in keys:
                pipe.restore(key, 0, before[key], replace=True)
            pipe.execute()
            # the producer sends again what was lost, and goes on
            add(client, "events", *entries[10:])
            await until_count(client, "scores", 30)
    assert_outputs(artifact, outputs_of(own_server.client(), "scores")["a"], rows)


async def test_commits_that_the_store_lost_are_made_again_without_new_events(
    own_server: RealServer, artifact: Artifact
) -> None:
    """The lost commits' entries are pending again, and nothing else ever arrives."""
    rows = rows_of(RANDOM, 20)
    entries = [fields_of("a", row) for row in rows]
    with own_server.client() as client:
        add(client, "events", *entries[:10])
        async with consuming(own_server.url, artifact, lease_s=0.3) as consumer:
            await until_count(client, "scores", 10)
            before = {key: client.dump(key) for key in client.keys("*")}
            add(client, "events", *entries[10:])
            await until_count(client, "scores", 20)
            await becomes(lambda: consumer.counts["committed"] == 20, "results")
            pipe = client.pipeline(transaction=True)
            for key, value in before.items():
                pipe.restore(key, 0, value, replace=True)
            for fields in entries[10:]:
                pipe.xadd("events", fields)
            pipe.xreadgroup("carry", "carry", {"events": ">"})
            pipe.execute()
            await until_count(client, "scores", 20)
    assert_outputs(artifact, outputs_of(own_server.client(), "scores")["a"], rows)


async def test_a_full_store_is_waited_for(own_server: RealServer, artifact: Artifact) -> None:
    rows = rows_of(RANDOM, 10)
    with own_server.client() as client:
        async with consuming(own_server.url, artifact) as consumer:
            add(client, "events", fields_of("a", rows[0]))
            await until_count(client, "scores", 1)
            pipe = client.pipeline(transaction=True)
            for row in rows[1:]:
                pipe.xadd("events", fields_of("a", row))
            pipe.config_set("maxmemory", 1)
            pipe.execute()
            await becomes(lambda: consumer.counts["losses"] >= 2, "attempts")
            assert client.xlen("scores") == 1
            own_server.configure("maxmemory", 0)
            await until_count(client, "scores", 10)
        assert client.xlen("events:dead") == 0
        assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)


async def test_attempts_to_reject_events_pause_while_the_store_is_full(
    own_server: RealServer, artifact: Artifact
) -> None:
    """Each attempt is later than the one before it, and what fails is not counted."""
    with own_server.client() as client:
        async with consuming(own_server.url, artifact) as consumer:
            await becomes(lambda: consumer.count_owned() == 1, "the owner")
            pipe = client.pipeline(transaction=True)
            pipe.xadd("events", {"stream": "a", "event": "[1]"})
            pipe.config_set("maxmemory", 1)
            pipe.execute()
            await becomes(lambda: consumer.topics["events"]._failures >= 4, "attempts")
            assert consumer.counts["dead_letters"] == 0
            own_server.configure("maxmemory", 0)
            await until_count(client, "events:dead", 1)
            await becomes(lambda: consumer.counts["dead_letters"] == 1, "the count")
