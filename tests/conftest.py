"""The event loop of async tests, their order, and a running service that tests share."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import structlog
from hypothesis import HealthCheck, settings
from structlog.dev import ConsoleRenderer, plain_traceback

from models.artifact.writing import write_artifact
from service.access import key_cache, limits
from service.store.redis import capabilities, monitor
from service.telemetry.access_log import access_log
from tests.support.browser import running_browser
from tests.support.event_loop import EventLoop
from tests.support.models import PRETRAINED
from tests.support.post_tables import post_model
from tests.support.service import Service, running

LONG = ("engine", "faults", "importing", "networks", "system", "training")
"""Folders whose tests take seconds: they start services, or build and train networks."""

# As `carry/cli.py` does, for processes of other commands.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
# A service keeps to ignoring SIGHUP if it was started like that, as by nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Several workers share the cores: OpenMP's threads (scikit-learn) would spin while they wait, and
# TensorFlow would split small operations among threads. Subprocesses inherit both.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
# Until a command configures the logs, structlog would show exceptions with all variables, by rich,
# for a second of processor time each.
_PROCESSORS = structlog.get_config()["processors"]
_RENDERER = ConsoleRenderer(colors=False, exception_formatter=plain_traceback)
structlog.configure([*_PROCESSORS[:-1], _RENDERER])
# redis-py parses the metadata of its package for every connection, for 2 ms.
metadata.version = cache(metadata.version)
# What is imported and collected is never garbage.
gc.disable()
# httpcore tries to import it at each request: a search of all folders if it is not installed.
if find_spec("sniffio") is None:
    sys.modules["sniffio"] = None  # type: ignore[assignment]
# On a busy machine any example may take long.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
# Tests start more than a hundred services.
Service.forks = True


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Async tests run on uvloop, as the service does."""
    return {"uvloop": EventLoop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that several workers end at about the same time."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


def pytest_collection_finish() -> None:
    """The modules and tests are never garbage: do not traverse them, and collect rarely."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 20, 1_000)


@pytest.fixture(autouse=True)
def access_log_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a test runs in this process configures the access log for that test alone."""
    for name in ("level", "render", "write"):
        monkeypatch.setattr(access_log, name, getattr(access_log, name))


@pytest.fixture(autouse=True)
def store_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of access keys, renewals of rates and checks wait for a store that a busy machine
    suspends; reports of processes outlast their suspension."""
    monkeypatch.setattr(key_cache, "READ_S", 60.0)
    monkeypatch.setattr(limits, "RENEW_TIMEOUT_S", 60.0)
    monkeypatch.setattr(monitor, "PROBE_TIMEOUT_S", 60.0)
    monkeypatch.setattr(capabilities, "REPORT_LIFETIME_MS", 600_000)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained flights model and the post's layers."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "flights").symlink_to(PRETRAINED / "flights")
    for kind in ("lstm", "gru"):
        write_artifact(folder / kind, *post_model(kind))
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Service]:
    """A service that stays up; each test uses streams of its own."""
    with running(tmp_path_factory.mktemp("service"), model_dir, "--grpc-port", "0") as up:
        yield up


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A browser; each test opens pages of its own."""
    with running_browser(tmp_path_factory.mktemp("browser")) as up:
        yield up


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    """A client of that service."""
    with httpx.Client(base_url=service.url, timeout=60, verify=False) as up:
        yield up
