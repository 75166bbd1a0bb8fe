"""Stores with TLS and credentials, single and in a cluster, with self-signed certificates.

Redis alone: the embedded Valkey is built without TLS.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import pytest
from structlog.testing import capture_logs

from service.core.errors import StoreRefused
from service.store.base import COMMITTED
from service.store.capabilities import Lease, LeaseRequest, Quota
from service.store.codec import encode_state, pack_head
from service.store.history import HistoryCopy
from service.store.redis.redis_store import RedisStore
from service.store.settings import Durability, StoreSettings
from tests.service.store.test_history import as_version, filled, keep, read
from tests.support.certificates import Certificates, certificates, make_certificates
from tests.support.cluster import Cluster
from tests.support.servers import (
    KINDS,
    RealServer,
    becomes,
    emptied,
    free_port,
    opened,
    real_server,
    rejection,
    start_store,
    until,
)
from tests.support.streams import Commit, Streams, assert_stored, committed, key, same_stream

__all__ = ["certificates"]

PASSWORD = "s3cr3t/@:,?"
ACCESS_LIST = (
    Path("deploy/redis/users.acl")
    .read_text()
    .replace("PASSWORD_SHA256", sha256(PASSWORD.encode()).hexdigest())
)
RULES = next(
    line.split()[2:] for line in ACCESS_LIST.splitlines() if line.startswith("user carry ")
)
"""Password and permissions of the user in the shipped access control list."""


@contextmanager
def behind_tls(certificates: Certificates, *options: str) -> Iterator[tuple[RealServer, str]]:
    """A server with a TLS port, and `host:port?options` of its address."""
    port = free_port()
    tls = ("--bind", "127.0.0.1", "--tls-port", str(port), *certificates.options)
    with real_server("redis", *tls, *options) as server:
        yield server, f"127.0.0.1:{port}?ssl_ca_certs={certificates.authority}"


def add_user(server: RealServer, name: str) -> str:
    """A user who may do what the service needs; returns how it is named in an address."""
    with server.client() as client:
        client.execute_command(*("ACL", "SETUSER", name, *RULES))
    return f"{name}:{quote(PASSWORD, safe='')}@"


async def test_tls_with_a_single_server(certificates: Certificates) -> None:
    streams = Streams()
    with behind_tls(certificates) as (server, at):
        user = add_user(server, "carry")
        async with opened(f"rediss://{user}{at}") as store:
            first = streams.creation(key("a"))
            await committed(store, first)
            await assert_stored(store, first)
            assert (await store.streams("flights", "", None, 10)).streams == ("a",)
            assert (await store.monitor.check()).ok
            await store.keys.write({"a": b"1"})
            assert (await store.keys.read(b""))[1] == {"a": b"1"}
            usage = await store.usage.register("a", [(key("b"), 5)], Quota(1, 5))
            (registered,) = await store.usage.find_registrations("a", [key("b")])
            await store.usage.release("a", [(key("b"), registered)])
            await store.usage.reconcile("a")
            assert usage == ([True], 1, 5)
            (lease,) = await store.rates.lease([LeaseRequest("a:requests_per_s", 4.0, 4.0, 1.0)])
            assert lease == Lease(1.5, 1.5, 1)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python does not ask for it")
async def test_a_ca_certificate_without_key_usage_is_explained(tmp_path: Path) -> None:
    with behind_tls(make_certificates(tmp_path)) as (_, at):
        await rejection(
            lambda: start_store(f"rediss://{at}", store_wait_s=0.5),
            r"ssl_ca_certs.*keyUsage with keyCertSign",
        )


def test_unusable_tls_files_are_named(certificates: Certificates, tmp_path: Path) -> None:
    authority, key = certificates.authority, certificates.key
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("-")
    missing = tmp_path / "missing.crt"
    for options, message in {
        f"ssl_ca_certs={missing}": f"{missing} does not exist: ssl_ca_certs",
        f"ssl_ca_path={missing}": f"{missing} does not exist: ssl_ca_path",
        f"ssl_ca_certs={authority}&ssl_certfile={missing}": "missing.crt .* ssl_certfile",
        f"ssl_certfile={authority}&ssl_keyfile={missing}": "missing.crt .* ssl_keyfile",
        f"ssl_ca_certs={no_pem}": f"{no_pem}: expected .* ssl_ca_certs",
        f"ssl_certfile={authority}&ssl_keyfile={key}": "KEY_VALUES_MISMATCH",
        f"ssl_certfile={authority}": "no ssl_keyfile",
    }.items():
        for scheme in ("rediss", "rediss+cluster"):
            with pytest.raises(StoreRefused, match=message):
                RedisStore(StoreSettings(f"{scheme}://cache.test?{options}"))


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
async def test_start_logs_an_untrusted_certificate_immediately(
    certificates: Certificates, scheme: str
) -> None:
    with behind_tls(certificates) as (_, at), capture_logs() as lines:
        store = RedisStore(StoreSettings(f"{scheme}://{at.partition('?')[0]}", store_wait_s=60))
        starting = asyncio.create_task(store.start())

        await becomes(
            lambda: any("certificate verify failed" in line.get("reason", "") for line in lines),
            "the log line with the cause",
        )
        assert not starting.done()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await store.close()
        assert [line["event"] for line in lines].count("store_unavailable") == 1


async def test_tls_with_a_cluster(certificates: Certificates) -> None:
    """One node that owns all slots and announces its TLS port."""
    streams = Streams()
    cluster = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with behind_tls(certificates, *cluster) as (server, at):
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
            until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"), "it")
        user = add_user(server, "carry")
        async with opened(f"rediss+cluster://{user}{at}") as store:
            commits = [streams.creation(key(f"s{i}")) for i in range(20)]
            await committed(store, *commits)
            await assert_stored(store, *commits)
            assert (await store.monitor.check()).ok


async def test_a_cluster_with_credentials(shared_cluster: Cluster) -> None:
    streams = Streams()
    emptied(shared_cluster)
    for node in shared_cluster.nodes:
        node.ask("ACL", "SETUSER", "carry", *RULES)
    try:
        hosts = shared_cluster.url.partition("://")[2]
        url = f"redis+cluster://carry:{quote(PASSWORD, safe='')}@{hosts}"
        settings = {"durability": Durability.REPLICATED, "partitions": 16}
        async with opened(url, **settings) as store:
            commits = [streams.creation(key(f"s{i}")) for i in range(20)]
            await committed(store, *commits)
            state, _ = await store.load_with_reply(key("s3"))
            assert same_stream(state, commits[3].new)
            assert len((await store.streams("flights", "", None, 100)).streams) <= 20
        wrong = RedisStore(
            StoreSettings(f"redis+cluster://carry:wrong-secret@{hosts}", store_wait_s=60)
        )
        with pytest.raises(StoreRefused) as caught:
            await wrong.start()
        assert "wrong-secret" not in caught.value.detail
        await wrong.close()
    finally:
        for node in shared_cluster.nodes:
            node.ask("ACL", "DELUSER", "carry")


@pytest.mark.parametrize("kind", KINDS)
async def test_streams_survive_a_restart_with_the_access_control_list(
    kind: str, tmp_path: Path
) -> None:
    access_list = tmp_path / "users.acl"
    access_list.write_text(ACCESS_LIST)
    at = ("--bind", "127.0.0.1", "--port", str(port := free_port()))
    server = RealServer(kind, tmp_path, *at, "--appendonly", "yes", "--aclfile", str(access_list))
    url = f"redis://carry:{quote(PASSWORD, safe='')}@127.0.0.1:{port}"
    streams = Streams()
    try:
        server.launch()
        until(lambda: server.refuses("authentication"), "a server that needs a password")
        async with opened(url) as store:
            first = streams.creation(key("a"))
            await committed(store, first)
            last = await filled(store, streams, key("b"), [3] * 40)
            for version in (b"v", b"w", b"x"):
                other = encode_state(as_version(last.new, version * 16))
                assert await store.histories.commit_versions([key("b")], [other]) == [True]
            ahead = streams.after(last.new, 3)
            await keep(store, Commit(key("b"), last.new.head, ahead, streams.reply(ahead)))
            late = encode_state(as_version(last.new, b"y" * 16))
            assert await store.histories.commit_versions([key("b")], [late]) == [True]
            back = encode_state(streams.begin(position=110))
            entries = (await read(store, ahead, key("b"))).entries[:-5]
            written = await store.histories.write(
                key("b"),
                pack_head(ahead.head),
                back,
                HistoryCopy(entries),
                keeps_snapshots=True,
            )
            assert written == COMMITTED
        server.kill()
        server.launch()
        until(lambda: server.refuses("authentication"), "a server that needs a password")
        async with opened(url) as store:
            await assert_stored(store, first)
    finally:
        server.stop()
