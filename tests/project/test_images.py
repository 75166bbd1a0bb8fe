"""Base images: the same everywhere, and pinned by `scripts/pin-images`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.pages import ROOT

FILES = (
    "Dockerfile",
    "deploy/haproxy/Dockerfile",
    "tests/load/Dockerfile",
    "docker-compose.yml",
    ".env.example",
)
DOCKER = """#!/bin/sh
[ "$1" = pull ] || exit 2
case $2 in
python:*) echo "3.13-slim: Pulling from library/python"; echo "Digest: sha256:{python}" ;;
redis:*) {redis} ;;
*) exit 3 ;;
esac
"""
"""A `docker` that pulls, as the real one prints it."""


def named_images(folder: Path) -> set[str]:
    """Every image that the files name."""
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)
    assert not re.search(r"(?m)^FROM (?!\$\{PYTHON_IMAGE\})[a-z]+[:/]", text)
    return set(re.findall(r"(?:PYTHON|REDIS)_IMAGE(?:=|:-)([^\s}\"]+)", text))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files and the script."""
    for name in (*FILES, "scripts/pin-images"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def pin(checkout: Path, *, python: str, redis: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a `docker` of its own."""
    tools = checkout / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "docker").write_text(DOCKER.format(python=python, redis=redis))
    (tools / "docker").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [str(checkout / "scripts" / "pin-images")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_images_are_pinned_again_or_not_at_all(checkout: Path) -> None:
    tags = {image.partition("@")[0] for image in named_images(checkout)}
    assert tags == {"python:3.13-slim", "redis:8"}
    for python in ("a" * 64, "b" * 64):
        redis = f'echo "Digest: sha256:{"c" * 64}"'
        assert pin(checkout, python=python, redis=redis).returncode == 0
        pinned = {f"python:3.13-slim@sha256:{python}", f"redis:8@sha256:{'c' * 64}"}
        assert named_images(checkout) == pinned
    for redis in ("exit 1", "echo Status: Image is up to date"):
        done = pin(checkout, python="d" * 64, redis=redis)
        assert done.returncode == 1
        assert "redis:8" in done.stderr
    assert named_images(checkout) == pinned
    assert not list(checkout.rglob("*.pinned"))
