"""The tables of settings are those of the code."""

from __future__ import annotations

import re

from service.core.settings import PREFIX
from service.settings import CLIENT_VARIABLES, GROUP_OF
from tests.docs.settings_reference import describe_settings, settings_tables
from tests.support.pages import PAGES, ROOT

PAGE = ROOT / "docs" / "reference" / "settings.md"
OTHERS = {"CARRY_SERVICE_HOST", "CARRY_URL", *CLIENT_VARIABLES}
"""Variables that the pages name although they are no settings."""


def test_settings_tables_match_the_code() -> None:
    assert settings_tables() in PAGE.read_text(encoding="utf-8"), (
        "update the page: python -m tests.docs.settings_reference"
    )


def test_every_setting_has_help() -> None:
    described = describe_settings()
    assert described.keys() == GROUP_OF.keys()
    for name, (_, text) in described.items():
        assert text.rstrip().endswith("."), name


def test_pages_and_deployments_name_existing_settings() -> None:
    settings = {f"{PREFIX}{name.upper()}" for name in GROUP_OF}
    deployments = [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    for page in [*PAGES, *deployments]:
        named = set(re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))
        assert named <= settings | OTHERS, page
