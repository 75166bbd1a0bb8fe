"""What a consumer does with the entries of a stream that was rewound."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.values import StreamKey
from tests.support.command import carry
from tests.support.consumers import (
    add,
    assert_outputs,
    consuming,
    fields_of,
    outputs_of,
    until_count,
)
from tests.support.pipelines import rows_of, worker
from tests.support.servers import RealServer, becomes

RANDOM = np.random.default_rng(28)
KEEPS = {"history_events": "64"}


async def rewind(server: RealServer, artifact: Artifact, position: int) -> None:
    """Rewind stream `a` by another process than the consumer."""
    async with worker(server.url, artifact, history=HistorySpec(events=64)) as pipeline:
        await pipeline.streams.rewind(ANYONE, StreamKey("probe", "a"), position, None)


async def test_entries_without_a_position_continue_where_the_stream_is(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 9)
    async with consuming(server.url, artifact, KEEPS):
        add(client, "events", *(fields_of("a", row) for row in rows[:6]))
        await until_count(client, "scores", 6)
        await rewind(server, artifact, 4)
        add(client, "events", *(fields_of("a", row) for row in rows[6:]))
        await until_count(client, "scores", 9)
    found = outputs_of(client, "scores")["a"]
    assert [position for position, _ in found] == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert_outputs(artifact, found[:4] + found[6:], np.concatenate([rows[:4], rows[6:]]))
    assert client.xpending("events", "carry")["pending"] == 0


async def test_entries_ahead_of_a_rewound_stream_wait_as_dead_letters(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    """What was acknowledged is not read again: it is produced again, and replayed in order."""
    rows = rows_of(RANDOM, 8)
    entries = [fields_of("a", row, position=at) for at, row in enumerate(rows)]
    async with consuming(server.url, artifact, KEEPS, on_error="halt") as consumer:
        add(client, "events", *entries[:6])
        await until_count(client, "scores", 6)
        await rewind(server, artifact, 4)
        add(client, "events", entries[2])
        await becomes(lambda: consumer.counts.get("duplicates"), "the entry that was seen")
        add(client, "events", *entries[6:])
        await until_count(client, "events:dead", 2)
        codes = [fields[b"carry-code"] for _, fields in client.xrange("events:dead")]
        assert codes == [b"position_ahead", b"previous_failed"]
        add(client, "events", *entries[4:6])
        await until_count(client, "events:dead", 4)
        options = ("--stream", "a", "--from", "events", "--redis-url", server.url)
        replayed = await asyncio.to_thread(carry, "dlq", "replay", *options)
        assert replayed.stdout == b"4 dead letters replayed\n"
        await until_count(client, "scores", 10)
    found = outputs_of(client, "scores")["a"]
    assert_outputs(artifact, found[:6], rows[:6])
    assert_outputs(artifact, found[:4] + found[6:], rows)
    assert client.xlen("events:dead") == 0
