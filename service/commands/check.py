"""`carry check`: the start-up checks, without serving.

It listens on no port and writes nothing to the store; an embedded Valkey is not started. Each check
is a line with what it found, or with the reason of a failure and its remedy.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple, ParamSpec

from models.errors import ModelsError
from service.access.key_cache import requires_keys
from service.build import open_models
from service.commands.serve import (
    CannotServeError,
    bind_port,
    check_embedded,
    check_packages,
    may_be_open,
    periods_of,
)
from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.engine.runtimes.loading import RuntimeUnavailableError
from service.server.workers import KILL_MARGIN_S
from service.settings import Settings
from service.store.embedded import find_running, server_binary
from service.store.redis.capabilities import RedisStoredKeys
from service.store.redis.redis_store import open_router
from service.store.redis.router import Router
from service.store.redis.server_checks import ALWAYS, check_servers, find_missing_permissions

P = ParamSpec("P")
KeyRecords = tuple[bytes, Mapping[str, bytes]]
"""The version and the records of the access keys."""

EXPECTED: Final = (CannotServeError, ModelsError, CarryError, RuntimeUnavailableError, OSError)


class Result(NamedTuple):
    """The result of one check; `detail` says what it found, or why it failed."""

    name: str
    ok: bool
    detail: str


def run_checks(
    settings: Settings, grace_s: float | None, proxy_idle_s: float | None
) -> Iterator[Result]:
    """Run every start-up check.

    Args:
        grace_s: time after which a supervisor kills the service, if that is known.
        proxy_idle_s: time for which a proxy keeps an idle connection to the service, if known.
    """
    yield _run("packages", _check_packages, settings)
    yield _run("models", _check_models, settings)
    if settings.store.redis_url is None:
        yield _run("store", _check_embedded, settings)
        url = find_running(settings.store.data_dir)
        settings = settings.changed(redis_url=url)
        if url is None:
            yield _run("access", _check_access, settings, _find_keys_without_server(settings))
    if settings.store.redis_url is not None:
        yield from asyncio.run(_check_store(settings))
    yield _run("shutdown", _check_shutdown, settings, grace_s, proxy_idle_s)


def _run(name: str, check: Callable[P, str], *arguments: P.args, **options: P.kwargs) -> Result:
    try:
        return Result(name, True, check(*arguments, **options))
    except EXPECTED as error:
        return _failure(name, error)


def _failure(name: str, error: BaseException) -> Result:
    return Result(name, False, error.detail if isinstance(error, CarryError) else str(error))


def _check_packages(settings: Settings) -> str:
    check_packages(settings)
    return "all that the settings need are installed"


def _check_models(settings: Settings) -> str:
    return ", ".join(
        f"{model.name} {model.version} on {model.runtime.name}"
        for model in open_models(settings.models)
    )


def _check_embedded(settings: Settings) -> str:
    """Check that an embedded Valkey could be started."""
    check_embedded(settings)
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


def _find_keys_without_server(settings: Settings) -> KeyRecords | None:
    """Find the access keys of an embedded Valkey that does not run: none if it is new, None if they
    are unknown."""
    return None if (settings.store.data_dir / "appendonlydir").exists() else (b"", {})


async def _check_store(settings: Settings) -> list[Result]:
    """Check TLS files, servers, the permissions of their user, and who may send requests."""
    try:
        router = open_router(settings.store)
    except CarryError as error:
        return [_failure("store", error)]
    results, name = list[Result](), "store"
    checks = {
        name: _check_servers,
        "permissions": _check_permissions,
        "access": _check_stored_access,
    }
    try:
        await router.start()
        for name, check in checks.items():
            try:
                results.append(Result(name, True, await check(router, settings)))
            except StoreUnavailable:
                raise
            except EXPECTED as error:
                results.append(_failure(name, error))
    except (StoreUnavailable, StoreRefused) as error:
        results.append(_failure(name, error))
    finally:
        await router.close()
    return results


async def _check_servers(router: Router, settings: Settings) -> str:
    servers = await check_servers(router, settings.store, initialise=False)
    return f"{router.redacted_url}: {servers}"


async def _check_permissions(router: Router, settings: Settings) -> str:
    missing = await find_missing_permissions(router, settings.store)
    lines = [f"{', '.join(names)} (for {purpose})" for purpose, names in missing.items()]
    if ALWAYS in missing:
        raise StoreRefused(
            f"the store's user may not run {'; '.join(lines)}: deploy/redis/users.acl has what it "
            "needs"
        )
    return f"all but {'; '.join(lines)}" if lines else "the store's user may run every command"


async def _check_stored_access(router: Router, settings: Settings) -> str:
    return _check_access(settings, await RedisStoredKeys(router, settings.store.keys).read(None))


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
    if proxy_idle_s is not None and settings.connections.keep_alive_s <= proxy_idle_s:
        raise CannotServeError(
            f"expected CARRY_KEEP_ALIVE_S longer than the proxy's {proxy_idle_s:g} s, got "
            f"{settings.connections.keep_alive_s:g} s: the proxy "
            "would send requests on connections that the service closes"
        )
    return (
        f"needs a grace period longer than {needed_s:g} s, and a proxy with an idle timeout below "
        f"{settings.connections.keep_alive_s:g} s"
    )
