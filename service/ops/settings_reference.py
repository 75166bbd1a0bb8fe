"""Generates the table of settings in `docs/reference/settings.md`.

python -m service.ops.settings_reference        prints it
"""

from __future__ import annotations

from pathlib import Path

from service.settings import PREFIX, Settings


def settings_table() -> str:
    """Make a Markdown table of all settings: variable, default, and meaning."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{PREFIX}{name.upper()}` | {_default(field.default)} | {meaning} |")
    return "\n".join(rows)


def _default(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, Path) and value.is_absolute():
        return "the pretrained models"
    return f"`{value}`"


if __name__ == "__main__":
    print(settings_table())
