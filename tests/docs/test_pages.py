"""Links, code blocks, tables and named files of every page of the documentation."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.pages import PAGES, ROOT, blocks, without_code

_LINK = re.compile(r"\[(?:[^\]]|\](?=\]))*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
_ANCHOR = re.compile(r'<a id="([^"]+)">')
_CODE_SPAN = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"(?:client|service|models|tests|docs|scripts|examples|\.ci)/[\w./-]*[\w/]")

_SEPARATOR = re.compile(r"\|(\s*:?-+:?\s*\|)+")
_CELL_BORDER = re.compile(r"(?<!\\)\|")

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The fragments that a page's headings and explicit anchors define, as GitHub builds them."""
    text = page.read_text(encoding="utf-8")
    found = set(_ANCHOR.findall(text))
    for heading in _HEADING.findall(without_code(text)):
        plain = _LINK.sub(lambda link: link[0].partition("]")[0][1:], heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(slug)
    return frozenset(found)


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links, those in code left out."""
    yield from _LINK.findall(without_code(page.read_text(encoding="utf-8"), spans=True))


@each_page
def test_links_lead_to_a_file_and_an_anchor(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if fragment:
            assert fragment in anchors(linked), target


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


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    else:
        for part in value:
            yield from _leaves(part)


def test_navigation_has_every_page_once() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")]
    assert sorted(_leaves(project["nav"])) == sorted(pages)


@pytest.mark.parametrize("index", ["docs/index.md", "docs/decisions/index.md"])
def test_index_lists_every_page_below_it(index: str) -> None:
    folder = (ROOT / index).parent
    listed = {(folder / target.partition("#")[0]).resolve() for target in links(ROOT / index)}
    pages = set(folder.glob("**/*.md")) - {ROOT / index}
    if folder.name == "docs":
        pages -= set(folder.glob("decisions/*.md")) - {folder / "decisions" / "index.md"}
    assert not pages - listed


def tables(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and rows of each table outside of code blocks.

    A table ends at an empty line: Markdown treats any other line below it as a row.
    """
    rows: list[str] = []
    in_code = False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.startswith("```"):
            in_code = not in_code
        if (rows or line.startswith("|")) and line.strip() and not in_code:
            rows.append(line)
        elif rows:
            yield number - len(rows), rows
            rows = []


@each_page
def test_every_row_belongs_to_a_table_with_a_header(page: Path) -> None:
    for number, rows in tables(page.read_text(encoding="utf-8")):
        where = f"{page.relative_to(ROOT)}:{number}"
        assert len(rows) > 2, f"{where}: rows without a header"
        assert _SEPARATOR.fullmatch(rows[1].strip()), f"{where}: no separator below the header"
        columns = {len(_CELL_BORDER.findall(row.strip())) for row in rows}
        assert len(columns) == 1, f"{where}: rows of different numbers of cells"
