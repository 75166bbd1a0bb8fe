"""Markdown renders every table of the documentation as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT

_SEPARATOR = re.compile(r"\|(\s*:?-+:?\s*\|)+")
_CELL_BORDER = re.compile(r"(?<!\\)\|")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_row_belongs_to_a_table_with_a_header(page: Path) -> None:
    for number, rows in tables(page.read_text(encoding="utf-8")):
        where = f"{page.relative_to(ROOT)}:{number}"
        assert len(rows) > 2, f"{where}: rows without a header"
        assert _SEPARATOR.fullmatch(rows[1].strip()), f"{where}: no separator below the header"
        columns = {len(_CELL_BORDER.findall(row.strip())) for row in rows}
        assert len(columns) == 1, f"{where}: rows of different numbers of cells"
