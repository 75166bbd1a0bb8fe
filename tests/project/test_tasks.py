"""The Makefile and its scripts: every task has help, and failures are one clear line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def test_a_python_that_does_not_start_is_one_clear_line(tmp_path: Path) -> None:
    shim = executable(tmp_path / "python", "echo 'shim: no such version' >&2; exit 127")
    done = setup(tmp_path / "venv", PYTHON=shim)
    assert done.returncode == 1
    assert done.stderr == f"setup: PYTHON={shim} is not a Python 3.11 to 3.14 that starts\n"
    assert not (tmp_path / "venv").exists()


def test_no_python_at_all_is_one_clear_line(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cat", "cksum", "dirname", "tr"):
        executable(tools / tool, f'PATH={os.environ["PATH"]} exec {tool} "$@"')
    done = setup(tmp_path / "venv", PATH=str(tools), PYTHON="")
    assert done.returncode == 1
    assert done.stderr.startswith("setup: no Python 3.11 to 3.14 found; ")
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
