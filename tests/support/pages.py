"""Extracts code blocks, commands and replies from pages of the documentation."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEFAULT_URL = "http://127.0.0.1:8000"
FOLDERS = ("", "client/", "docs/**/", "models/**/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))
_BLOCK = re.compile(r"^```(\w+)(?: [^\n]*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n+)+")
_SPAN = re.compile(r"`[^`\n]+`")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a page, in order; `page` as `docs/x.md`."""
    return _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def without_code(text: str, *, spans: bool = False) -> str:
    """The text of a page without its code blocks, and with `spans` without inline code."""
    text = _INDENTED.sub("", _FENCED.sub("", text))
    return _SPAN.sub("code", text) if spans else text


def run(script: str, url: str) -> Any:
    """Run a block in a shell at the root of the project and parse its output as JSON."""
    done = subprocess.run(
        ["sh", "-euc", script.replace(DEFAULT_URL, url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def agrees(got: Any, shown: Any, where: str = "reply", *, within: float = 0.006) -> None:
    """Assert that a reply has the members that a page shows; shown numbers are rounded."""
    if isinstance(shown, dict):
        for name, value in shown.items():
            assert name in got, f"{where}.{name}"
            agrees(got[name], value, f"{where}.{name}", within=within)
    elif isinstance(shown, list):
        assert len(got) == len(shown), where
        for index, value in enumerate(shown):
            agrees(got[index], value, f"{where}[{index}]", within=within)
    elif isinstance(shown, float):
        assert got == pytest.approx(shown, abs=within), where
    else:
        assert got == shown, where
