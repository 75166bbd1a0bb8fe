"""Models that are made once, and an application per test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import pytest

from models.artifact.artifact import Artifact, write_artifact
from service.store.base import Commit, CommitResult
from service.store.redis.redis_store import RedisStore
from tests.service.transports.http.harness import Harness, harness
from tests.support.models import random_weights, small_spec
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """`small` takes events, `probe` rows only."""
    folder = tmp_path_factory.mktemp("models")
    spec = small_spec()
    small = write_artifact(
        folder / "small", spec, random_weights(spec), metrics={"held_out": {"auc": 0.75}}
    )
    return {"small": small, "probe": make_artifact(folder)}


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> AsyncIterator[Harness]:
    """A running application with nothing stored."""
    async with harness(pipeline_server, models) as running:
        yield running


@pytest.fixture
def held_back(api: Harness, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Keeps the store from answering commits until it is called."""
    gate = asyncio.Event()
    commit = RedisStore.commit

    async def held(
        store: RedisStore, commits: Sequence[Commit], deadline_s: float | None = None
    ) -> list[CommitResult]:
        await gate.wait()
        return await commit(store, commits, deadline_s)

    monkeypatch.setattr(RedisStore, "commit", held)
    return gate.set
