"""The application of the HTTP tests with live sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest
from fastapi import FastAPI

from models.artifact.artifact import Artifact
from service.pipeline.watching import Watches
from service.transports.websocket.application import SocketLimits, add_live_sockets
from service.transports.websocket.watching import add_watching
from tests.service.transports.http.conftest import held_back, models
from tests.service.transports.http.harness import LIMITS, Harness, harness
from tests.service.transports.websocket.sockets import ORIGINS
from tests.support.servers import RealServer

__all__ = ["held_back", "models"]

SOCKETS = SocketLimits(window=8, max_frame_bytes=LIMITS.max_body_bytes)


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    """A running application with nothing stored."""

    def extend(app: FastAPI) -> None:
        add_live_sockets(app, SOCKETS, ORIGINS)
        add_watching(app, Watches(app.state.api.pipeline._store))

    async with harness(pipeline_server, models, extend=extend) as running:
        await running.store.outputs.start()
        try:
            yield running
        finally:
            await running.store.outputs.close()
