"""The `carry` command itself."""

from __future__ import annotations

import errno
import inspect
import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import carry
from carry import cli
from tests.support.backfill import small_artifact

SPEC = """
name: pumps
events: {fields: [{kind: timestamp, name: at}, {kind: numeric, name: x}]}
layers: [{kind: lstm, units: 4}]
heads: [{kind: forecast, name: next, targets: [x]}]
training: {validate_from: 2025-01-02, test_from: 2025-01-03}
"""


def test_package_runs_as_the_command(tmp_path: Path) -> None:
    """Also in a folder with modules of its own called `models` and `service`."""
    for name in ("models.py", "service.py"):
        (tmp_path / name).write_text("raise RuntimeError('a module of the project')")
    done = subprocess.run(
        [sys.executable, "-m", "carry", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: carry [OPTIONS] COMMAND" in done.stdout


def test_the_version_is_an_option_and_a_command() -> None:
    outputs = [CliRunner().invoke(cli.app, [word]) for word in ("--version", "version")]
    assert [each.output for each in outputs] == [f"{version('carry')}\n"] * 2
    assert [each.exit_code for each in outputs] == [0, 0]


def test_commands_keep_the_start_of_tensorflow_off_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "")  # so that it is removed again
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    seen: list[tuple[str | None, ...]] = []
    names = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
    monkeypatch.setattr(cli, "app", lambda prog_name: seen.append(tuple(map(os.getenv, names))))
    cli.main()
    assert seen == [("2", "1")], "a variable that is set already is kept"


@pytest.mark.parametrize(
    ("module", "words", "extra", "status"),
    [
        (
            *("models.training.train_frame", ["train", "spec.yaml", "data.csv", "out"]),
            *("tensorflow,train", 1),
        ),
        ("carry_client", ["replay"], "replay", 2),
    ],
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, words: list[str], extra: str, status: int
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == status
    assert result.stderr.startswith("carry: ")
    needed = f"`carry {words[0]}` needs `carry[{extra}]`: pip install 'carry[{extra}]'"
    assert needed in result.stderr


@pytest.mark.parametrize(
    ("missing", "call", "extra"),
    [
        ("keras", "train(Path('spec.yaml'), Path('a.csv'), Path('out'))", "tensorflow,train"),
        ("polars", "train_frame", "tensorflow,train"),
        ("mlflow", "pull_model('models:/a/1', Path('out'))", "mlflow"),
    ],
)
def test_a_missing_package_of_a_function_names_its_extra(
    tmp_path: Path, missing: str, call: str, extra: str
) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "a.csv").write_text("at,x\n")
    program = f"""
import sys; sys.modules["{missing}"] = None
from pathlib import Path; import carry
try:
    carry.{call}
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    name = call.partition("(")[0]
    needed = f"`carry.{name}` needs `carry[{extra}]`: pip install 'carry[{extra}]'"
    assert done.stdout.startswith(missing)
    assert needed in done.stdout


@pytest.mark.parametrize("name", ["train", "evaluate", "compare"])
def test_help_of_a_function_has_each_argument(name: str) -> None:
    function = getattr(carry, name)
    assert pickle.loads(pickle.dumps(function)) is function
    arguments = inspect.getdoc(function).partition("Args:\n")[2].partition("\n\n")[0]
    described = dict(line.strip().split(": ", 1) for line in arguments.splitlines())
    assert list(described) == list(inspect.signature(function).parameters)
    assert "Annotated" not in str(inspect.signature(function))


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("deltalake", ["delta:table", "out"], "delta"),
        ("pyiceberg.table", ["iceberg:table", "out"], "iceberg"),
        ("ray", ["events.csv", "out", "--engine", "ray"], "ray"),
    ],
)
def test_a_missing_package_of_an_option_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, words: list[str], extra: str
) -> None:
    small_artifact(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    Path("events.csv").write_text("stream\n")
    monkeypatch.setitem(sys.modules, module, None)
    command = ["backfill", "small", *words, "--stream", "stream"]
    assert f"needs `carry[{extra}]`" in CliRunner().invoke(cli.app, command).stderr


def test_unexpected_errors_are_left_to_typer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise error

    monkeypatch.setattr(cli, "version", fail)
    error: Exception = ZeroDivisionError()
    assert CliRunner().invoke(cli.app, ["version"]).exception is error
    error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    done = CliRunner().invoke(cli.app, ["version"])
    assert (done.exit_code, done.stderr) == (1, "")


@pytest.mark.parametrize("words", [["serve"], ["check"], ["consume", "--from", "a", "--to", "b"]])
def test_a_second_directory_of_models_is_rejected(words: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--models", "a", "--models", "b"])
    assert result.exit_code == 2
    assert "expected one directory" in result.output
