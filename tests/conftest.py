"""One running service for the tests that leave it running, with the models they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import models
from models.artifact import write_artifact
from models.spec import parse_spec
from tests.support.post_tables import TABLES, Table
from tests.support.service import Service, running


def _write(folder: Path, table: Table) -> None:
    """A one-unit layer with the post's weights, its sequence as the only output."""
    spec = parse_spec(
        {
            "name": f"post-{table.kind}",
            "features": 1,
            "layers": [{"kind": table.kind, "units": 1}],
            "heads": [{"kind": "sequence", "name": "sequence"}],
        }
    )
    layer = f"{table.kind}_1"
    weights = {
        f"{layer}.kernel": np.array([table.kernel], np.float32),
        f"{layer}.recurrent_kernel": np.array([table.recurrent_kernel], np.float32),
        f"{layer}.bias": np.array(table.bias, np.float32),
    }
    write_artifact(folder / spec.name, spec, weights)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained flights model and the post's layers."""
    folder = tmp_path_factory.mktemp("models")
    if (Path(models.__file__).parent / "pretrained" / "flights").exists():
        (folder / "flights").symlink_to(Path(models.__file__).parent / "pretrained" / "flights")
    for table in TABLES:
        _write(folder, table)
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Service]:
    """A service that stays up; each test uses streams of its own."""
    with running(tmp_path_factory.mktemp("service"), model_dir) as up:
        yield up


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    """A client of that service."""
    with httpx.Client(base_url=service.url, timeout=60) as up:
        yield up
