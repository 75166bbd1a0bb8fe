"""Processes of tests, which several threads wait for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forks
from tests.support.forks import COMMAND, Fork
from tests.support.servers import until
from tests.support.service import Service


def start(*words: str) -> Fork:
    with Path(os.devnull).open("r+b") as null:
        return Fork([COMMAND, *words], os.environ, [null] * 3)


def test_status_is_read_by_another_thread_which_starts_the_next_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = start("--help")
    others: list[Fork] = []
    wait_for = select.select

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.undo()
        wait_for(*arguments[:3], None)
        assert process.poll() == 0
        others.append(start("no-such-command"))
        return wait_for(*arguments)

    monkeypatch.setattr(forks.select, "select", overtaken)
    assert process.wait() == 0
    assert others[0].wait() == 2


@contextmanager
def running() -> Iterator[Fork]:
    """A process that waits for its input."""
    read, write = os.pipe()
    with open(read, "rb") as data, open(write, "wb"), Path(os.devnull).open("r+b") as null:
        yield Fork([COMMAND, "produce", "-"], os.environ, [data, null, null])


def test_process_that_runs_exceeds_its_time() -> None:
    with running() as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0)
        process.kill()
        assert process.wait() == -9
        assert process.poll() == -9


def test_process_that_nobody_waits_for_leaves_the_fork_server_running() -> None:
    with running() as process:
        pid = process.pid
        del process
        os.kill(pid, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(pid), "its end")
    assert start("no-such-command").wait() == 2


def test_line_of_a_log_counts_once_it_is_whole(tmp_path: Path) -> None:
    service, log = Service(tmp_path, tmp_path), tmp_path / "service.log"
    log.write_bytes(b'{"message":"ready"}\ntext\n{"message":"ready","key":"\xc3')
    assert service.lines("ready") == service.lines() == [{"message": "ready"}]


def test_process_that_exits_before_a_signal_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start("--help")
    assert process.wait() == 0
    monkeypatch.setattr(process, "poll", lambda: None)
    process.kill()
