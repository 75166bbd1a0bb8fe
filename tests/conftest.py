"""One running service for the tests that leave it running, with the models they ask for; logging
as it was after those that set it up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog

import models
from models.artifact import write_artifact
from service.ops import logs
from tests.support.post_tables import post_model
from tests.support.service import Service, running


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained flights model and the post's layers."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "flights").symlink_to(Path(models.__file__).parent / "pretrained" / "flights")
    for kind in ("lstm", "gru"):
        write_artifact(folder / kind, *post_model(kind))
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


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Undo what a test's `configure_logs` does to every logger of the process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    requests_from = logs._requests.level
    logs.flush_logs()
    yield
    logs.flush_logs()
    logs._requests.configure(requests_from, "json")
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
