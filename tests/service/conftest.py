"""A Valkey and a model for tests of the layers above the store, and a manual clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from models.artifact.artifact import Artifact
from service.engine import batcher
from service.pipeline import chunk_batch, chunk_load
from service.transports.v1 import call, fast_path
from tests.support.clock import ManualClock
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer, real_server


@pytest.fixture(scope="session")
def pipeline_server() -> Iterator[RealServer]:
    """One server for all of them."""
    with real_server("valkey") as running:
        yield running


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The probe model."""
    return make_artifact(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def store_url(pipeline_server: RealServer) -> str:
    """Its address, with nothing stored."""
    with pipeline_server.client() as client:
        client.flushall()
    return pipeline_server.url


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """A manual clock for deadlines."""
    clock = ManualClock()
    for module in (
        batcher,
        chunk_batch,
        chunk_load,
        fast_path,
        call,
    ):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def damage(pipeline_server: RealServer) -> Callable[[str], None]:
    """Flips a bit in the stored state of a stream of the probe model."""

    def flip(stream: str) -> None:
        with pipeline_server.client() as client:
            (key,) = client.keys(f"carry{{*}}:s:probe:{stream}")
            value = bytearray(client.get(key))
            value[-3] ^= 4
            client.set(key, bytes(value))

    return flip
