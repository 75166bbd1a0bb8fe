"""The walk through the post: its commands and specifications, against a running service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from examples.post.__main__ import HERE
from tests.support.needs import needs_tools
from tests.support.pages import ROOT, agrees, blocks, run
from tests.support.service import LEAN_KERAS, Service, customise, running

PAGE = "docs/tutorials/from-the-post.md"
PRINTED_WITHIN = 6e-8
"""Eight decimals, and what ONNX Runtime's sigmoid and tanh are off by."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of the models that the page's first command packages."""
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("post")
    models = folder / "models"
    customise(folder, LEAN_KERAS)
    made = subprocess.run(
        [sys.executable, "-m", "examples.post", str(models)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    with running(folder, models) as up:
        yield up


@needs_tools("curl")
def test_commands_give_the_replies_of_the_page(service: Service) -> None:
    got: list[Any] = []
    shown = 0
    for language, text in blocks(PAGE):
        if language == "sh":
            got.append(run(text, service.url))
        elif language == "json":
            agrees(got[-1], json.loads(text), f"reply {len(got)}", within=PRINTED_WITHIN)
            shown += 1
    assert shown == len(got) > 0


def test_specifications_equal_the_packaged_ones() -> None:
    packaged = {path.name: path.read_text() for path in HERE.glob("*.yaml")}
    found = [text for language, text in blocks(PAGE) if language == "yaml"]
    assert sorted(found) == sorted(packaged.values())
    for text in found:
        assert yaml.safe_load(text)["name"].startswith("post-")
