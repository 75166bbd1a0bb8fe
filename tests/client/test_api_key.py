"""The access key of a client: from its argument or the environment, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from carry_client.wire import authorization

KEY = "carry_0a1b2c3d4e5f_" + "5" * 64


def test_argument_takes_precedence_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert authorization() == {}
    file = tmp_path / "key"
    file.write_text("from-file\nmore\n")
    monkeypatch.setenv("CARRY_API_KEY_FILE", str(file))
    assert authorization() == {"authorization": "Bearer from-file"}
    monkeypatch.setenv("CARRY_API_KEY", "from-variable")
    assert authorization() == {"authorization": "Bearer from-variable"}
    assert authorization(KEY) == {"authorization": f"Bearer {KEY}"}
    assert authorization("") == {}


@pytest.mark.parametrize("text", [f"{KEY} x", f"{KEY}\r\nx: y", "schlüssel"])
def test_malformed_key_is_rejected_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match="api_key: expected an access key") as caught:
        authorization(text)
    assert text[:8] not in str(caught.value)


def test_endless_key_file_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRY_API_KEY_FILE", "/dev/zero")
    with pytest.raises(ValueError, match="CARRY_API_KEY_FILE: expected an access key"):
        authorization()


def test_file_that_cannot_be_read_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARRY_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"CARRY_API_KEY_FILE: .*No such file"):
        authorization()
