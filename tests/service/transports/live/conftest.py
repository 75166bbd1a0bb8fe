"""The application of the HTTP tests with live sockets and watching."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest

from models.artifact.artifact import Artifact
from service.codec.settings import RequestSettings
from tests.service.transports.live.sockets import live_application
from tests.service.transports.v1.conftest import held_back, models
from tests.service.transports.v1.harness import Harness
from tests.support.servers import RealServer

__all__ = ["held_back", "models"]


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    """A running application with nothing stored."""
    async with live_application(pipeline_server, models) as running:
        yield running


@pytest.fixture
async def large_api(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    """An application with limits that allow long frames and replies."""
    limits = RequestSettings(max_body_bytes=2**20)
    async with live_application(pipeline_server, models, limits) as running:
        yield running
