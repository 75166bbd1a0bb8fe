"""Generates the tables of settings in `docs/reference/settings.md`.

python -m tests.docs.settings_reference        prints them
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from service.core.settings import PREFIX
from service.settings import GROUP_OF, TYPES, Settings

BASIC: Final = (
    *("host", "port", "require_keys", "workers", "models_dir", "redis_url", "redis_password_file"),
    *("data_dir", "durability", "lame_duck_s", "log_level", "log_format"),
)
"""Settings that most deployments choose; the others are advanced."""


def settings_tables() -> str:
    """Make Markdown tables of the basic and the advanced settings: variable, default, meaning."""
    advanced = (name for name in GROUP_OF if name not in BASIC)
    return f"## Basic settings\n\n{_table(BASIC)}\n\n## Advanced settings\n\n{_table(advanced)}"


def describe_settings() -> dict[str, tuple[Any, str]]:
    """The default of each setting, and its text."""
    settings = Settings()
    return {
        name: (settings.value(name), properties[name]["description"])
        for kind in TYPES.values()
        for properties in [TypeAdapter(kind).json_schema()["properties"]]
        for name in properties
    }


def _table(names: Iterable[str]) -> str:
    described = describe_settings()
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name in names:
        default, text = described[name]
        meaning = " ".join(text.split())
        rows.append(f"| `{PREFIX}{name.upper()}` | {_default(default)} | {meaning} |")
    return "\n".join(rows)


def _default(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, Path) and value.is_absolute():
        return "the pretrained models"
    return f"`{value}`"


if __name__ == "__main__":
    print(settings_tables())
