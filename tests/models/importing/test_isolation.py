"""Import runs in a separate process with limits, and every failure is a one-line error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import keras
import psutil
import pytest
from keras import layers as kl
from typer.testing import CliRunner

from carry import cli
from models.artifact.artifact import load_artifact
from models.errors import ImportedModelError
from models.importing import isolation
from models.importing.isolation import Limits
from models.importing.packaging import import_keras_model
from tests.models.importing import own_layers
from tests.models.importing.hostile import recurrent, save_edited, two_models
from tests.models.importing.own_layers import Leaky
from tests.models.importing.saving import save_model
from tests.support.service import LEAN_KERAS, customise


@pytest.fixture(autouse=True)
def lean_keras(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process starts in two thirds of the time; PYTHONPATH has another module `models`."""
    folder = tmp_path_factory.mktemp("sitecustomize")
    customise(folder, LEAN_KERAS)
    (folder / "models.py").write_text("raise RuntimeError('a module of the project')")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def import_failure(path: Path, limits: Limits | None = None) -> str:
    """The error of a failed import; checks that nothing was written."""
    out = path.parent / "out"
    with pytest.raises(ImportedModelError) as caught:
        import_keras_model(path, out, limits=limits)
    assert not out.exists()
    return str(caught.value)


def test_import_packages_the_model(tmp_path: Path) -> None:
    report = import_keras_model(save_model(recurrent(), tmp_path / "m.keras"), tmp_path / "out")
    assert (report.artifact.spec.name, report.verified["lengths_steps"]) == ("m", [1, 2, 7, 33])
    assert 0 < report.verified["largest_difference"] < 1e-5
    origin = load_artifact(tmp_path / "out").manifest["training"]["imported"]
    assert origin["file"] == "m.keras"
    assert origin["verified"]["largest_difference"] == report.verified["largest_difference"]


def test_own_code_runs_in_the_process_that_exports_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    save_model(keras.Sequential([kl.Input((None, 2)), kl.RNN(Leaky(3))]), path)
    code = tmp_path / "own.py"
    code.write_text(Path(own_layers.__file__).read_text() + "\nimport beside\nassert beside.X\n")
    (tmp_path / "beside.py").write_text("X = 1")
    report = import_keras_model(path, tmp_path / "out", code=code)
    assert report.artifact.spec.onnx is not None
    assert 0 < report.verified["largest_difference"] < 1e-5
    code.write_text("print(1 / 0)")
    with pytest.raises(ImportedModelError, match=r"own\.py: ZeroDivisionError: division by zero"):
        import_keras_model(path, tmp_path / "out2", code=code)


def test_errors_name_the_original_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's part runs in this process: starting Keras in another takes seconds."""

    def convert_here(path: Path, copy: Path, task: dict[str, Any], limits: Limits) -> None:
        with monkeypatch.context() as patch:
            patch.chdir(copy.parent)
            isolation.convert(task)

    monkeypatch.setattr(isolation, "_run", convert_here)
    path = two_models(tmp_path / "m.hdf5", kl.Lambda(abs, name="code", output_shape=(None, 3)))
    assert import_failure(path).startswith(f"{path}: the model has unsupported layers:")


def test_import_fails_at_the_memory_limit(tmp_path: Path) -> None:
    path = save_edited(tmp_path / "m.keras", lambda layer: layer["config"].update(units=40_000))
    error = import_failure(path, Limits(memory_bytes=4 * 2**30))
    assert re.search("more than 4096 MiB of memory|OOM|allocat", error), error


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(time_s=1), "took longer than 1 s"),
        (Limits(memory_bytes=2**26), "reading it needs more than 64 MiB of memory"),
        (Limits(open_files=3), "the process that read it"),
        (Limits(file_bytes=100), "expected a file of at most 100 bytes"),
    ],
    ids=["time", "memory", "files", "size"],
)
def test_every_limit_is_a_one_line_error(tmp_path: Path, limits: Limits, words: str) -> None:
    error = import_failure(save_model(recurrent(), tmp_path / "m.keras"), limits)
    assert words in error
    assert "\n" not in error


