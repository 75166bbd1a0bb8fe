"""The `carry` command itself."""

from __future__ import annotations

import os

import pytest

from carry import cli


def test_commands_keep_the_start_of_tensorflow_off_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "")  # so that it is removed again
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    seen: list[tuple[str | None, ...]] = []
    names = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
    monkeypatch.setattr(cli, "app", lambda prog_name: seen.append(tuple(map(os.getenv, names))))
    cli.main()
    assert seen == [("2", "1")], "a variable that is set already is kept"
