"""Embedded Valkey: one server per directory, adopted or replaced, and restarted.

Services that are killed are real child processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from service.core.errors import StoreRefused, StoreUnavailable
from service.store.base import Committed
from service.store.embedded import embedded_valkey
from service.store.embedded.embedded_valkey import EmbeddedStatus, EmbeddedValkey
from service.store.embedded.valkey_process import (
    MAX_SOCKET_PATH_BYTES,
    make_socket_path,
    remove_socket,
    server_pids,
    signal_servers,
)
from tests.support.servers import opened, until, written
from tests.support.streams import Streams, columns, key, load, same_stream

OWNER = """
import signal, sys
from pathlib import Path
from service.store.embedded.embedded_valkey import EmbeddedValkey
# A test run in a shell's background has it ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
valkey = EmbeddedValkey(Path(sys.argv[1]), maxmemory_bytes=int(sys.argv[2]))
valkey.start()
print(valkey.status().pid, valkey.url, flush=True)
sys.stdin.read()
valkey.stop()
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory with a space in its name; its servers are killed at the end."""
    folder = tmp_path / "data dir"
    yield folder
    signal_servers(folder.resolve(), signal.SIGKILL)


@contextmanager
def running(data_dir: Path, **options: int) -> Iterator[EmbeddedValkey]:
    valkey = EmbeddedValkey(data_dir, **options)
    valkey.start()
    try:
        yield valkey
    finally:
        valkey.stop()


class Owner:
    """A service in a process of its own that holds an embedded Valkey."""

    def __init__(self, data_dir: Path, maxmemory_bytes: int = 0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(data_dir), str(maxmemory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        line = ""
        while "unix://" not in line:
            line = self.process.stdout.readline()
            assert line, "the owner ended early"
        pid, self.url = line.split()
        self.valkey_pid = int(pid)

    def signal(self, number: int) -> None:
        """Signal the whole process group, as a terminal does, and wait for the owner's end."""
        os.killpg(self.process.pid, number)
        self._finish()

    def leave(self) -> None:
        """End as a service does."""
        self.process.stdin.close()
        self._finish()

    def _finish(self) -> None:
        self.process.wait(30)
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def owned(data_dir: Path, maxmemory_bytes: int = 0) -> Iterator[Owner]:
    owner = Owner(data_dir, maxmemory_bytes)
    try:
        yield owner
    finally:
        if owner.process.poll() is None:
            owner.signal(signal.SIGKILL)


