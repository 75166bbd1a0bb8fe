"""An application with the V2 routes, and requests for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest
from fastapi import FastAPI

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from service.transports.v2.http_routes import add_kserve
from service.transports.v2.inference import Inference
from tests.service.transports.v1.harness import harness
from tests.service.transports.v2.v2 import V2
from tests.support.models import random_weights, small_spec
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """`small` takes events, `probe` rows only."""
    folder = tmp_path_factory.mktemp("models")
    spec = small_spec()
    small = write_artifact(folder / "small", spec, random_weights(spec))
    return {"small": small, "probe": make_artifact(folder)}


def add_v2(app: FastAPI) -> None:
    """Add the V2 routes, without statistics."""
    add_kserve(app, Inference(app.state.api), dict)


@pytest.fixture(params=[True, False], ids=["fast path", "slow path"])
async def v2(
    request: pytest.FixtureRequest, pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[V2]:
    """A running application with nothing stored."""
    async with harness(pipeline_server, models, fast_path=request.param, extend=add_v2) as api:
        yield V2(api)
