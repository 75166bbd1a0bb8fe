"""Embedded Valkey: one server per directory, restarted when it exits, shut down if left behind.

Services that are killed are real child processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from service.core.errors import StoreRefused, StoreUnavailable
from service.store import embedded
from service.store.embedded import MAX_SOCKET_PATH_BYTES, EmbeddedValkey, find_running
from tests.support.servers import until, written

OWNER = """
import signal, sys
from pathlib import Path
from service.store.embedded import EmbeddedValkey
# A test run in a shell's background has it ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
valkey = EmbeddedValkey(Path(sys.argv[1]))
valkey.start()
print(valkey.url, flush=True)
sys.stdin.read()
valkey.stop()
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory with a space in its name; its servers are killed at the end."""
    folder = tmp_path / "data dir"
    yield folder
    for process in servers(folder):
        process.kill()


def servers(data_dir: Path) -> list[psutil.Process]:
    """The server processes of a directory."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "name"])
        if process.info["name"] == "valkey-server"
        and str(data_dir.resolve()) in (process.info["cmdline"] or [])
    ]


@contextmanager
def running(data_dir: Path, **options: float) -> Iterator[EmbeddedValkey]:
    valkey = EmbeddedValkey(data_dir, **options)
    valkey.start()
    try:
        yield valkey
    finally:
        valkey.stop()


@contextmanager
def owned(data_dir: Path) -> Iterator[Owner]:
    owner = Owner(data_dir)
    try:
        yield owner
    finally:
        if owner.process.poll() is None:
            owner.signal(signal.SIGKILL)


