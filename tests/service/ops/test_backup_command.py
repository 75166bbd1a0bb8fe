"""`carry backup` and `carry restore` on the embedded store, running and stopped."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from service.ops.backup_command import _open_output
from service.store.embedded.embedded_valkey import EmbeddedValkey
from tests.support import command
from tests.support.command import Result
from tests.support.servers import opened
from tests.support.streams import Streams, committed, key, load, same_stream


async def carry(*words: str | Path, data: bytes = b"") -> Result:
    """Run a command while the test's event loop runs on."""
    return await asyncio.to_thread(command.carry, *words, data=data)


async def test_backup_of_a_running_store_is_restored_into_a_new_one(tmp_path: Path) -> None:
    streams = Streams()
    commits = [streams.creation(key(name)) for name in ("a", "b")]
    running, new = tmp_path / "running", tmp_path / "new"
    valkey = EmbeddedValkey(running)
    valkey.start()
    try:
        async with opened(valkey.url) as store:
            await committed(store, *commits)
            done = await carry("backup", tmp_path / "all", "--data-dir", running)
            assert (done.exit_code, done.stderr) == (0, "backed up 2 streams\n")
            piped = await carry("backup", "-", "--data-dir", running, "--prefix", "b")
            none = await carry("backup", tmp_path / "x", "--data-dir", running, "--model", "x")
            assert none.exit_code == 0
            assert "0 streams: none of these is in the namespace 'carry'" in none.stderr
    finally:
        valkey.stop()

    done = await carry("restore", "-", "--data-dir", new, data=piped.stdout)
    assert (done.exit_code, done.stderr) == (0, "restored 1 stream\n")
    done = await carry("restore", tmp_path / "all", "--data-dir", new)
    assert done.stderr == "restored 1 stream, kept 1 that the store has already\n"
    valkey = EmbeddedValkey(new)
    valkey.start()
    try:
        async with opened(valkey.url) as store:
            found = await load(store, [commit.key for commit in commits])
    finally:
        valkey.stop()
    for state, commit in zip(found, commits, strict=True):
        assert same_stream(state, commit.new)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "expected a backup written by `carry backup`, got another file"),
        (b"CRRB\x02\0\0\0", "expected format 1 of a backup, got 2"),
        (b"CRRB\x01\0\0\0", "the backup is incomplete: it ends after 0 streams"),
    ],
)
async def test_unusable_backup_file_prints_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    done = await carry("restore", tmp_path / "file", "--redis-url", "unix:///nowhere")
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


async def test_failed_backup_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARRY_STORE_WAIT_S", "0.2")
    (tmp_path / "file").write_bytes(b"earlier")
    done = await carry("backup", tmp_path / "file", "--data-dir", tmp_path / "none")
    assert (done.exit_code, done.stderr) == (
        1,
        f"carry: there is no data directory {tmp_path / 'none'}\n",
    )
    done = await carry("backup", tmp_path / "file", "--redis-url", "redis://127.0.0.1:1?")
    assert done.exit_code == 1
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"earlier"
    done = await carry("backup", tmp_path / "no" / "file", "--redis-url", "unix:///nowhere")
    assert (done.exit_code, done.stderr) == (
        1,
        f"carry: {tmp_path / 'no'}: expected an existing folder for the backup\n",
    )


def test_backups_into_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with _open_output(str(target)) as first:
        first.write(b"1" * 10_000)
        first.flush()
        with _open_output(str(target)) as second:
            second.write(b"22")
        assert target.read_bytes() == b"22"
    assert target.read_bytes() == b"1" * 10_000
    assert os.listdir(tmp_path) == ["file"]
