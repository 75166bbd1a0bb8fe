"""The page about a new version every night, as written: MLflow on SQLite, and a running service."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.needs import needs_tools
from tests.support.pages import DEFAULT_URL, blocks
from tests.support.service import Service, running

PAGE = "docs/how-to/new-version-every-night.md"
FILES = {"yaml": "pumps.yaml", "python": "events.py"}
HOUR_MS = 3_600_000


@pytest.fixture
def scripts() -> list[str]:
    return [text for language, text in blocks(PAGE) if language == "sh"]


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., str]:
    """Runs a script in a folder with the page's files, and returns what it prints."""
    for language, text in blocks(PAGE):
        if language in FILES:
            (tmp_path / FILES[language]).write_text(text)
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(script: str, url: str = DEFAULT_URL) -> str:
        done = subprocess.run(
            ["sh", "-eu", "-c", script.replace(DEFAULT_URL, url)],
            cwd=tmp_path,
            env={**os.environ, "PATH": programs},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def send(service: Service, position: int) -> Any:
    event = {"at": 1_735_689_600_000 + position * HOUR_MS, "pressure": 4.5}
    body = {"position": position, "events": [event]}
    url = f"{service.url}/v1/models/pumps/streams/pump-1/chunks"
    reply = httpx.post(url, json=body, timeout=60)
    assert reply.is_success, reply.text
    return reply.json()


@needs_tools("sh")
@pytest.mark.timeout(900)  # it trains two networks
def test_commands_of_the_nightly_page_run_as_written(
    tmp_path: Path, scripts: list[str], shell: Callable[..., str]
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("tensorflow")
    first, serve, nightly, rollback = scripts
    shell(first)
    assignment, _, _ = serve.partition(" ")
    name, _, value = assignment.partition("=")
    patient = {"CARRY_STORE_WAIT_S": "60"}
    with running(tmp_path, tmp_path / "models", **{name: value}, **patient) as service:
        old = send(service, 0)
        listed = shell(nightly, service.url).splitlines()
        assert [line.split()[3] for line in listed[-2:]] == ["challenger", "champion"]
        new = send(service, 1)
        assert new["position"] == 2
        assert new["epoch"] == old["epoch"]
        assert new["version"] != old["version"]
        # the kept events reach back to the start
        assert "warm" not in new
        shell(rollback, service.url)
        again = send(service, 2)
        assert (again["version"], again["position"]) == (old["version"], 3)
        assert "warm" not in again