class Owner:
    """A service in a process of its own that holds an embedded Valkey."""

    def __init__(self, data_dir: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.url = ""
        while "unix://" not in self.url:
            self.url = self.process.stdout.readline().strip()
            assert self.process.poll() is None, "the owner ended early"
        self.valkey_pid = pid_of(data_dir)

    def signal(self, number: int) -> None:
        """Signal the whole process group, as a terminal does, and wait for the owner's end."""
        os.killpg(self.process.pid, number)
        self.process.wait(30)
        self.process.stdin.close()
        self.process.stdout.close()


def put(url: str, name: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.set(name, name)
        written(client)


def has(url: str, name: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return client.get(name) == name.encode()


def pid_of(data_dir: Path) -> int | None:
    """The pid in the record of the server that was started last."""
    return json.loads((data_dir / "valkey.json").read_text())["pid"]


def answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return client.ping()
    except redis.RedisError:
        return False


def kill_server(data_dir: Path, url: str) -> None:
    """Kill the server, and wait until its service has restarted it."""
    before = pid_of(data_dir)
    os.kill(before, signal.SIGKILL)
    until(lambda: pid_of(data_dir) not in (None, before) and answers(url), "a restart")


# Start and stop


def test_a_stopped_server_leaves_no_process_and_no_socket(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        socket = Path(valkey.url.removeprefix("unix://"))
        assert [process.pid for process in servers(data_dir)] == [pid_of(data_dir)]
        assert find_running(data_dir) == valkey.url
        assert socket.is_socket()
        assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert servers(data_dir) == []
    assert find_running(data_dir) is None
    assert not socket.parent.exists()
    with pytest.raises(StoreUnavailable):
        _ = valkey.url
    valkey.stop()


def test_the_server_listens_on_no_port_never_evicts_and_inherits_only_its_lock(
    data_dir: Path,
) -> None:
    with running(data_dir) as valkey, redis.Redis.from_url(valkey.url) as client:
        options = client.config_get("*")
        assert options["port"] == "0"
        assert options["maxmemory-policy"] == "noeviction"
        assert options["appendonly"] == "yes"
        assert options["appendfsync"] == "everysec"
        assert Path(options["dir"]) == data_dir.resolve()
        held = {os.readlink(fd) for fd in Path(f"/proc/{pid_of(data_dir)}/fd").iterdir()}
        assert str(data_dir.resolve() / "valkey.lock") in held
        assert str(data_dir.resolve() / "lock") not in held
        streams = (data_dir / "appendonlydir").iterdir()
        assert not any(file.stat().st_mode & 0o077 for file in streams)


def test_an_unresponsive_server_is_killed_at_the_end(data_dir: Path) -> None:
    with running(data_dir, stop_timeout_s=0.2):
        os.kill(pid_of(data_dir), signal.SIGSTOP)
    assert servers(data_dir) == []


def test_a_failed_start_reports_the_end_of_the_log(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        put(valkey.url, "a")
    (manifest,) = data_dir.glob("appendonlydir/*.manifest")
    manifest.write_text("not a manifest\n")
    # the directory is unlocked, and the next start fails in the same way
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"its log ends:[\s\S]*manifest"):
            EmbeddedValkey(data_dir).start()


def test_an_unresponsive_start_times_out_and_leaves_no_process(data_dir: Path) -> None:
    with pytest.raises(StoreUnavailable, match="did not answer in 0 s"):
        EmbeddedValkey(data_dir, start_timeout_s=0).start()
    assert servers(data_dir) == []


def test_a_signal_during_a_start_leaves_no_process(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def interrupted(*arguments: object, **options: object) -> None:
        started.append(start(*arguments, **options))
        raise SystemExit

    monkeypatch.setattr(embedded.subprocess, "Popen", interrupted)
    with pytest.raises(SystemExit):
        EmbeddedValkey(data_dir).start()
    assert [process.wait(0) for process in started] == [0]


def test_a_directory_that_cannot_be_created_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreRefused, match="file"):
        EmbeddedValkey(tmp_path / "file").start()


def test_a_temporary_directory_with_a_long_path_is_not_used(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with running(data_dir) as valkey:
        assert len(os.fsencode(valkey.url.removeprefix("unix://"))) <= MAX_SOCKET_PATH_BYTES


# One per directory


def test_a_second_service_is_rejected_with_the_pid_of_the_first(data_dir: Path) -> None:
    with owned(data_dir) as owner:
        other = EmbeddedValkey(data_dir)
        with pytest.raises(StoreRefused, match=rf"pid {owner.process.pid}\b"):
            other.start()
        other.stop()
        put(owner.url, "still served")
        assert len(servers(data_dir)) == 1
        owner.process.communicate(timeout=30)
    assert servers(data_dir) == []
    with running(data_dir) as valkey:
        with pytest.raises(StoreRefused, match=rf"pid {os.getpid()}\b"):
            EmbeddedValkey(data_dir).start()
        assert has(valkey.url, "still served")


# Left behind


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_server_of_a_killed_service_is_replaced(data_dir: Path, number: int) -> None:
    """Neither the signal nor Ctrl-C ends the server: workers still commit."""
    with owned(data_dir) as owner:
        owner.signal(number)
        put(owner.url, "after the signal")
        assert find_running(data_dir) == owner.url
        with running(data_dir) as valkey:
            assert [process.pid for process in servers(data_dir)] == [pid_of(data_dir)]
            assert not Path(owner.url.removeprefix("unix://")).parent.exists()
            assert has(valkey.url, "after the signal")


@pytest.mark.parametrize("record", ["unresponsive", None, "{", '{"file": "/x"}'])
def test_a_server_that_cannot_be_shut_down_is_a_clear_error(
    data_dir: Path, record: str | None
) -> None:
    with owned(data_dir) as owner:
        owner.signal(signal.SIGKILL)
        if record == "unresponsive":
            os.kill(owner.valkey_pid, signal.SIGSTOP)
        elif record is None:
            (data_dir / "valkey.json").unlink()
        else:
            (data_dir / "valkey.json").write_text(record)
        pid = owner.valkey_pid if record == "unresponsive" else "unknown"
        with pytest.raises(StoreRefused, match=rf"pid {pid}\) .* holds .*valkey\.lock"):
            EmbeddedValkey(data_dir, stop_timeout_s=0.2).start()
        assert [process.pid for process in servers(data_dir)] == [owner.valkey_pid]


def test_the_record_of_a_server_that_has_ended_is_ignored(data_dir: Path) -> None:
    """The operating system may have reused its pid."""
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            data_dir.mkdir()
            stale = {"socket": "/tmp/carry-none/valkey.sock", "pid": bystander.pid}
            (data_dir / "valkey.json").write_text(json.dumps(stale))
            assert find_running(data_dir) is None
            with running(data_dir):
                pass
            assert bystander.poll() is None
        finally:
            bystander.kill()


# Supervision


def test_a_server_that_exits_is_restarted_on_the_same_socket(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        put(valkey.url, "kept")
        for _ in range(2):
            kill_server(data_dir, valkey.url)
            assert has(valkey.url, "kept")
        assert [process.pid for process in servers(data_dir)] == [pid_of(data_dir)]


def test_a_failed_restart_is_retried(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        put(valkey.url, "kept")
        (manifest,) = data_dir.glob("appendonlydir/*.manifest")
        good = manifest.read_text()
        manifest.write_text("not a manifest\n")
        before = pid_of(data_dir)
        os.kill(before, signal.SIGKILL)
        first = until(lambda: (pid := pid_of(data_dir)) != before and pid, "a first try")
        until(lambda: pid_of(data_dir) not in (None, first), "a second try")
        manifest.write_text(good)
        until(lambda: answers(valkey.url), "a server again")
        assert has(valkey.url, "kept")


def test_a_deleted_socket_directory_is_created_again(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        socket = Path(valkey.url.removeprefix("unix://"))
        socket.unlink()
        socket.parent.rmdir()
        kill_server(data_dir, valkey.url)


def test_stop_during_a_restart_stops_the_server(data_dir: Path) -> None:
    with running(data_dir):
        before = pid_of(data_dir)
        os.kill(before, signal.SIGKILL)
        until(lambda: pid_of(data_dir) != before, "a restart")
    assert servers(data_dir) == []


def test_the_supervising_thread_pauses_for_a_fork(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        for _ in range(2):
            with valkey.without_thread():
                names = {thread.name for thread in threading.enumerate()}
                assert "carry-valkey" not in names
                os.kill(pid_of(data_dir), signal.SIGKILL)
            until(lambda: answers(valkey.url), "a restart after the fork")
