"""Base images are the same in every file that names them; no image contains what builds it."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement

from tests.support.pages import ROOT

FILES = (
    "Dockerfile",
    "deploy/haproxy/Dockerfile",
    "tests/load/Dockerfile",
    "docker-compose.yml",
    ".env.example",
)


def test_every_file_names_the_same_base_images() -> None:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in FILES)
    assert not re.search(r"(?m)^FROM (?!\$\{PYTHON_IMAGE\})[a-z]+[:/]", text)
    images = set(re.findall(r"(?:PYTHON|REDIS)_IMAGE(?:=|:-)([^\s}\"]+)", text))
    assert {image.partition("@")[0] for image in images} == {"python:3.13-slim", "redis:8"}
    assert len(images) == 2


def test_no_image_is_built_for_one_architecture() -> None:
    for name in FILES:
        commands = re.sub(r"(?m)^\s*#.*$", "", (ROOT / name).read_text(encoding="utf-8"))
        assert not re.search("x86|amd64|aarch|arm64|--platform", commands), name


def test_build_tools_are_in_no_image_and_no_bill_of_materials() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = {Requirement(text).name for text in project["dependency-groups"]["build"]}
    for name, count in (("Dockerfile", 2), (".github/workflows/release.yml", 1)):
        text = (ROOT / name).read_text(encoding="utf-8")
        uninstalled = re.findall(r"pip uninstall (.*)", text)
        assert len(uninstalled) == count, name
        assert all(tools <= set(each.split()) for each in uninstalled), name
