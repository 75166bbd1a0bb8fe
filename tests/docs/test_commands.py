"""Commands that the pages name: make targets, programs and their options exist."""

from __future__ import annotations

import re
from functools import cache

import pytest
from typer.main import get_command

from carry.cli import app
from tests.support.pages import PAGES, ROOT

_TARGET = re.compile(r"^([a-z-]+):(?! export).*?\n((?:\t.*\n)*)", re.MULTILINE)
_MAKE = re.compile(r"\bmake ([a-z]+(?:-[a-z]+)*)(?: ARGS=(?:\"([^\"\n]*)\"|(\S+)))?")
_RECIPE = re.compile(r"python -m (\S+) \$\(ARGS\)")
_CARRY = re.compile(r"\bcarry ([a-z]+)((?: +(?:\\\n *)?[^\s|`#]+)*)")
LOCUST = {"--help", "--html", "--csv", "--json-file", "--users"}
_OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]*")


@cache
def make_targets() -> dict[str, str]:
    """Recipe of each target of the Makefile."""
    return dict(_TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))


@cache
def options_of(module: str) -> set[str]:
    """The options that a module's files spell out, and those of Locust that the pages name."""
    folder = ROOT / module.replace(".", "/")
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    assert sources, module
    return LOCUST | set(re.findall(r'"(--[a-z-]+)"', "\n".join(sources)))


@cache
def carry_options(*names: str) -> set[str]:
    """The options of a command of `carry`."""
    command = get_command(app)
    for name in names:
        command = command.commands[name]
    options = {"--help"}
    for parameter in command.params:
        options |= {*parameter.opts, *parameter.secondary_opts}
    return options


def code_of(text: str) -> str:
    """The code of a page: its blocks and its inline code, one a line."""
    fenced = re.findall(r"^```\w*[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", text)
    return "\n".join([*fenced, *indented, *spans])


def pages_code() -> list[tuple[str, str]]:
    """Name and code of each page, without the changelog, which names earlier commands."""
    return [
        (page.relative_to(ROOT).as_posix(), code_of(page.read_text(encoding="utf-8")))
        for page in PAGES
        if page.name != "CHANGELOG.md"
    ]


def test_make_targets_and_their_options_exist() -> None:
    named = set()
    for page, code in pages_code():
        for target, quoted, bare in _MAKE.findall(code):
            assert target in make_targets(), f"{page}: make {target}"
            module = _RECIPE.search(make_targets()[target])
            for option in _OPTION.findall(quoted or bare):
                if module is not None and "$(" not in module[1]:
                    assert option in options_of(module[1]), f"{page}: make {target} {option}"
                    named.add(target)
    assert named >= {"bench", "faults", "load", "model"}


GROUPS = ("dlq", "keys", "streams")
"""Commands of commands."""


@pytest.mark.parametrize(
    "command",
    [*GROUPS, "consume", "evaluate", "import", "produce", "replay", "serve", "train"],
)
def test_carry_commands_and_their_options_exist(command: str) -> None:
    named = 0
    for page, code in pages_code():
        for name, rest in _CARRY.findall(code):
            if name != command:
                continue
            words = rest.split()
            inner = words[:1] if command in GROUPS and words and words[0].islower() else []
            for option in _OPTION.findall(rest):
                assert option in carry_options(command, *inner), f"{page}: carry {command} {option}"
            named += 1
    assert named
