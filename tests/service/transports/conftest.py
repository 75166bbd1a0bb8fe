"""An application with every transport over HTTP, which requires access keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from service.pipeline.watching import Watches
from service.transports.live.watching import add_watching
from tests.service.transports.doors import add_all
from tests.service.transports.v1.harness import Harness, harness
from tests.support.models import random_weights, small_spec
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    folder = tmp_path_factory.mktemp("access")
    spec = small_spec()
    small = write_artifact(folder / "small", spec, random_weights(spec))
    return {"small": small, "probe": make_artifact(folder)}


@pytest.fixture(params=[True, False], ids=["fast path", "slow path"])
async def api(
    request: pytest.FixtureRequest, pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    """An application that requires keys."""
    async with harness(
        pipeline_server, models, fast_path=request.param, requires_keys=True, extend=add_all
    ) as running:
        add_watching(running.app, Watches(running.store, running.store.outputs, running.counts))
        await running.store.outputs.start()
        yield running
        await running.store.outputs.close()
