"""Chunks that start their stream over, in races with other chunks and over any stored state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.values import Chunk, StreamKey
from service.pipeline.pipeline import Pipeline
from service.store.redis.redis_store import RedisStore
from tests.support.pipelines import (
    Counts,
    chunk_of,
    make_artifact,
    oracle_outputs,
    rows_of,
    send,
    worker,
)

ROWS = rows_of(np.random.default_rng(71), 12)


def start(position: int | None = 0, stream: str = "s") -> Chunk:
    """The first four rows, from the zero state."""
    return replace(chunk_of(stream, ROWS[:4], position), starts_over=True)


async def test_outputs_and_state_after_a_start_are_those_of_a_new_stream(
    store_url: str, artifact: Artifact
) -> None:
    async with worker(store_url, artifact) as pipeline:
        for position in (None, 0, None):
            await send(pipeline, "s", rows_of(np.random.default_rng(2), 3))
            first = await pipeline.process(ANYONE, start(position))
            rest = await send(pipeline, "s", ROWS[4:], 4)
            outputs = np.concatenate([first.outputs, rest.outputs])
            np.testing.assert_allclose(
                outputs, oracle_outputs(artifact, ROWS), rtol=1e-4, atol=1e-5
            )
            assert first.created
            assert not first.replayed


async def test_retries_of_a_start_race_and_are_applied_once(
    store_url: str, artifact: Artifact
) -> None:
    counts = Counts()

    async def apply(pipelines: list[Pipeline]) -> None:
        chunks = [pipeline.process(ANYONE, start()) for pipeline in pipelines for _ in range(3)]
        replies = await asyncio.gather(*chunks)
        assert len({reply.head for reply in replies}) == 1
        assert [reply.replayed for reply in replies].count(False) == 1

    async with (
        worker(store_url, artifact, counts) as one,
        worker(store_url, artifact, counts) as two,
    ):
        await apply([one, two])
        await send(one, "s", ROWS[4:], 4)
        await apply([two, one])
    assert counts.seen["chunks"] == 3


@pytest.mark.parametrize("position", [None, 0])
async def test_start_replaces_the_state_of_another_version(
    store_url: str, artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, position: int
) -> None:
    other = make_artifact(tmp_path_factory.mktemp("other"), seed=2)
    async with worker(store_url, other) as before, worker(store_url, artifact) as after:
        await before.process(ANYONE, start(position))
        reply = await after.process(ANYONE, start(position))
        assert not reply.replayed
        np.testing.assert_allclose(
            reply.outputs, oracle_outputs(artifact, ROWS[:4]), rtol=1e-4, atol=1e-5
        )


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The streams that are loaded."""
    loaded: list[str] = []
    load = RedisStore.load

    def watched(store: RedisStore, keys: Sequence[StreamKey], deadline_s: float) -> Any:
        loaded.extend(key.stream for key in keys)
        return load(store, keys, deadline_s)

    monkeypatch.setattr(RedisStore, "load", watched)
    return loaded


async def test_start_without_a_position_is_not_loaded(
    store_url: str, artifact: Artifact, loads: list[str]
) -> None:
    counts = Counts()
    async with worker(store_url, artifact, counts) as pipeline:
        for stream in ("a", "b", "a"):
            reply = await pipeline.process(ANYONE, start(None, stream))
            assert (reply.created, reply.head.position) == (True, 4)
        assert loads == []
        await pipeline.process(ANYONE, start(0, "a"))
        assert loads == ["a"]
    assert counts.seen["conflicts"] == 0
    assert counts.seen["chunks"] == 4


async def test_starts_of_streams_of_another_worker_are_loaded_after_the_first(
    store_url: str, artifact: Artifact, loads: list[str]
) -> None:
    """One that was deleted, too."""
    counts, names = Counts(), [f"s-{number}" for number in range(4)]
    async with worker(store_url, artifact) as one, worker(store_url, artifact, counts) as two:
        for name in names:
            await send(one, name, ROWS)
        await one.streams.delete(ANYONE, StreamKey(artifact.spec.name, names[0]))
        loads.clear()
        for name in names:
            first = await two.process(ANYONE, start(None, name))
            rest = await send(two, name, ROWS[4:], 4)
            outputs = np.concatenate([first.outputs, rest.outputs])
            np.testing.assert_allclose(
                outputs, oracle_outputs(artifact, ROWS), rtol=1e-4, atol=1e-5
            )
        assert loads == names
    assert counts.seen["conflicts"] == 1
    assert counts.seen["chunks"] == 2 * len(names)


async def test_start_over_a_stale_cached_stream_conflicts_once(
    store_url: str, artifact: Artifact
) -> None:
    counts = Counts()
    async with worker(store_url, artifact, counts) as one, worker(store_url, artifact) as two:
        await send(one, "s", ROWS)
        await send(two, "s", ROWS)
        await one.process(ANYONE, start(None))
        rest = await send(one, "s", ROWS[4:], 4)
    np.testing.assert_allclose(
        rest.outputs, oracle_outputs(artifact, ROWS)[4:], rtol=1e-4, atol=1e-5
    )
    assert counts.seen["conflicts"] == 1
