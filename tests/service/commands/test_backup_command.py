"""`carry backup` and `carry restore` on the embedded store, running and stopped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from service.access.key_cache import AccessKeys
from service.commands.backup import open_output
from service.serve import store_requires_keys
from service.settings import Settings
from service.store.backup import BackupInfo, BackupReader, write_backup
from service.store.embedded import EmbeddedValkey
from service.store.layout import HEADER_BYTES
from service.store.settings import StoreSettings
from tests.support import command
from tests.support.access import new_authorization, revoke
from tests.support.command import Result
from tests.support.servers import opened, real_server
from tests.support.streams import Streams, committed, key, load, same_stream


async def carry(*words: str | Path, data: bytes = b"", **environment: str) -> Result:
    """Run a command while the test's event loop runs on."""
    return await asyncio.to_thread(command.carry, *words, data=data, **environment)


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


@pytest.fixture
def servers() -> Iterator[tuple[str, str]]:
    """Addresses of two empty servers."""
    with real_server("valkey") as first, real_server("valkey") as second:
        yield first.url, second.url


async def is_open(url: str) -> bool:
    """Whether a service on this store, with the settings of Compose, answers without a key."""
    settings = Settings.load({"redis_url": url, "insecure": True, "host": "0.0.0.0"})
    async with opened(url) as store:
        required = settings.access.require_keys
        keys = AccessKeys(store.keys, store.rates, store.usage, required=required)
        await keys.refresh()
    is_open = keys.open_caller is not None
    assert is_open == (not await store_requires_keys(settings))
    return is_open


async def test_damaged_streams_are_named_and_left_out(
    servers: tuple[str, str], tmp_path: Path
) -> None:
    url, new = servers
    streams = Streams()
    async with opened(url) as store:
        await committed(store, *(streams.creation(key(name)) for name in ("a", "b")))
        with redis.Redis.from_url(url) as client:
            client.setrange(StoreSettings(url).keys.state(key("b")), HEADER_BYTES + 3, b"\xff")
        done = await carry("backup", tmp_path / "file", "--redis-url", url)
    assert done.exit_code == 1
    assert "backed up 1 stream\n" in done.stderr
    assert "1 damaged streams are not in the backup: flights/b\n" in done.stderr
    assert (await carry("restore", tmp_path / "file", "--redis-url", new)).exit_code == 0


async def test_a_restored_store_requires_keys_if_the_store_of_the_backup_did(
    servers: tuple[str, str], tmp_path: Path
) -> None:
    url, new = servers
    file, streams = tmp_path / "file", Streams()
    async with opened(url) as store:
        await committed(store, streams.creation(key("a")))
        await carry("backup", file, "--redis-url", url)
        await carry("restore", file, "--redis-url", new)
        assert await is_open(new)
        await revoke(store.keys, await new_authorization(store.keys, name="the last"))
        done = await carry("backup", file, "--redis-url", url, "--prefix", "none")
    assert "without the 1 access key (--keys)" in done.stderr
    done = await carry("restore", file, "--redis-url", new)
    assert (done.exit_code, await is_open(new)) == (0, False)
    assert "requests need an access key, as before: `carry keys create NAME`" in done.stderr
    done = await carry("restore", file, "--redis-url", new, "--keys")
    assert done.exit_code == 1
    assert "the backup has no access keys" in done.stderr
    # a backup of a store that has the mark alone has it too
    await carry("backup", file, "--redis-url", new)
    async with opened(new, namespace="other") as store:
        with file.open("rb") as source:
            assert BackupReader(source).info.keys == {}
        assert await store.keys.read(None) == (b"", {})
        await carry("restore", file, "--redis-url", new, CARRY_NAMESPACE="other")
        assert (await store.keys.read(None))[0] != b""