ENDINGS = {
    "sleeps": ("import time; time.sleep(100)", "took longer than 2 s"),
    "aborts": ("import os; os.abort()", "ended by SIGABRT; it may have needed more than 8192 MiB"),
    "fails": ("print(1 / 0)", "failed: ZeroDivisionError"),
    "says nothing": ("", "left no result in result.json"),
    "links": ("import os; os.symlink('/dev/zero', 'result.json')", "left no result"),
    "waits": ("import os; os.mkfifo('result.json')", "left no result in result.json"),
    "lies": (
        "for name in ('result.json', 'weights.safetensors'): open(name, 'w').write('{}')",
        "gave an invalid result",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("program", "words"), ENDINGS.values(), ids=ENDINGS.keys())
def test_a_misbehaving_worker_process_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    monkeypatch.setattr(isolation, "WORKER_ARGUMENTS", ("-c", program))
    path = tmp_path / "m.keras"
    path.write_bytes(b"PK")
    # on a busy machine a process may start for seconds
    limits = Limits(time_s=2) if "longer" in words else Limits()
    assert words in import_failure(path, limits)


def test_errors_have_no_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = r"open('error.txt', 'w').write('\x1b[31mLayer\r:\n  reason\x9b')"
    monkeypatch.setattr(isolation, "WORKER_ARGUMENTS", ("-c", program))
    path = tmp_path / "m.keras"
    path.write_bytes(b"PK")
    assert import_failure(path) == "?[31mLayer?:\n  reason?"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "raise ModuleNotFoundError(\"No module named 'keras'\", name='keras')"
    monkeypatch.setattr(isolation, "WORKER_ARGUMENTS", ("-c", program))
    path = tmp_path / "m.keras"
    path.write_bytes(b"PK")
    result = CliRunner().invoke(cli.app, ["import", str(path), str(tmp_path / "out")])
    assert (
        "No module named 'keras'; `carry import` needs `carry[tensorflow,train]`" in result.stderr
    )


@pytest.mark.parametrize(
    "own_session",
    [False, pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc"))],
)
def test_processes_and_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, own_session: bool
) -> None:
    process_file = tmp_path / "seen"
    child = ["sh", "-c", f"echo $$ $PWD | tee {process_file}; exec sleep 100"]
    options = f"stdout=subprocess.PIPE, start_new_session={own_session}"
    program = f"import subprocess\nsubprocess.Popen({child!r}, {options}).stdout.readline()"
    monkeypatch.setattr(isolation, "WORKER_ARGUMENTS", ("-c", program))
    (tmp_path / "m.keras").write_bytes(b"PK")
    assert "left no result" in import_failure(tmp_path / "m.keras")
    number, folder = process_file.read_text().split()
    assert not Path(folder).exists()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(number)).wait(30)


def test_content_must_match_the_file_extension(tmp_path: Path) -> None:
    archive, tree = (save_model(recurrent(), tmp_path / name) for name in ("a.keras", "b.h5"))
    for source, name, words in (
        (archive, "m.h5", "expected HDF5"),
        (tree, "m.keras", "expected a ZIP archive"),
        (archive, "m.zip", "expected a .keras or .h5 file"),
    ):
        path = tmp_path / name
        path.write_bytes(source.read_bytes())
        assert words in import_failure(path)


@pytest.mark.timeout(60)
def test_paths_that_are_not_regular_files_are_rejected(tmp_path: Path) -> None:
    assert "there is none" in import_failure(tmp_path / "none.keras")
    (tmp_path / "folder.keras").mkdir()
    os.mkfifo(tmp_path / "fifo.keras")
    assert "expected a regular file" in import_failure(tmp_path / "fifo.keras")
    assert "or a SavedModel folder with" in import_failure(tmp_path / "folder.keras")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_the_worker_process_ends_with_its_parent() -> None:
    child = (
        "import os, time; from models.importing.isolation import end_with_parent; "
        "end_with_parent(os.getppid()); print('ready', flush=True); time.sleep(30); print('alive')"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b""
