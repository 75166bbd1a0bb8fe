"""Models that are made once, and an application per test."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping

import pytest

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from service.store.base import CommitColumns, CommitResult
from service.store.redis.redis_store import RedisStore
from tests.service.transports.v1.harness import FAST_PATH, Harness, harness
from tests.support.models import random_weights, small_spec
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer

BOTH_PATHS = (".test_chunks", ".test_problems", ".test_resets")
"""Modules whose tests run with and without the fast path; the others as `FAST_PATH` says."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """`small` takes events, `probe` rows only."""
    folder = tmp_path_factory.mktemp("models")
    spec = small_spec()
    small = write_artifact(
        folder / "small", spec, random_weights(spec), metrics={"held_out": {"auc": 0.75}}
    )
    return {"small": small, "probe": make_artifact(folder)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of some modules with and without the fast path."""
    if "fast_path" in metafunc.fixturenames and metafunc.module.__name__.endswith(BOTH_PATHS):
        metafunc.parametrize("fast_path", [True, False], ids=["fast path", "slow path"])


@pytest.fixture
def fast_path() -> bool:
    """Whether the application serves chunk requests on the fast path."""
    return FAST_PATH


@pytest.fixture
async def api(
    pipeline_server: RealServer, models: Mapping[str, Artifact], *, fast_path: bool
) -> AsyncIterator[Harness]:
    """A running application with nothing stored."""
    async with harness(pipeline_server, models, fast_path=fast_path) as running:
        yield running


@pytest.fixture
def held_back(api: Harness, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Keeps the store from answering commits until it is called."""
    gate = asyncio.Event()
    commit = RedisStore.commit

    async def held(
        store: RedisStore, commits: CommitColumns, deadline_s: float = math.inf
    ) -> list[CommitResult]:
        await gate.wait()
        return await commit(store, commits, deadline_s)

    monkeypatch.setattr(RedisStore, "commit", held)
    return gate.set
