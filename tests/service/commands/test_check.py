"""`carry check`: each check passes, and fails with the reason, without a trace in the store."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from models.artifact.artifact import Artifact
from service.settings import Settings
from service.start_checks import CannotServeError, check_packages, run_checks
from service.store.redis.server_checks import REQUIRED_COMMANDS, required_commands
from service.store.settings import Durability, StoreSettings
from tests.support.cluster import Cluster, shared_cluster
from tests.support.command import carry
from tests.support.servers import RealServer, emptied, server, shared_server
from tests.support.service import Service

__all__ = ["server", "shared_cluster", "shared_server"]

ROOT = Path(__file__).parents[3]
ACCESS_LIST = (ROOT / "deploy" / "redis" / "users.acl").read_text()
PERMISSIONS = ACCESS_LIST[ACCESS_LIST.index("user carry") :].split()[4:]

ALL_PERMITTED = (True, "the store's user may run every command")

Check = Callable[..., dict[str, tuple[bool, str]]]


@pytest.fixture
def check(server: RealServer, artifact: Artifact) -> Check:
    """Runs the checks with further settings; returns what each found."""

    def run(
        grace_s: float | None = None, proxy_idle_s: float | None = None, **settings: Any
    ) -> dict[str, tuple[bool, str]]:
        flags = {"redis_url": server.url, "models_dir": artifact.path, **settings}
        results = list(run_checks(Settings.load(flags), grace_s, proxy_idle_s))
        assert len({result.name for result in results}) == len(results)
        return {result.name: (result.ok, result.detail) for result in results}

    return run


def failures(results: dict[str, tuple[bool, str]]) -> list[str]:
    return [name for name, (ok, _) in results.items() if not ok]


def permit(client: redis.Redis, *denied: str) -> None:
    """A user `carry` with the permissions of the shipped access list, but for some."""
    client.execute_command("ACL", "DELUSER", "carry")
    rules = [each for each in PERMISSIONS if each not in denied]
    client.execute_command("ACL", "SETUSER", "carry", "on", ">hush", *rules)


def test_check_writes_nothing_and_listens_on_no_port(
    check: Check, server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "listen", None)
    results = check()
    assert list(results) == ["packages", "models", "store", "permissions", "access", "shutdown"]
    assert failures(results) == []
    assert re.search(r"(Redis|Valkey) \d.*noeviction, with an append-only", results["store"][1])
    assert re.fullmatch(r"probe \w+ on onnxruntime", results["models"][1])
    with server.client() as client:
        assert client.dbsize() == 0


def test_the_store_of_a_running_service_passes(service: Service) -> None:
    port = service.url.rpartition(":")[2]
    done = carry("check", "--data-dir", service.data_dir, CARRY_PORT=port)
    assert done.exit_code == 0, done.stdout
    assert re.search(r"^ok     store +unix://.*Valkey", done.stdout.decode(), re.MULTILINE)


def test_a_failed_check_is_the_exit_status(tmp_path: Path) -> None:
    done = carry("check", "--data-dir", tmp_path / "new", "--models", tmp_path)
    assert done.exit_code == 1
    assert f"failed models       {tmp_path}: expected a model" in done.stdout.decode()
    assert "ok     store" in done.stdout.decode()
    assert not list(tmp_path.iterdir())
    done = carry("check", CARRY_TIMEOUT_S="400")
    assert done.exit_code == 1
    assert done.stdout.startswith(b"failed settings     CARRY_MAX_TIMEOUT_S: expected at least")


@pytest.mark.parametrize(
    ("modules", "setting", "message"),
    [
        ("GRPC_MODULES", {"grpc_port": 0}, r"CARRY_GRPC_PORT .* 'carry\[grpc\]'"),
        ("TRACING_MODULES", {"tracing": True}, r"CARRY_TRACING .* 'carry\[otel\]'"),
    ],
)
def test_packages_that_a_setting_needs_are_named(
    monkeypatch: pytest.MonkeyPatch, modules: str, setting: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(f"service.start_checks.{modules}", ("redis", "missing_package.module"))
    check_packages(Settings.load())
    with pytest.raises(CannotServeError, match=message):
        check_packages(Settings.load(setting))


def test_a_damaged_model_fails(check: Check, artifact: Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.path, tmp_path / "m")
    weights = next((tmp_path / "m").glob("weights*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    results = check(models_dir=tmp_path)
    assert failures(results) == ["models"]
    assert weights.name in results["models"][1]


def test_a_store_that_the_service_would_reject_fails(check: Check, server: RealServer) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            results = check()
        finally:
            client.config_set("maxmemory-policy", "noeviction")
        assert failures(results) == ["store"]
        assert "CARRY_ALLOW_EVICTION" in results["store"][1]
        client.set("carry:meta", '{"format": 1, "partitions": 64}')
        assert "set CARRY_PARTITIONS to 64" in check()["store"][1]
        assert failures(check(partitions=64)) == []
    away = f"unix://{server.socket}-away"
    assert failures(check(redis_url=away, store_wait_s=0.2)) == ["store"]
    missing = "rediss://127.0.0.1:1?ssl_ca_certs=/missing.crt"
    assert "/missing.crt does not exist: ssl_ca_certs" in check(redis_url=missing)["store"][1]


def test_permissions_of_the_user_are_checked(check: Check, server: RealServer) -> None:
    url = server.url.replace("unix://", "unix://carry:hush@")
    with server.client() as client:
        try:
            permit(client)
            assert check(redis_url=url)["permissions"] == ALL_PERMITTED
            permit(client, "+dbsize", "+subscribe")
            ok, detail = check(redis_url=url)["permissions"]
            assert ok
            assert "DBSIZE (for the number of streams in the metrics)" in detail
            assert "SUBSCRIBE (for watching streams)" in detail
            permit(client, "+pexpire")
            results = check(redis_url=url)
            assert failures(results) == ["permissions"]
            assert "may not run PEXPIRE (for every chunk): deploy" in results["permissions"][1]
            permit(client, "~carry*")
            results = check(redis_url=url)
            assert failures(results) == ["store", "permissions", "access"]
            assert "GETRANGE" in results["permissions"][1]
            permit(client, "+eval")
            assert "'eval'" in check(redis_url=url)["permissions"][1]
            assert client.dbsize() == 0
        finally:
            client.execute_command("ACL", "DELUSER", "carry")


def test_the_servers_of_a_cluster_are_checked(check: Check, shared_cluster: Cluster) -> None:
    emptied(shared_cluster)
    results = check(redis_url=shared_cluster.url)
    assert failures(results) == []
    assert results["permissions"] == ALL_PERMITTED
    with shared_cluster.client() as client:
        assert client.dbsize() == 0


def test_an_address_that_is_open_to_others_fails(check: Check, tmp_path: Path) -> None:
    embedded = {"redis_url": None, "data_dir": tmp_path / "new"}
    for store in ({}, embedded):
        results = check(host="0.0.0.0", **store)
        assert failures(results) == ["access"]
        assert "CARRY_INSECURE=1" in results["access"][1]
        assert failures(check(host="0.0.0.0", require_keys=True, **store)) == []
    assert "192.0.2.1" in check(host="192.0.2.1")["access"][1]
    (tmp_path / "appendonlydir").mkdir()
    results = check(host="0.0.0.0", redis_url=None, data_dir=tmp_path)
    assert "may have access keys" in results["access"][1]
    results = check(**embedded, durability="replicated")
    assert failures(results) == ["store"]
    assert "CARRY_DURABILITY=fsync" in results["store"][1]


def test_periods_of_the_shutdown_are_compared(check: Check) -> None:
    times = {"drain_s": 20, "lame_duck_s": 10, "keep_alive_s": 65}
    assert "longer than 37 s" in check(**times)["shutdown"][1]
    assert failures(check(38, 60, **times)) == []
    assert "got 37 s" in check(37, **times)["shutdown"][1]
    assert "longer than the proxy's 65 s" in check(38, 65, **times)["shutdown"][1]


def test_permissions_are_those_of_the_access_list_and_the_page() -> None:
    cluster = StoreSettings("redis+cluster://a", durability=Durability.FSYNC)
    commands = [each.split() for each in sum(required_commands(cluster).values(), ())]
    names = {" ".join(each[: 1 + (each[0] in ("CONFIG", "CLUSTER", "XINFO"))]) for each in commands}
    allowed = {each[1:].upper().replace("|", " ") for each in PERMISSIONS if each[0] == "+"}
    assert names == allowed
    page = (ROOT / "docs" / "how-to" / "run-a-store.md").read_text()
    table = page[page.index("The user needs these commands") :].partition("\n##")[0]
    assert names == set(re.findall(r"`([A-Z]+(?: [A-Z]+)?)`", table))
    assert len(REQUIRED_COMMANDS) == len(required_commands(cluster))
