"""Carry works in a project that has modules of the names of Carry's own packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import carry
from tests.support.pages import ROOT, blocks
from tests.support.service import running

FOREIGN = "raise RuntimeError('a module of the project')"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; modules of the names of Carry's packages are there and on PYTHONPATH.

    The working directory also has the name of a module of the standard library.
    """
    for folder in (tmp_path, tmp_path / "library"):
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "__init__.py").write_text(FOREIGN)
        (folder / "service.py").write_text(FOREIGN)
    (tmp_path / "signal.py").write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    return tmp_path


def test_workers_of_the_command_serve(project: Path, model_dir: Path) -> None:
    with (
        running(project, model_dir, "--workers", "2") as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        assert service.log().count('"message":"worker_started"') == 2
        chunk = {"position": 0, "inputs": [[0.1]]}
        reply = client.post("/v1/models/post-lstm/streams/s/chunks", json=chunk)
        assert reply.json()["position"] == 1


def test_the_example_of_the_python_api_leaves_a_program_its_own_modules(project: Path) -> None:
    """Imported before it and after it; what it returns can be sent to another process."""
    (project / "signal.py").unlink()  # a program's own folder comes before the standard library
    for name in ("models/__init__.py", "service.py"):
        (project / name).write_text("is_own = True\n")
    (example,) = (text for language, text in blocks("docs/reference/python-api.md"))
    script = project / "example.py"
    script.write_text(f"import models\nfirst = models\n{example}{AFTER_THE_EXAMPLE}")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pumps ")


AFTER_THE_EXAMPLE = """
assert scores["heads"]["next"], scores
import pickle, subprocess, sys
assert sys.modules.pop("models") is first and first.is_own
import models, service
assert models.is_own and service.is_own
command = [sys.executable, "-c", "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"]
assert subprocess.check_output(command, input=pickle.dumps(spec)).split() == [b"pumps"]
"""


def python(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_carry_loads_no_libraries(project: Path) -> None:
    (project / "signal.py").unlink()
    done = python(
        "import sys; before = set(sys.modules); import carry; "
        "print({name.partition('.')[0] for name in sys.modules} - before); carry.ModelsError"
    )
    assert not {"models", "service", "numpy", "tensorflow"} & set(eval(done.stdout))


def test_every_public_name_exists_and_is_documented() -> None:
    page = (ROOT / "docs/reference/python-api.md").read_text()
    for name in carry.__all__:
        assert getattr(carry, name) is not None
        assert f"`{name}" in page
    assert carry.client.Carry is carry.Client
