"""The README's examples, as they are written, against a running service."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.service import Service

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEFAULT_URL = "http://127.0.0.1:8000"


def run(script: str, url: str) -> Any:
    """Run a block in a shell at the root of the project; what it printed, as JSON."""
    done = subprocess.run(
        ["sh", "-euc", script.replace(DEFAULT_URL, url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.usefixtures("model_dir")
def test_every_block_gives_what_the_readme_shows(service: Service) -> None:
    with httpx.Client(base_url=service.url) as client:
        client.delete("/v1/models/flights/streams", params={"prefix": ""}).raise_for_status()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    replies: list[Any] = []
    shown = 0
    for language, text in BLOCK.findall(readme):
        if language == "sh":
            replies.append(run(text, service.url))
        elif language == "json":
            _agrees(replies[-1], json.loads(text), "reply")
            shown += 1
    assert [reply.get("position") for reply in replies[:4]] == [4, 6, 6, 6]
    assert [reply.get("replayed") for reply in replies[:3]] == [False, False, True]
    assert replies[2]["outputs"] == replies[1]["outputs"]
    assert [item["status"] for item in replies[4]["results"]] == [200, 200]
    assert replies[5]["position"] == 8
    assert shown == 2


def _agrees(got: Any, shown: Any, where: str) -> None:
    """The reply has what is shown; numbers are shown shortened."""
    if isinstance(shown, dict):
        for name, value in shown.items():
            assert name in got, f"{where}.{name}"
            _agrees(got[name], value, f"{where}.{name}")
    elif isinstance(shown, list):
        assert len(got) == len(shown), where
        for index, value in enumerate(shown):
            _agrees(got[index], value, f"{where}[{index}]")
    elif isinstance(shown, float):
        assert got == pytest.approx(shown, abs=0.006), where
    else:
        assert got == shown, where
