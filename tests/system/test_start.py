"""Failed starts: each prints one line with the remedy."""

from __future__ import annotations

import json
import socket
from functools import partial
from pathlib import Path

import pytest

from service.settings import GROUP_OF
from tests.support.command import Result, carry

serve = partial(carry, "serve")


def last_line(done: Result) -> str:
    """The line that ends a failed start; a traceback is never it."""
    assert done.exit_code == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--port", str(port), "--data-dir", str(tmp_path))
    assert f"carry: cannot listen on 127.0.0.1:{port}" in last_line(done)
    assert f"make run PORT={port + 1}" in last_line(done)


def test_settings_are_a_table_or_one_line_of_the_log() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ("--port", str(taken.getsockname()[1]))
        table = serve(*options, CARRY_WORKERS="3", CARRY_LOG_FORMAT="console")
        logged = serve(*options, CARRY_WORKERS="3")
    rows = [line.split() for line in table.stderr.splitlines()]
    assert ["workers", "3", "env"] in rows
    first, *others = logged.stderr.strip().splitlines()
    line = json.loads(first)
    assert (line["message"], line["flag"], "workers" in line["env"]) == ("settings", ["port"], True)
    assert list(line["values"]) == list(GROUP_OF)
    assert line["values"]["workers"] == "3"
    assert len(others) == 1, others


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.1"])
def test_a_host_of_another_machine_is_reported(host: str, tmp_path: Path) -> None:
    last = last_line(serve("--host", host, "--port", "0", "--data-dir", tmp_path))
    assert f"carry: cannot listen on {host}:0" in last
    assert last.endswith("; set CARRY_HOST to an address of this machine, for example 127.0.0.1")


@pytest.mark.parametrize(
    ("options", "environment", "parts"),
    [
        ((), {"CARRY_PROT": "9000"}, ("CARRY_PROT is not a setting; did you mean CARRY_PORT?",)),
        (("--models", "{folder}"), {}, ("{folder}", "carry init")),
        (
            ("--models", "{folder}", "--workers", "2"),
            {},
            ("carry: no worker could be started: {folder}: expected a model",),
        ),
        (
            ("--redis-url", "unix://{folder}/none.sock"),
            {"CARRY_STORE_WAIT_S": "0.2"},
            ("{folder}/none.sock",),
        ),
    ],
    ids=["setting", "models", "workers", "store"],
)
def test_failed_start_reports_its_cause(
    options: tuple[str, ...], environment: dict[str, str], parts: tuple[str, ...], tmp_path: Path
) -> None:
    words = [word.format(folder=tmp_path) for word in options]
    data = ("--data-dir", tmp_path / "data")
    last = last_line(serve("--port", "0", *data, *words, **environment))
    for part in parts:
        assert part.format(folder=tmp_path) in last


@pytest.mark.parametrize(
    ("url", "last"),
    [
        ("redis://user:hush@127.0.0.1:1/0", "127.0.0.1:1"),
        ("rediss://127.0.0.1:1/0?ssl_password=hush", "127.0.0.1:1"),
        ("redis://user:hu#sh@127.0.0.1:1/0", "%23"),
    ],
)
def test_a_password_is_not_shown(url: str, last: str) -> None:
    done = serve("--port", "0", "--redis-url", url, CARRY_STORE_WAIT_S="0.1")
    for part in ("hush", "hu#", "#sh", "'hu'"):
        assert part not in done.stderr + done.stdout.decode()
    assert last in last_line(done)


def test_kubernetes_service_links_are_logged_once(tmp_path: Path) -> None:
    links = {"CARRY_SERVICE_HOST": "10.96.12.7", "CARRY_PORT": "tcp://10.96.12.7:8000"}
    done = serve(
        *("--port", "0", "--redis-url", f"unix://{tmp_path}/none.sock"),
        CARRY_STORE_WAIT_S="0.1",
        **links,
    )
    assert f"{tmp_path}/none.sock" in last_line(done), "no setting was rejected"
    lines = [line for line in done.stderr.splitlines() if "service_links_ignored" in line]
    assert [json.loads(line)["variables"] for line in lines] == [sorted(links)]
