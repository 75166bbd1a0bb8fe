"""Requests with chunks of many streams: items fail independently, a stream keeps its order."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec.structs import replace

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.errors import (
    CarryError,
    InvalidInput,
    PositionAhead,
    PositionBehind,
    PreviousFailed,
)
from service.core.values import Chunk, Reply, StreamKey
from tests.support.pipelines import chunk_of, rows_of, worker


async def test_many_chunks_in_one_request(store_url: str, artifact: Artifact) -> None:
    rows = rows_of(np.random.default_rng(13), 12)
    unreadable = InvalidInput("events[0]: wrong", stream="b")
    async with worker(store_url, artifact) as one:
        items: list[Chunk | CarryError] = [
            chunk_of("a", rows[:4], 0),
            chunk_of("b", rows[:4], 0),
            chunk_of("a", rows[4:8], 4),
            unreadable,
            chunk_of("b", rows[8:], 8),
            chunk_of("c", rows, 7),
            chunk_of("c", rows, 0),
        ]
        results = await one.process_many(ANYONE, items)
        names = [type(result).__name__ for result in results]
        assert names[:4] == ["Reply", "Reply", "Reply", "InvalidInput"]
        assert names[4:] == ["PreviousFailed", "PositionAhead", "PreviousFailed"]
        retried = await one.process_many(
            ANYONE, [chunk_of("a", rows[:4], 0), chunk_of("a", rows[4:8], 4)]
        )
        assert isinstance(retried[0], PositionBehind)
        assert isinstance(retried[1], Reply)
        assert retried[1].replayed
        # no item passes a blocked one, though it would continue the stream
        blocked = await one.process_many(
            ANYONE,
            [chunk_of("a", rows[:4], 0), chunk_of("a", rows[8:]), chunk_of("a", rows[8:], 8)],
        )
        assert [type(each) for each in blocked[1:]] == [PreviousFailed] * 2
        assert [each.facts.get("previous") for each in blocked[1:]] == ["position_behind"] * 2
        assert (await one.streams.read(ANYONE, StreamKey("probe", "a"))).head.position == 8


async def test_a_failed_dry_run_does_not_block_later_items(
    store_url: str, artifact: Artifact
) -> None:
    """Neither if it fails by itself, nor if an earlier item blocks it."""
    rows = rows_of(np.random.default_rng(22), 8)
    dry_ahead, dry_append = (
        replace(chunk_of("a", rows[:2], position), dry_run=True) for position in (7, None)
    )
    async with worker(store_url, artifact) as one:
        results = await one.process_many(
            ANYONE,
            [
                dry_ahead,
                chunk_of("a", rows[:4], 0),
                chunk_of("a", rows[:2], 0),
                dry_append,
                chunk_of("a", rows[4:], 4),
            ],
        )
        kinds = [type(result) for result in results]
        assert kinds == [PositionAhead, Reply, PositionBehind, PreviousFailed, Reply]
        assert (await one.streams.read(ANYONE, StreamKey("probe", "a"))).head.position == 8


async def test_each_item_of_a_request_is_visited_once(store_url: str, artifact: Artifact) -> None:
    """A thousand failing items would otherwise block the event loop."""
    visits: list[str] = []

    class Facts(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            visits.append(name)
            return super().get(name, default)

    items = [InvalidInput("wrong", stream="s") for _ in range(100)]
    for item in items:
        item.facts = Facts(item.facts)
    async with worker(store_url, artifact) as one:
        assert await one.process_many(
            ANYONE, [*items, chunk_of("s", rows_of(np.random.default_rng(1), 1), 0)]
        )
    assert len(visits) <= 2 * len(items)
