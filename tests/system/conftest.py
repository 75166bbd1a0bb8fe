"""The model and the store that tests start a service with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.artifact.artifact import Artifact
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer, real_server


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small model with contracting weights, in a directory of its own."""
    return make_artifact(tmp_path_factory.mktemp("models"))


@pytest.fixture
def store() -> Iterator[RealServer]:
    """A store of the test's own, which it may reconfigure, and which outlives the service."""
    with real_server("valkey") as server:
        yield server
