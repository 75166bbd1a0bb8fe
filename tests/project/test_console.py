"""The console's bundle is what its sources give."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from service.console.page import ASSETS
from tests.support.needs import needs_tools

WEB = ASSETS.parent / "web"
NO_REGISTRY = re.compile(r"\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|ENETUNREACH)\b")


def test_bundle_is_built_from_the_current_sources() -> None:
    sources = [*sorted((WEB / "src").iterdir())]
    digest = hashlib.sha256()
    for path in (WEB / "build.mjs", WEB / "package-lock.json", *sources):
        digest.update(path.read_bytes())
    assert digest.hexdigest() in (ASSETS / "index.html").read_text(), "run `make console`"


@needs_tools("npm")
def test_build_is_reproducible(tmp_path: Path) -> None:
    copy = shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(
        ["npm", "ci", "--omit=dev", "--no-audit", "--no-fund"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    if NO_REGISTRY.search(installed.stderr):
        pytest.skip(f"no npm registry answers: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    subprocess.run(["npm", "run", "--silent", "build"], cwd=copy, check=True)
    built = {path.name: path.read_bytes() for path in (tmp_path / "assets").iterdir()}
    assert built == {path.name: path.read_bytes() for path in ASSETS.iterdir()}
