"""The lock files: complete, pinned, with hashes, and free of addresses."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = REPOSITORY / "requirements.lock"
LEAN = REPOSITORY / "requirements-lean.lock"
DEV = REPOSITORY / "requirements-dev.lock"
LOAD = REPOSITORY / "requirements-load.lock"
SBOM = REPOSITORY / "requirements-sbom.lock"
LOCKS = (RUN, LEAN, DEV, LOAD)
EXTRAS = {RUN: ("tensorflow", "replay"), LEAN: ()}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))


def entries(lock: Path) -> list[str]:
    """Each requirement with its hashes, on one line."""
    text = re.sub(r"(?m)^\s*#.*$", "", lock.read_text())
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def pins(lock: Path, python: str, platform: str, machine: str) -> dict[str, str]:
    """Name to version of what is installed on one Python and platform."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    found: dict[str, str] = {}
    for entry in entries(lock):
        requirement = Requirement(entry.partition("--hash")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = str(requirement.specifier).removeprefix("==")
    return found


def wanted(lock: Path) -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    groups = project["dependency-groups"]
    client = tomllib.loads((REPOSITORY / "client" / "pyproject.toml").read_text())["project"]
    texts = [*client["dependencies"], *groups["load" if lock == LOAD else "build"]]
    if lock != LOAD:
        texts += project["project"]["dependencies"]
        texts += [text for extra in EXTRAS.get(lock, extras) for text in extras[extra]]
    if lock == DEV:
        texts += [text for text in (*groups["dev"], *groups["load"]) if isinstance(text, str)]
    # of this repository: installed beside the service
    return [Requirement(text) for text in texts if not text.startswith("carry-client")]


@pytest.mark.parametrize("lock", [*LOCKS, SBOM], ids=lambda lock: lock.name)
def test_everything_is_pinned_with_hashes_and_without_addresses(lock: Path) -> None:
    assert entries(lock)
    for entry in entries(lock):
        assert re.match(
            r"[a-z0-9._-]+(\[[a-z,-]+\])?==[^\s;]+( ;[^-]*)?\s+--hash=sha256:[0-9a-f]{64}", entry
        )
    assert not re.search("://|--index|--find-links", lock.read_text())


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_a_lock_holds_what_the_project_asks_for(python: str, platform: str, machine: str) -> None:
    for lock in LOCKS:
        found = pins(lock, python, platform, machine)
        environment = {
            "python_version": python,
            "sys_platform": platform,
            "platform_machine": machine,
        }
        for requirement in wanted(lock):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                name = canonicalize_name(requirement.name)
                assert name in found, f"{name} is not in {lock.name}; run `make lock`"
                assert requirement.specifier.contains(found[name], prereleases=True)


@pytest.mark.parametrize("python", PYTHONS)
def test_serving_and_testing_use_the_same_versions(python: str) -> None:
    run, lean, dev, load = (pins(lock, python, "linux", "x86_64") for lock in LOCKS)
    assert lean.items() <= run.items() <= dev.items()
    assert load.items() <= dev.items()


def test_the_lean_lock_brings_one_runtime() -> None:
    found = pins(LEAN, "3.12", "linux", "x86_64").keys()
    assert "onnxruntime" in found
    assert not found & {"keras", "onnx", "tensorflow", "tensorflow-cpu"}
