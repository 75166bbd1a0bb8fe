"""Requests to the store that come late, seen over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace

from models.artifact.artifact import Artifact
from tests.service.transports.v1.harness import Harness, harness, problem, rows
from tests.support.proxy import LossyPath
from tests.support.servers import RealServer

ADDRESS = "/v1/models/probe/streams/s"


@asynccontextmanager
async def behind_a_path(
    server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[tuple[Harness, LossyPath]]:
    async with LossyPath.to(server.socket, server.folder) as path:
        behind = SimpleNamespace(url=path.url, client=server.client)
        async with harness(behind, models) as api:
            yield api, path


async def test_a_late_deletion_loses_no_chunk(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    async with behind_a_path(pipeline_server, models) as (api, path):
        body = {"position": 0, "inputs": rows(2).tolist()}
        await api.chunk(body)
        path.holds = 1
        assert (await api.client.delete(ADDRESS)).status_code == 204
        again = await api.chunk(body)
        assert again.json()["created"] is True
        assert path.held
        await path.deliver()
        assert (await api.client.get(ADDRESS)).headers["etag"] == again.headers["etag"]
        assert (await api.chunk({**body, "position": 2})).status_code == 200


async def test_a_late_creation_leaves_a_deleted_stream_deleted(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    async with behind_a_path(pipeline_server, models) as (api, path):
        body = {"position": 0, "inputs": rows(2).tolist()}
        path.holds = 1
        assert (await api.chunk(body)).status_code == 200
        assert (await api.client.delete(ADDRESS)).status_code == 204
        assert path.held
        await path.deliver()
        problem(await api.client.get(ADDRESS), 404, "stream_not_found")
        problem(await api.chunk({**body, "position": 2}), 409, "position_ahead")
