"""`.env.example` and docker-compose.yml agree."""

from __future__ import annotations

import re

from tests.support.pages import ROOT


def test_env_example_lists_the_variables_of_compose_with_their_defaults() -> None:
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", compose))
    assert len(used) == len(set(re.findall(r"\$\{?([A-Z_]+)", compose)))
    unset = re.findall(r"^      (CARRY_[A-Z_]+):$", compose, re.MULTILINE)
    assert re.findall(r"^# (CARRY_[A-Z_]+)=", example, re.MULTILINE) == unset
    assert dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE)) == used
