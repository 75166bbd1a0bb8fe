"""`build_pipeline`: a pipeline without a transport, which drains before its store is closed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.errors import ArtifactError
from service.access.caller import ANYONE
from service.build import PipelineService, build_pipeline
from service.core.errors import ShuttingDown, StoreUnavailable
from service.settings import Settings
from tests.support.metrics import read, series
from tests.support.pipelines import chunk_of, rows_of
from tests.support.servers import RealServer

ROWS = rows_of(np.random.default_rng(1), 3)


def build(url: str, artifact: Artifact, **settings: object) -> PipelineService:
    flags = {"redis_url": url, "models_dir": artifact.path, **settings}
    return build_pipeline(Settings.load(flags))


async def test_accepted_chunks_are_answered_before_the_store_is_closed(
    pipeline_server: RealServer, artifact: Artifact
) -> None:
    pipeline_server.client().flushall()
    async with build(pipeline_server.url, artifact) as service:
        chunks = [chunk_of(f"s{number}", ROWS, 0) for number in range(8)]
        accepted = [
            asyncio.create_task(service.pipeline.process(ANYONE, chunk)) for chunk in chunks
        ]
        await asyncio.sleep(0)
    replies = await asyncio.gather(*accepted)
    assert {reply.head.position for reply in replies} == {3}
    with pytest.raises(ShuttingDown):
        await service.pipeline.process(ANYONE, chunks[0])
    found = read(service.recorder.render())
    assert found[series("carry_chunks_total", model="probe")] == 8


async def test_a_store_that_does_not_answer_fails_the_start(
    artifact: Artifact, tmp_path: Path
) -> None:
    service = build(f"unix://{tmp_path}/none.sock", artifact, store_wait_s=0.2)
    with pytest.raises(StoreUnavailable):
        async with service:
            raise AssertionError("expected an error")


def test_models_and_their_alarm_rates_are_checked_before_anything_starts(
    artifact: Artifact,
) -> None:
    with pytest.raises(ArtifactError, match="CARRY_FALSE_ALARMS_PER_DAY"):
        build("unix:///none.sock", artifact, false_alarms_per_day="other=1")
