"""Start-up checks: `carry serve` runs those that it needs, `carry check` all of them.

Each returns what it found, or raises an error with the reason and its remedy. `run_checks` listens
on no port and writes nothing to the store; an embedded Valkey is not started.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

import structlog

from models.errors import ModelsError
from service.access.key_cache import requires_keys
from service.core.errors import CarryError, OperatorError, StoreRefused, StoreUnavailable
from service.model_files import open_models
from service.server.connections import CHECK_INTERVAL_S
from service.server.worker import LATE_S, Periods
from service.server.workers import KILL_MARGIN_S
from service.settings import Settings
from service.store.embedded import find_running, server_binary
from service.store.redis.capabilities import RedisStoredKeys
from service.store.redis.redis_store import open_router
from service.store.redis.router import Router
from service.store.redis.server_checks import ALWAYS, check_servers, find_missing_permissions

PortKind = Literal["http", "grpc", "admin"]
PORT_OPTIONS: Final[Mapping[PortKind, str]] = {
    "http": "carry serve --port ",
    "grpc": "carry serve --grpc-port ",
    "admin": "CARRY_ADMIN_PORT=",
}
"""How to set each port, followed by its number."""

GRPC_MODULES = ("google.protobuf", "grpc_health", "grpc_reflection", "hpack")
TRACING_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")

KeyRecords = tuple[bytes, Mapping[str, bytes]]
"""The version and the records of the access keys."""

EXPECTED: Final = (OperatorError, ModelsError, CarryError, OSError)

log = structlog.get_logger(__name__)


class CannotServeError(OperatorError):
    """The service cannot start."""


class CheckResult(NamedTuple):
    """The result of one check; `detail` says what it found, or why it failed."""

    name: str
    ok: bool
    detail: str


def run_checks(
    settings: Settings, grace_s: float | None, proxy_idle_s: float | None
) -> Iterator[CheckResult]:
    """Run every check.

    Args:
        grace_s: time after which a supervisor kills the service, if that is known.
        proxy_idle_s: time for which a proxy keeps an idle connection to the service, if known.
    """
    yield _run("packages", lambda: check_packages(settings))
    yield _run("models", lambda: _check_models(settings))
    if settings.store.redis_url is None:
        yield _run("store", lambda: check_embedded(settings))
        url = find_running(settings.store.data_dir)
        settings = settings.changed(redis_url=url)
        if url is None:
            # a new store has no keys; those of an old one are unknown while it does not run
            is_old = (settings.store.data_dir / "appendonlydir").exists()
            yield _run("access", lambda: _check_access(settings, None if is_old else (b"", {})))
    if settings.store.redis_url is not None:
        yield from asyncio.run(_check_store(settings))
    yield _run("shutdown", lambda: _check_shutdown(settings, grace_s, proxy_idle_s))


def _run(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, check())
    except EXPECTED as error:
        return _failure(name, error)


def _failure(name: str, error: Exception) -> CheckResult:
    return CheckResult(name, False, error.detail if isinstance(error, CarryError) else str(error))


def check_packages(settings: Settings) -> str:
    """Check that the packages of gRPC and of traces are installed, if the settings need them."""
    needed = {
        "CARRY_GRPC_PORT": (settings.v2.grpc_port is not None, GRPC_MODULES, "grpc"),
        "CARRY_TRACING": (settings.telemetry.tracing, TRACING_MODULES, "otel"),
    }
    for variable, (is_needed, modules, extra) in needed.items():
        try:
            is_installed = not is_needed or all(map(importlib.util.find_spec, modules))
        except ModuleNotFoundError:
            is_installed = False
        if not is_installed:
            raise CannotServeError(
                f"{variable} needs packages that are not installed: pip install 'carry[{extra}]'"
            )
    return "all that the settings need are installed"


def _check_models(settings: Settings) -> str:
    return ", ".join(
        f"{model.name} {model.version} on {model.runtime.name}"
        for model in open_models(settings.models)
    )


def check_embedded(settings: Settings) -> str:
    """Check that an embedded Valkey can be started, and be as durable as the settings require."""
    if settings.store.durability == "replicated":
        raise CannotServeError(
            "CARRY_DURABILITY=replicated needs a store that has replicas: set "
            "CARRY_REDIS_URL, or CARRY_DURABILITY=fsync for the service's own Valkey"
        )
    server_binary()
    folder = settings.store.data_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreRefused(
            f"{folder} cannot be written; set CARRY_DATA_DIR to a folder of this user, or "
            "CARRY_REDIS_URL to a Redis or Valkey"
        )
    return f"an embedded Valkey in {settings.store.data_dir}"


async def _check_store(settings: Settings) -> list[CheckResult]:
    """Check TLS files, servers, the permissions of their user, and who may send requests."""
    results, name = list[CheckResult](), "store"
    try:
        router = open_router(settings.store)
        try:
            await router.start()
            for name, check in _STORE_CHECKS.items():
                try:
                    results.append(CheckResult(name, True, await check(router, settings)))
                except StoreUnavailable:
                    raise
                except EXPECTED as error:
                    results.append(_failure(name, error))
        finally:
            await router.close()
    except CarryError as error:
        results.append(_failure(name, error))
    return results


async def _check_servers(router: Router, settings: Settings) -> str:
    servers = await check_servers(router, initialise=False)
    return f"{router.redacted_url}: {servers}"


async def _check_permissions(router: Router, settings: Settings) -> str:
    missing = await find_missing_permissions(router)
    lines = [f"{', '.join(names)} (for {purpose})" for purpose, names in missing.items()]
    if ALWAYS in missing:
        raise StoreRefused(
            f"the store's user may not run {'; '.join(lines)}: deploy/redis/users.acl has what it "
            "needs"
        )
    return f"all but {'; '.join(lines)}" if lines else "the store's user may run every command"


async def _check_stored_access(router: Router, settings: Settings) -> str:
    return _check_access(settings, await RedisStoredKeys(router).read(None))


_STORE_CHECKS: Final = {
    "store": _check_servers,
    "permissions": _check_permissions,
    "access": _check_stored_access,
}


def _check_access(settings: Settings, stored: KeyRecords | None) -> str:
    """Check the address to listen on, and that it is not open to others by mistake."""
    with bind_port(settings.http.host, 0) as unused:
        host = unused.getsockname()[0]
    if stored is None:
        return f"{host}; the embedded Valkey, which may have access keys, does not run"
    if requires_keys(settings.access.require_keys, stored):
        return f"{host}; requests need an access key"
    may_be_open(settings, host)
    return f"{host}; requests need no access key"


def may_be_open(settings: Settings, host: str) -> bool:
    """Whether a service without access keys may answer requests without one.

    Args:
        host: the address that it listens on.

    Raises:
        CannotServeError: it would be open to others.
    """
    if settings.access.require_keys:
        return False
    if ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        return True
    if not settings.access.insecure:
        raise CannotServeError(
            f"{host} is reachable from other machines, and there is no access key: whoever reaches "
            "it could read and delete every stream. Make one with `carry keys create NAME`, or set "
            "CARRY_REQUIRE_KEYS=1 to make it later; or, behind something that checks access, set "
            "CARRY_INSECURE=1"
        )
    log.warning(
        "insecure",
        host=host,
        reason="there is no access key: whoever reaches the port may do everything",
    )
    return True


def periods_of(settings: Settings) -> Periods:
    """The periods of a worker's graceful shutdown."""
    return Periods(
        lame_duck_s=settings.processes.lame_duck_s,
        # an idle connection is closed at the second check after its time
        retire_s=settings.connections.keep_alive_s + 2 * CHECK_INTERVAL_S,
        drain_s=settings.processes.drain_s + LATE_S,
    )