async def test_keys_are_restored_and_overwritten_only_on_request(
    servers: tuple[str, str], tmp_path: Path
) -> None:
    url, new = servers
    file = tmp_path / "file"
    file.touch(0o644)
    async with opened(url) as store, opened(new) as restored:
        authorization = await new_authorization(store.keys, name="of acme")
        key_id, secret = authorization.split("_")[1:]
        before = (await store.keys.read(None))[1]
        done = await carry("backup", file, "--redis-url", url, "--keys")
        assert "backed up 0 streams and 1 access key" in done.stderr
        assert file.stat().st_mode & 0o777 == 0o600
        assert secret.encode() not in file.read_bytes()

        done = await carry("restore", file, "--redis-url", new)
        assert "or restore those of the backup with --keys" in done.stderr
        assert (await restored.keys.read(None))[1] == {}
        done = await carry("restore", file, "--redis-url", new, "--keys")
        assert f"restored key {key_id}  active   of acme: " in done.stderr
        version, records = await restored.keys.read(None)
        assert records == before
        done = await carry("restore", file, "--redis-url", new, "--keys")
        assert done.stderr == "restored 0 streams\n"
        assert await restored.keys.read(version) is None

        await revoke(restored.keys, authorization)
        done = await carry("restore", file, "--redis-url", new, "--keys")
        assert f"kept key {key_id} as the store has it" in done.stderr
        assert (await restored.keys.read(None))[1] != before
        done = await carry("restore", file, "--redis-url", new, "--keys", "--replace")
        assert f"restored key {key_id}  active" in done.stderr
        assert (await restored.keys.read(None))[1] == before


async def test_the_versions_that_answer_are_restored(
    servers: tuple[str, str], tmp_path: Path
) -> None:
    url, new = servers
    file = tmp_path / "file"
    async with opened(url) as store, opened(new) as restored:
        for model in ("flights", "rivers"):
            version, _ = await store.models.read(None) or (b"", {})
            assert await store.models.write(version, model, b'{"champion":"ab"}')
        await carry("backup", file, "--redis-url", url)
        done = await carry("restore", file, "--redis-url", new, "--model", "rivers")
        assert done.stderr.splitlines()[1:] == ["restored the versions of model rivers"]
        assert await store.models.write((await store.models.read(None))[0], "rivers", b"{}")
        done = await carry("restore", file, "--redis-url", url)
        assert done.stderr.splitlines()[1:] == ["kept the versions in the store of model rivers"]
        await carry("backup", file, "--redis-url", url, "--model", "flights")
        with file.open("rb") as source:
            assert [*BackupReader(source).info.models] == ["flights"]
        assert [*(await restored.models.read(None))[1]] == ["rivers"]


@pytest.mark.parametrize("keys", [{"version": b"x"}, {"0a1b2c3d4e5f": b"{}"}, {"0a1b2c3d4e5f": 1}])
async def test_invalid_keys_of_a_backup_are_not_written(
    servers: tuple[str, str], tmp_path: Path, keys: Any
) -> None:
    url, _ = servers
    async with opened(url) as store:
        with (tmp_path / "file").open("wb") as file:
            info = BackupInfo(0, "carry", None, "", keys)
            await write_backup(store, file, info, lambda _: None)
        done = await carry("restore", tmp_path / "file", "--redis-url", url, "--keys")
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert await store.keys.read(None) == (b"", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "expected a backup written by `carry backup`, got another file"),
        (b"CRRB\x04\0\0\0", "expected format 1 to 3 of a backup, got 4"),
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
    file = tmp_path / "file"
    file.write_bytes(b"earlier")
    failures = [
        (file, "--data-dir", tmp_path / "none", f"there is no data directory {tmp_path / 'none'}"),
        (file, "--redis-url", "redis://127.0.0.1:1?", "127.0.0.1:1"),
        (tmp_path / "no" / "file", "--redis-url", "unix:///no", "no: expected an existing folder"),
    ]
    for target, *address, message in failures:
        done = await carry("backup", target, *address)
        assert done.exit_code == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("carry: ")
        assert message in last
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_bytes() == b"earlier"


def test_backups_into_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with open_output(str(target)) as first:
        first.write(b"1" * 10_000)
        first.flush()
        with open_output(str(target)) as second:
            second.write(b"22")
        assert target.read_bytes() == b"22"
    assert target.read_bytes() == b"1" * 10_000
    assert os.listdir(tmp_path) == ["file"]
