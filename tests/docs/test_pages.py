"""Code blocks and named files of every page, and the links of those beside the site.

`make check` checks the links of the others, by `zensical build --strict`.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.pages import PAGES, ROOT, blocks, without_code

_LINK = re.compile(r"\[(?:[^\]]|\](?=\]))*\]\(([^)\s]+)\)")
_CODE_SPAN = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"(?:client|service|models|tests|docs|scripts|examples|\.ci)/[\w./-]*[\w/]")


each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


@each_page
def test_links_of_pages_beside_the_site_lead_to_a_file(page: Path) -> None:
    if page.is_relative_to(ROOT / "docs"):
        return
    for target in _LINK.findall(without_code(page.read_text(encoding="utf-8"), spans=True)):
        assert "://" in target or (page.parent / target.partition("#")[0]).exists(), target


@each_page
def test_code_blocks_parse(page: Path) -> None:
    for language, text in blocks(page.relative_to(ROOT).as_posix()):
        if language == "json":
            json.loads(text)
        elif language == "yaml":
            assert yaml.safe_load(text) is not None
        elif language == "python":
            compile(text, page.name, "exec")
        elif language == "sh":
            subprocess.run(["sh", "-n", "-c", text], check=True)


@each_page
def test_named_files_exist(page: Path) -> None:
    """The changelog is exempt: it names files of earlier versions."""
    if page.name == "CHANGELOG.md":
        return
    for span in _CODE_SPAN.findall(without_code(page.read_text(encoding="utf-8"))):
        if _FILE.fullmatch(span):
            assert (ROOT / span).exists(), span


def test_navigation_has_every_page_once() -> None:
    navigation = (ROOT / "zensical.toml").read_text(encoding="utf-8").partition("\nnav")[2]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")]
    assert sorted(re.findall(r'"([^"]+\.md)"', navigation)) == sorted(pages)