def put(url: str, name: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.set(name, name)
        written(client)


def has(url: str, name: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return client.get(name) == name.encode()


def record(data_dir: Path) -> dict[str, object]:
    return json.loads((data_dir / "valkey.json").read_text())


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


# Start and stop


async def test_streams_survive_a_restart_of_the_service(data_dir: Path) -> None:
    commit = Streams().creation(key("a"))
    with running(data_dir) as valkey:
        async with opened(valkey.url) as store:
            assert await store.commit(columns(commit)) == [Committed()]
    with running(data_dir) as valkey:
        async with opened(valkey.url) as store:
            (found,) = await load(store, [commit.key])
            assert same_stream(found, commit.new)


def test_a_stopped_server_leaves_no_process_and_no_socket(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        pid, socket = valkey.status().pid, Path(valkey.url.removeprefix("unix://"))
        assert alive(pid)
        assert socket.is_socket()
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        assert len(os.fsencode(socket)) <= MAX_SOCKET_PATH_BYTES
    assert not alive(pid)
    assert not socket.parent.exists()
    assert server_pids(data_dir.resolve()) == []
    assert valkey.status() == EmbeddedStatus(False, None, False, 0)
    with pytest.raises(StoreUnavailable):
        _ = valkey.url
    valkey.stop()


def test_the_server_listens_on_no_port_and_never_evicts(data_dir: Path) -> None:
    with running(data_dir) as valkey, redis.Redis.from_url(valkey.url) as client:
        options = client.config_get("*")
        assert options["port"] == "0"
        assert options["maxmemory-policy"] == "noeviction"
        assert options["appendonly"] == "yes"
        assert options["appendfsync"] == "everysec"
        assert Path(options["dir"]) == data_dir.resolve()


def test_the_server_inherits_no_other_descriptors(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        held = {os.readlink(fd) for fd in Path(f"/proc/{valkey.status().pid}/fd").iterdir()}
        assert str(data_dir.resolve() / "valkey.lock") in held
        assert str(data_dir.resolve() / "lock") not in held


def test_the_record_identifies_the_server(data_dir: Path) -> None:
    with running(data_dir) as valkey, redis.Redis.from_url(valkey.url) as client:
        written = record(data_dir)
        assert written["pid"] == valkey.status().pid
        assert written["run_id"] == client.info("server")["run_id"]
        assert valkey.url == f"unix://{written['socket']}"


def test_the_supervising_thread_pauses_except_during_a_restart(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_valkey, "BACKOFF_BASE_S", 600.0)
    with running(data_dir) as valkey:
        with valkey.without_thread() as is_alone:
            assert is_alone
            assert "carry-valkey" not in {thread.name for thread in threading.enumerate()}
        os.kill(valkey.status().pid, signal.SIGKILL)
        until(lambda: not valkey.status().running, "its end, which the thread sees")
        with valkey.without_thread() as is_alone:
            assert not is_alone


def test_a_failed_start_reports_the_end_of_the_log(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        put(valkey.url, "a")
    (manifest,) = data_dir.glob("appendonlydir/*.manifest")
    manifest.write_text("not a manifest\n")
    valkey = EmbeddedValkey(data_dir)
    with pytest.raises(StoreUnavailable, match=r"its log ends:[\s\S]*manifest"):
        valkey.start()
    # The directory is unlocked, and the next start fails in the same way.
    with pytest.raises(StoreUnavailable, match="manifest"):
        EmbeddedValkey(data_dir).start()


LOSES_A_SIGNAL = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print(flush=True)
signal.sigwait({signal.SIGTERM})
signal.sigwait({signal.SIGTERM})
"""
"""A server that has taken note of a signal, and does not stop before it has loaded its file."""


def test_a_server_that_loses_a_signal_gets_another(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def spawn(binary: Path, arguments: list[str], lock_fd: int, _: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["valkey-server", "-c", LOSES_A_SIGNAL, *arguments],
            executable=sys.executable,
            stdout=subprocess.PIPE,
            pass_fds=(lock_fd,),
        )
        processes.append(process)
        with process.stdout as ready:
            ready.readline()
        return process

    monkeypatch.setattr(embedded_valkey, "spawn_server", spawn)
    monkeypatch.setattr(embedded_valkey, "SIGTERM_INTERVAL_S", 0.05)
    with pytest.raises(StoreUnavailable):
        EmbeddedValkey(data_dir, start_timeout_s=0).start()
    assert [process.returncode for process in processes] == [0]


def test_a_directory_that_cannot_be_created_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreRefused, match="file"):
        EmbeddedValkey(tmp_path / "file").start()


def test_a_socket_path_that_is_too_long_is_rejected(data_dir: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    with pytest.raises(StoreRefused, match="shorter"):
        EmbeddedValkey(data_dir, runtime_dir=long).start()


def test_a_temporary_directory_with_a_long_path_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    socket = make_socket_path()
    assert len(os.fsencode(socket)) <= MAX_SOCKET_PATH_BYTES
    remove_socket(socket)
    assert not Path(socket).parent.exists()


# One per directory


def test_a_second_service_is_rejected_with_the_pid_of_the_first(data_dir: Path) -> None:
    with owned(data_dir) as owner:
        with pytest.raises(StoreRefused, match=rf"pid {owner.process.pid}\b"):
            EmbeddedValkey(data_dir).start()
        put(owner.url, "still served")
        assert len(server_pids(data_dir.resolve())) == 1
        owner.leave()
    assert not alive(owner.valkey_pid)
    with running(data_dir) as valkey:
        assert has(valkey.url, "still served")


def test_a_second_service_in_the_same_process_is_rejected(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        other = EmbeddedValkey(data_dir)
        with pytest.raises(StoreRefused, match=rf"pid {os.getpid()}\b"):
            other.start()
        other.stop()
        put(valkey.url, "still served")
        with pytest.raises(StoreRefused):
            EmbeddedValkey(data_dir).start()


def test_two_directories_have_two_servers(tmp_path: Path) -> None:
    with running(tmp_path / "a") as one, running(tmp_path / "b") as other:
        put(one.url, "x")
        assert not has(other.url, "x")


# Left behind


def test_an_orphaned_server_is_adopted(data_dir: Path) -> None:
    with owned(data_dir) as owner:
        put(owner.url, "kept")
        owner.signal(signal.SIGKILL)
        assert alive(owner.valkey_pid)
        with running(data_dir) as valkey:
            assert valkey.status() == EmbeddedStatus(True, owner.valkey_pid, True, 0)
            assert valkey.url == owner.url
            assert server_pids(data_dir.resolve()) == [owner.valkey_pid]
            assert has(valkey.url, "kept")
        assert not alive(owner.valkey_pid)
    with running(data_dir) as valkey:
        assert not valkey.status().adopted
        assert has(valkey.url, "kept")


def test_ctrl_c_does_not_stop_the_server(data_dir: Path) -> None:
    """Only the service's graceful shutdown stops it, after the last commit."""
    with owned(data_dir) as owner:
        owner.signal(signal.SIGINT)
        assert alive(owner.valkey_pid)
        put(owner.url, "after the signal")
        with running(data_dir) as valkey:
            assert has(valkey.url, "after the signal")


def test_changed_settings_start_a_new_server_on_the_same_files(data_dir: Path) -> None:
    with owned(data_dir, maxmemory_bytes=200_000_000) as owner:
        put(owner.url, "kept")
        owner.signal(signal.SIGKILL)
        with running(data_dir, maxmemory_bytes=300_000_000) as valkey:
            assert not valkey.status().adopted
            assert not alive(owner.valkey_pid)
            assert server_pids(data_dir.resolve()) == [valkey.status().pid]
            assert has(valkey.url, "kept")
            with redis.Redis.from_url(valkey.url) as client:
                assert client.config_get("maxmemory") == {"maxmemory": "300000000"}


def test_another_run_id_is_not_adopted(data_dir: Path) -> None:
    with owned(data_dir) as owner:
        put(owner.url, "kept")
        owner.signal(signal.SIGKILL)
        changed = record(data_dir) | {"run_id": "0" * 40}
        (data_dir / "valkey.json").write_text(json.dumps(changed))
        with running(data_dir) as valkey:
            assert not valkey.status().adopted
            assert not alive(owner.valkey_pid)
            assert has(valkey.url, "kept")


@pytest.mark.parametrize("written", [None, "{", '{"socket": "/x", "more": 1}'])
def test_a_server_without_a_record_is_replaced(data_dir: Path, written: str | None) -> None:
    """Its lock shows that it runs, and the process table which process it is."""
    with owned(data_dir) as owner:
        put(owner.url, "kept")
        owner.signal(signal.SIGKILL)
        if written is None:
            (data_dir / "valkey.json").unlink()
        else:
            (data_dir / "valkey.json").write_text(written)
        with running(data_dir, stop_timeout_s=0.2) as valkey:
            assert not alive(owner.valkey_pid)
            assert server_pids(data_dir.resolve()) == [valkey.status().pid]
            assert has(valkey.url, "kept")


def test_a_server_whose_service_was_killed_during_start_is_adopted(
    data_dir: Path,
) -> None:
    """The record has the socket, but no pid and no run id yet."""
    with owned(data_dir) as owner:
        owner.signal(signal.SIGKILL)
        early = record(data_dir) | {"pid": None, "run_id": None}
        (data_dir / "valkey.json").write_text(json.dumps(early))
        with running(data_dir) as valkey:
            assert valkey.status().adopted
            assert record(data_dir)["pid"] == owner.valkey_pid


def test_an_unresponsive_server_is_replaced(data_dir: Path) -> None:
    with owned(data_dir) as owner:
        put(owner.url, "kept")
        owner.signal(signal.SIGKILL)
        os.kill(owner.valkey_pid, signal.SIGSTOP)
        with running(data_dir, start_timeout_s=1.5, stop_timeout_s=0.2) as valkey:
            assert not alive(owner.valkey_pid)
            assert has(valkey.url, "kept")


def test_a_stale_record_is_ignored(data_dir: Path) -> None:
    with owned(data_dir) as owner:
        put(owner.url, "kept")
        owner.signal(signal.SIGKILL)
        os.kill(owner.valkey_pid, signal.SIGKILL)
        until(lambda: not alive(owner.valkey_pid), "the server's end")
        socket = Path(owner.url.removeprefix("unix://"))
        assert socket.exists()
        with running(data_dir) as valkey:
            assert not valkey.status().adopted
            assert valkey.url != owner.url
            assert not socket.parent.exists()
            assert has(valkey.url, "kept")


def test_a_recorded_pid_of_another_process_is_not_killed(data_dir: Path) -> None:
    """The operating system may have reused the pid."""
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            data_dir.mkdir()
            stale = {"socket": "/tmp/carry-none/valkey.sock", "settings": "x", "run_id": "0"}
            (data_dir / "valkey.json").write_text(json.dumps(stale | {"pid": bystander.pid}))
            with running(data_dir):
                pass
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_server_of_a_deleted_directory_is_not_taken_for_a_new_one(
    data_dir: Path,
) -> None:
    with owned(data_dir) as owner:
        owner.signal(signal.SIGKILL)
        try:
            shutil.rmtree(data_dir)
            with running(data_dir) as valkey:
                assert not valkey.status().adopted
                assert server_pids(data_dir.resolve()) == [valkey.status().pid]
            assert alive(owner.valkey_pid)
        finally:
            os.kill(owner.valkey_pid, signal.SIGKILL)


# Supervision


def test_a_server_that_exits_is_restarted_on_the_same_socket(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        put(valkey.url, "kept")
        for death in (1, 2):
            before = valkey.status().pid
            os.kill(before, signal.SIGKILL)
            until(lambda n=death: valkey.status().restarts == n and valkey.status().running)
            after = valkey.status()
            assert after.pid != before
            assert server_pids(data_dir.resolve()) == [after.pid]
            assert record(data_dir)["pid"] == after.pid
            assert has(valkey.url, "kept")


async def test_commits_wait_for_a_restart(data_dir: Path) -> None:
    streams = Streams()
    commit = streams.creation(key("a"))
    with running(data_dir) as valkey:
        async with opened(valkey.url, wait_s=30) as store:
            assert await store.commit(columns(commit)) == [Committed()]
            for _ in range(3):
                with redis.Redis.from_url(valkey.url) as client:
                    written(client)
                os.kill(until(lambda: valkey.status().pid), signal.SIGKILL)
                commit = streams.next(commit)
                assert await store.commit(columns(commit)) == [Committed()]
                (found,) = await load(store, [commit.key])
                assert same_stream(found, commit.new)


def test_an_adopted_server_that_exits_is_restarted(data_dir: Path) -> None:
    with owned(data_dir) as owner:
        put(owner.url, "kept")
        owner.signal(signal.SIGKILL)
        with running(data_dir) as valkey:
            os.kill(owner.valkey_pid, signal.SIGKILL)
            until(lambda: valkey.status().restarts == 1 and valkey.status().running)
            assert not valkey.status().adopted
            assert valkey.url == owner.url
            assert has(valkey.url, "kept")


def test_a_failed_restart_is_reported_and_retried(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        put(valkey.url, "kept")
        (manifest,) = data_dir.glob("appendonlydir/*.manifest")
        good = manifest.read_text()
        manifest.write_text("not a manifest\n")
        os.kill(valkey.status().pid, signal.SIGKILL)
        until(lambda: "manifest" in valkey.status().failure, "the failure's report")
        assert not valkey.status().running
        until(lambda: valkey.status().restarts >= 2, "a second try")
        manifest.write_text(good)
        until(lambda: valkey.status().running, "a server again")
        assert has(valkey.url, "kept")


def test_a_deleted_socket_directory_is_created_again(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        remove_socket(valkey.url.removeprefix("unix://"))
        os.kill(valkey.status().pid, signal.SIGKILL)
        until(lambda: valkey.status().restarts == 1 and valkey.status().running)
        put(valkey.url, "served")


def test_stop_during_a_restart_stops_the_server(data_dir: Path) -> None:
    with running(data_dir) as valkey:
        os.kill(valkey.status().pid, signal.SIGKILL)
        until(lambda: valkey.status().restarts == 1)
    assert server_pids(data_dir.resolve()) == []
