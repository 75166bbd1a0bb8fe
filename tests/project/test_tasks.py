"""The Makefile and its scripts: every task has help, and failures are one clear line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def setup(venv: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "scripts/setup", "run"],
        cwd=REPOSITORY,
        env={**os.environ, "VENV": str(venv), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_make_alone_lists_every_task_with_its_help() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    shown = subprocess.run(
        ["make", "--no-print-directory"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    listed = dict(re.findall(r"^ {2}make (\S+)\s+(\S.*)$", shown, re.MULTILINE))
    assert set(listed) == set(phony[1].split())
    assert set(listed) == set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/lock", ".ci/run", ".ci/serve"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(REPOSITORY / script, os.X_OK)


def test_ci_installs_every_program_that_tests_need() -> None:
    asked = re.compile(r'(?:shutil\.which|needs_tools)\(((?:"[\w-]+"(?:, )?)+)\)')
    folders = ("compose", "docs", "project", "service", "support", "system")
    sources = [path for folder in folders for path in (REPOSITORY / "tests" / folder).rglob("*.py")]
    found = {
        name
        for path in sources
        for names in asked.findall(path.read_text())
        for name in re.findall(r"[\w-]+", names)
    }
    assert {"cc", "curl", "openssl", "redis-cli", "redis-server"} <= found
    (listed,) = re.findall(
        r"^ *for needed in (.*); do$", (REPOSITORY / ".ci/run").read_text(), re.M
    )
    assert found <= set(listed.replace('"', "").split())


def test_a_python_that_does_not_start_is_one_clear_line(tmp_path: Path) -> None:
    shim = executable(tmp_path / "python", "echo 'shim: no such version' >&2; exit 127")
    done = setup(tmp_path / "venv", PYTHON=shim)
    assert done.returncode == 1
    assert done.stderr == f"setup: PYTHON={shim} is not a Python 3.11, 3.12 or 3.13 that starts\n"
    assert not (tmp_path / "venv").exists()


def test_no_python_at_all_is_one_clear_line(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cat", "cksum", "dirname", "tr"):
        executable(tools / tool, f'PATH={os.environ["PATH"]} exec {tool} "$@"')
    done = setup(tmp_path / "venv", PATH=str(tools), PYTHON="")
    assert done.returncode == 1
    assert done.stderr.startswith("setup: no Python 3.11, 3.12 or 3.13 found; ")
    assert done.stderr.count("\n") == 1


def test_a_python_without_venv_is_named_with_what_to_install(tmp_path: Path) -> None:
    bare = executable(
        tmp_path / "python",
        f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"',
    )
    done = setup(tmp_path / "venv", PYTHON=bare)
    version = "{}.{}".format(*sys.version_info[:2])
    assert done.returncode == 1
    assert done.stderr == (
        f"setup: {bare} has no venv module; install it (Debian: apt install python{version}-venv)\n"
    )


@pytest.mark.harness
def test_tests_run_with_a_pythonpath_that_was_set_before(tmp_path: Path) -> None:
    """Their forks of `carry` take only another one for that of a test."""
    program = "from tests.support.command import carry; print(carry('--help').exit_code)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "0\n", done.stderr


@dataclass
class Ci:
    """A checkout in which `.ci/run` finds some programs, all of which succeed and do nothing.

    Attributes:
        calls: file of the arguments of `make` and `sudo`.
    """

    checkout: Path
    calls: Path

    def add(self, *programs: str) -> None:
        """Put programs on its PATH."""
        for program in programs:
            executable(self.checkout / program, f'echo "${{0##*/}} $*" >>{self.calls}')

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run it outside root."""
        return subprocess.run(
            ["/bin/bash", ".ci/run"],
            cwd=self.checkout,
            env={"PATH": str(self.checkout / "bin"), **variables},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def ci(tmp_path: Path) -> Ci:
    """Without chromium, Docker and root; with Python 3.13 and 3.11, and 3.12 only by name."""
    made = Ci(tmp_path, tmp_path / "calls")
    for folder in (".ci", "scripts", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(REPOSITORY / ".ci/run", tmp_path / ".ci/run")
    needed = re.findall(r"^ *for needed in (.*); do$", (REPOSITORY / ".ci/run").read_text(), re.M)
    programs = {each.split()[0] for each in shlex.split(needed[0])} - {"chromium"}
    made.add(".ci/serve", "scripts/setup", *(f"bin/{each}" for each in programs))
    made.add("bin/python3.13", "bin/python3.11")
    executable(tmp_path / "bin/python3.12", "exit 127")
    executable(tmp_path / "bin/id", "echo 1000")
    executable(tmp_path / "bin/dirname", 'echo "${1%/*}"')
    return made


def test_ci_outside_root_skips_the_tests_of_missing_programs(ci: Ci) -> None:
    done = ci.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests that need these are skipped: chromium\n" in done.stdout
    assert "Python 3.12: SKIPPED, it is not installed" in done.stdout
    calls = ci.calls.read_text().splitlines()
    assert "make test" in calls
    oldest = f"make test PYTHON={ci.checkout}/bin/python3.11 VENV=build/venv-3.11 ARGS="
    [arguments] = [call.removeprefix(oldest) for call in calls if call.startswith(oldest)]
    assert "--ignore=tests/system" in arguments


def test_ci_outside_root_installs_programs_by_sudo_or_fails(ci: Ci) -> None:
    done = ci.run(CI="true")
    assert done.returncode == 1
    assert "install these first: chromium\n" in done.stdout
    ci.add("bin/sudo", "bin/apt-get")
    with (ci.checkout / "bin/sudo").open("a") as sudo:
        sudo.write('[ "$2" != tee ] || while read -r _; do :; done\n')
    done = ci.run(CI="true")
    assert "installed chromium\n" in done.stdout
    assert "apt-get install -y -qq chromium" in ci.calls.read_text()
    # and the deployment has to be tested, too
    assert done.returncode == 1
    assert "no Docker engine answers" in done.stdout