def _check_shutdown(settings: Settings, grace_s: float | None, proxy_idle_s: float | None) -> str:
    """Check that the service ends its shutdown before it is killed, and its idle connections after
    the proxy."""
    periods = periods_of(settings)
    needed_s = periods.lame_duck_s + periods.drain_s + KILL_MARGIN_S
    if grace_s is not None and grace_s <= needed_s:
        raise CannotServeError(
            f"expected a grace period longer than {needed_s:g} s, got {grace_s:g} s: "
            "CARRY_LAME_DUCK_S plus CARRY_DRAIN_S plus seven seconds, or accepted requests fail. "
            "Raise it (terminationGracePeriodSeconds, TimeoutStopSec), or lower one of the settings"
        )
    keep_alive_s = settings.connections.keep_alive_s
    if proxy_idle_s is not None and keep_alive_s <= proxy_idle_s:
        raise CannotServeError(
            f"expected CARRY_KEEP_ALIVE_S longer than the proxy's {proxy_idle_s:g} s, got "
            f"{keep_alive_s:g} s: the proxy would send requests on connections that the service "
            "closes"
        )
    return (
        f"needs a grace period longer than {needed_s:g} s, and a proxy with an idle timeout below "
        f"{keep_alive_s:g} s"
    )


@contextmanager
def bind_port(host: str, port: int, kind: PortKind = "http") -> Iterator[socket.socket]:
    """A socket for listening, bound before models are loaded; an error says how to set the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(listener, host, port, kind)
        listener.set_inheritable(True)
        yield listener


@contextmanager
def reserve_port(host: str, port: int, kind: PortKind) -> Iterator[int]:
    """Reserve a second port, and yield it: each worker listens on it by itself (SO_REUSEPORT).

    Without SO_REUSEPORT a port that another service listens on is an error, as it should be; so it
    is bound in that way first.
    """
    with bind_port(host, port, kind) as unused:
        host, port = unused.getsockname()[:2]
    with socket.socket(unused.family, socket.SOCK_STREAM) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # fails on this service's own HTTP port, which is bound and not yet listened on
        _bind(reserved, host, port, kind)
        log.info(f"{kind}_port_bound", host=host, port=port)
        yield port


def _bind(listener: socket.socket, host: str, port: int, kind: PortKind) -> None:
    try:
        listener.bind((host, port))
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            setting = "CARRY_ADMIN_HOST" if kind == "admin" else "CARRY_HOST"
            remedy = f"set {setting} to an address of this machine, for example 127.0.0.1"
        else:
            remedy = f"choose another port, for example `{PORT_OPTIONS[kind]}{port + 1}`"
            remedy += f" or `make run PORT={port + 1}`" if kind == "http" else ""
        raise CannotServeError(
            f"cannot listen on {host}:{port} ({error.strerror}); {remedy}"
        ) from error
