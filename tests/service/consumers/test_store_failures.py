"""Consumers while the store is killed, loses commits, or is full."""

from __future__ import annotations

import numpy as np

from models.artifact.artifact import Artifact
from tests.support.consumers import (
    add,
    assert_outputs,
    consuming,
    fields_of,
    outputs_of,
    until_count,
)
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes, own_server

__all__ = ["own_server"]

RANDOM = np.random.default_rng(3)


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
