"""Backup and restore by the commands of the operator's page, on real servers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from service.store.embedded import EmbeddedValkey
from tests.support.needs import needs_tools
from tests.support.pages import ROOT
from tests.support.servers import KINDS, opened, server_program, until
from tests.support.streams import Streams, committed, key, load, same_stream

pytestmark = needs_tools("redis-cli")

_SECTION = re.compile(r"^##+ (.+?)\n(.*?)(?=^## |^### )", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(title: str) -> list[str]:
    """The blocks of commands of one section of the page."""
    page = (ROOT / "docs" / "how-to" / "back-up-and-restore.md").read_text(encoding="utf-8")
    sections = dict(_SECTION.findall(page))
    return _COMMANDS.findall(sections[title])


def shell(script: str, folder: Path) -> None:
    done = subprocess.run(
        ["sh", "-euc", script], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Configured:
    """A server with a configuration file, as an operator has one."""

    binary: str
    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "s"

    def configure(self, *, appendonly: bool) -> None:
        (self.folder / "redis.conf").write_text(
            f"port 0\nunixsocket {self.socket}\ndir {self.folder}\nsave ''\n"
            "repl-diskless-sync-delay 0\n"
            f"logfile {self.folder / 'log'}\nappendonly {'yes' if appendonly else 'no'}\n"
        )

    def run(self, script: str) -> None:
        """Run a block of the page with this server's names."""
        names = {
            "redis-server": self.binary,
            "redis-cli": f"redis-cli -s {self.socket}",
            "/etc/redis/redis.conf": str(self.folder / "redis.conf"),
            "/var/lib/redis": str(self.folder),
            "/backup": str(self.folder / "backup"),
        }
        shell(re.sub("|".join(names), lambda name: names[name[0]], script), self.folder)

    def start(self) -> None:
        self.run("redis-server /etc/redis/redis.conf --daemonize yes")
        until(self.pid, "the server")

    def pid(self) -> int | None:
        """Its process; None while it does not serve."""
        with suppress(redis.RedisError), redis.Redis(unix_socket_path=str(self.socket)) as client:
            return int(client.info("server")["process_id"])
        return None

    def kill(self) -> None:
        if (pid := self.pid()) is not None:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Configured]:
    (tmp_path / "backup").mkdir()
    server = Configured(server_program(request.param), tmp_path)
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize("appendonly", [True, False])
async def test_restored_server_has_the_streams_of_the_backup(
    server: Configured, appendonly: bool
) -> None:
    streams, url = Streams(), f"unix://{server.socket}"
    backup, restore, write_aof = commands("Redis or Valkey of your own")
    server.configure(appendonly=appendonly)
    server.start()
    first = streams.creation(key("a"))
    async with opened(url) as store:
        await committed(store, first)
        server.run(backup)
        await committed(store, streams.next(first), streams.creation(key("b")))
    server.run(restore)
    if appendonly:
        server.run(write_aof)
        until(server.pid, "the server")
        # it has written its own file by now: it must survive another start
        server.run("redis-cli SHUTDOWN")
        server.start()
    async with opened(url) as store:
        found, none = await load(store, [key("a"), key("b")])
        assert same_stream(found, first.new)
        assert none is None
        await committed(store, streams.next(first))


async def test_restored_embedded_valkey_has_the_streams_of_the_backup(tmp_path: Path) -> None:
    streams = Streams()
    backup, restore = (
        script.replace("/backup", str(tmp_path)) for script in commands("The embedded Valkey")
    )
    first = streams.creation(key("a"))
    with embedded(tmp_path / ".carry") as url:
        async with opened(url) as store:
            await committed(store, first)
            shell(backup, tmp_path)
            await committed(store, streams.next(first), streams.creation(key("b")))
    shell(restore, tmp_path)
    with embedded(tmp_path / ".carry") as url:
        async with opened(url) as store:
            found, none = await load(store, [key("a"), key("b")])
            assert same_stream(found, first.new)
            assert none is None


@contextmanager
def embedded(folder: Path) -> Iterator[str]:
    """The address of a running embedded Valkey."""
    valkey = EmbeddedValkey(folder)
    try:
        valkey.start()
        yield valkey.url
    finally:
        valkey.stop()
