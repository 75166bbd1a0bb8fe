"""The table of settings is the one of the code."""

from __future__ import annotations

from pathlib import Path

from service.ops.settings_reference import settings_table

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"


def test_settings_table_matches_the_code() -> None:
    assert settings_table() in PAGE.read_text(encoding="utf-8"), (
        "update the page: python -m service.ops.settings_reference"
    )
