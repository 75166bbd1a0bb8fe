"""Chunks that start their stream over, in races with other chunks and over any stored state."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from msgspec.structs import replace

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.core.values import Chunk
from service.pipeline.pipeline import Pipeline
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
