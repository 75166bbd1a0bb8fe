"""The settings in the operator's page are those of the code."""

from __future__ import annotations

from pathlib import Path

from service.ops.settings_reference import settings_table

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_the_table_is_current() -> None:
    assert settings_table() in PAGE.read_text(encoding="utf-8"), (
        "print it anew: python -m service.ops.settings_reference"
    )
