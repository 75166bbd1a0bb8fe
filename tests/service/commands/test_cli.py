"""The `carry` command itself."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from carry import cli
from tests.support.backfill import small_artifact


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
