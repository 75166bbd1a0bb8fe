"""`build_pipeline`: a pipeline without a transport, which drains before its store is closed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.errors import ArtifactError
from service.access.caller import ANYONE
from service.build import PipelineService, build_pipeline
from service.core.errors import ShuttingDown, StoreUnavailable
from service.settings import Settings
from tests.support.metrics import read, series
from tests.support.pipelines import SPEC, chunk_of, rows_of
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


def test_models_and_what_settings_name_of_them_are_checked_before_anything_starts(
    artifact: Artifact,
) -> None:
    with pytest.raises(ArtifactError, match="CARRY_FALSE_ALARMS_PER_DAY"):
        build("unix:///none.sock", artifact, false_alarms_per_day="other=1")
    with pytest.raises(ArtifactError, match="CARRY_HISTORY_EVENTS"):
        build("unix:///none.sock", artifact, history_events="other=1")


def test_one_model_of_a_directory_is_loaded_whatever_the_others_are(
    artifact: Artifact, tmp_path: Path
) -> None:
    copytree(artifact.path, tmp_path / "wanted")
    spec = SPEC.model_copy(update={"name": "other"})
    other = write_artifact(tmp_path / "other", spec, artifact.weights)
    (other.path / "weights.safetensors").write_bytes(b"damaged")
    flags = {"redis_url": "unix:///none.sock", "models_dir": tmp_path}
    settings = Settings.load({**flags, "false_alarms_per_day": "other=1"})
    assert [*build_pipeline(settings, model="probe").pipeline.models] == ["probe"]
    with pytest.raises(ArtifactError, match="expected one of other, probe, got 'none'"):
        build_pipeline(settings, model="none")
    with pytest.raises(ArtifactError, match=r"other/weights\.safetensors"):
        build_pipeline(settings)
