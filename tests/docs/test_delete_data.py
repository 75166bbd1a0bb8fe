"""Deleted data is gone from files and replicas after the commands of the operator's page."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from service.core.values import StreamState
from service.store.base import Committed
from tests.support.needs import needs_tools
from tests.support.pages import ROOT
from tests.support.servers import KINDS, RealServer, free_port, opened, real_server, until
from tests.support.streams import Streams, committed, key

pytestmark = needs_tools("redis-cli")

PAGE = ROOT / "docs" / "how-to" / "manage-streams.md"


def rewrite_files(server: RealServer) -> None:
    """Run the commands of the page that call the store."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (commands,) = [block for block in blocks if "redis-cli" in block]
    script = commands.replace("redis-cli ", f"redis-cli -s {server.socket} ")
    done = subprocess.run(["sh", "-euc", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def in_files(server: RealServer, content: bytes) -> bool:
    while True:
        files = [each for each in Path(server.folder).rglob("*") if each.is_file()]
        try:
            return any(content in each.read_bytes() for each in files)
        except FileNotFoundError:
            # the server renamed one since they were listed
            continue


def values(state: StreamState) -> bytes:
    return state.state.floats.tobytes()


@pytest.mark.parametrize("kind", KINDS)
async def test_deleted_data_is_gone_after_the_files_are_rewritten(
    kind: str,
) -> None:
    streams = Streams()
    port = str(free_port())
    prompt = ("--repl-diskless-sync-delay", "0", "--appendonly", "yes")
    with (
        real_server(kind, "--bind", "127.0.0.1", "--port", port, *prompt) as primary,
        real_server(kind, "--replicaof", f"127.0.0.1 {port}", *prompt) as replica,
        primary.client() as client,
    ):
        until(lambda: client.set("probe", "") and client.wait(1, 1000), "the replica in step")

        def wait_for_replica() -> None:
            """Wait until both files have what was written."""
            offset = primary.replication_offset()
            until(lambda: replica.has_in_file(offset), "the replica's file")
            until(primary.has_complete_file, "the file")

        deleted, kept = streams.creation(key("deleted-name")), streams.creation(key("kept-name"))
        async with opened(primary.url, tombstone_ttl_s=0.2) as store:
            await committed(store, deleted, kept)
            wait_for_replica()
            for server in (primary, replica):
                assert in_files(server, values(deleted.new))
            assert await store.delete(deleted.key) == Committed()
        until(lambda: not list(client.scan_iter("*deleted-name")), "the end of the tombstone")
        wait_for_replica()
        for server in (primary, replica):
            with server.client() as reader:
                assert not list(reader.scan_iter("*deleted-name"))
            rewrite_files(server)
            assert in_files(server, values(kept.new))
            assert not in_files(server, values(deleted.new))
            assert not in_files(server, b"deleted-name")
