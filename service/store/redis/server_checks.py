"""Checks of the servers' configuration, at the start and for readiness.

The service does not start with a server that may evict keys when its memory is full (a stream
would silently start over), with a cluster node under the address of a single server or the
reverse, with a store that was created with another number of partitions (its streams would not be
found), and with `fsync` durability, with a server that acknowledges writes before they are synced.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Final, NamedTuple

import structlog

from service.core.errors import StoreRefused, StoreUnavailable
from service.store.redis.outcomes import read_value
from service.store.redis.pipelined_connection import RedisServer
from service.store.redis.router import Router
from service.store.settings import Durability, StoreSettings

META_FORMAT = 1
PROBE_TIMEOUT_S: Final = 1.0
"""Timeout of each check of a server."""

_FSYNC_OPTIONS: Final = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
}

ALWAYS: Final = "every chunk"
REQUIRED_COMMANDS: Final = {
    ALWAYS: (
        *("INFO", "PING", "SCAN 0", "GET {key}", "SET {key} v", "MGET {key}"),
        *("GETRANGE {key} 0 1", "SETRANGE {key} 0 v", "EXISTS {key}", "DEL {key}", "UNLINK {key}"),
        *("PEXPIRE {key} 1", "HGET {key} f", "HGETALL {key}"),
        *("EVAL s 1 {key}", "EVALSHA s 1 {key}"),
    ),
    "the number of streams in the metrics": ("DBSIZE", "RANDOMKEY"),
    "quotas and `carry keys`": ("HSET {key} f v", "HDEL {key} f", "HLEN {key}", "HSCAN {key} 0"),
    "rates of access keys": ("TIME", "HSET {key} f v", "HDEL {key} f"),
    "the history of streams": (
        *("HSET {key} f v", "HDEL {key} f", "HKEYS {key}"),
        *("RPUSH {key} v", "LRANGE {key} 0 1", "LTRIM {key} 0 1", "LLEN {key}", "LINDEX {key} 0"),
    ),
    "open alarms": (
        "ZADD {key} 1 s",
        "ZREM {key} s",
        "ZREMRANGEBYRANK {key} 0 0",
        "ZREVRANGEBYSCORE {key} 1 0",
    ),
    "the topics of consumers": (
        *("TYPE {key}", "HVALS {key}", "HMGET {key} f", "XINFO GROUPS {key}", "XLEN {key}"),
        *("XPENDING {key} g", "XRANGE {key} - +", "XREVRANGE {key} + -"),
    ),
    "watching streams": ("SUBSCRIBE {channel}", "UNSUBSCRIBE {channel}", "PUBLISH {channel} m"),
}
"""Commands that the service sends to any store, as examples, by what needs them."""

_FIND_MISSING_PERMISSIONS: Final = """
if not redis.acl_check_cmd then
    return redis.error_reply('expected Redis 7 or later, or Valkey')
end
local missing = {}
for _, command in ipairs(ARGV) do
    local words = {}
    for word in string.gmatch(command, '%S+') do
        words[#words + 1] = word
    end
    if not redis.acl_check_cmd(unpack(words)) then
        missing[#missing + 1] = command
    end
end
return missing
"""

log = structlog.get_logger(__name__)


class ServerFault(NamedTuple):
    """Why a server does not meet the settings.

    Attributes:
        is_unsafe: whether acknowledged chunks could be lost silently.
    """

    detail: str
    is_unsafe: bool = False


async def check_servers(router: Router, *, initialise: bool = True) -> str:
    """Check every server.

    Args:
        initialise: whether to write the format and the number of partitions to a new store.

    Returns:
        A description of the servers for logs: name, version and eviction policy.

    Raises:
        StoreUnavailable: no server answers, or the one that stores `meta` does not.
        StoreRefused: a server is not configured as required.
    """
    layout, settings = await router.layout(), router.settings
    checks = [_check_server(server, settings) for server in layout.servers]
    descriptions: list[str] = []
    unavailable: list[StoreUnavailable] = []
    for result in await asyncio.gather(*checks, return_exceptions=True):
        if isinstance(result, StoreUnavailable):
            unavailable.append(result)
        elif isinstance(result, BaseException):
            raise result
        else:
            descriptions.append(result)
    if not descriptions:
        raise unavailable[0]
    for error in unavailable:
        # Readiness checks it once it is available again.
        log.warning("primary_unavailable", store=router.redacted_url, reason=error.detail)
    for server in router.replicas():
        try:
            await server.execute_once(PROBE_TIMEOUT_S, "PING")
        except StoreUnavailable as error:
            log.warning("replica_unavailable", store=server.redacted_url, reason=error.detail)
        else:
            await _check_server(server, settings)
    await _check_partitions(router, initialise=initialise)
    telemetry = router.telemetry
    telemetry.is_up = True
    telemetry.servers_up, telemetry.servers_down = len(descriptions), len(unavailable)
    return "; ".join(dict.fromkeys(descriptions))


async def _check_server(server: RedisServer, settings: StoreSettings) -> str:
    info = parse_info(await server.read("INFO"))
    if (info.get("cluster_enabled") == "1") != settings.is_cluster:
        kind, scheme = ("a single server", "redis://")
        if not settings.is_cluster:
            kind, scheme = ("a node of a cluster", "redis+cluster://")
        raise StoreRefused(
            f"the store at {server.redacted_url} is {kind}, whose address begins with {scheme}"
        )
    fault = await find_fault(server, info, settings)
    if fault is not None and fault.is_unsafe:
        raise StoreRefused(fault.detail)
    if fault is not None:
        # an unavailable replica must not keep the service from starting
        log.warning("replicas_missing", store=server.redacted_url, reason=fault.detail)
    if info.get("aof_enabled") == "0" and not settings.allow_eviction:
        log.warning(
            "append_only_file_off",
            store=server.redacted_url,
            risk="a restart of the server loses what was written since its last snapshot",
        )
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "of unknown version")
    aof = "with" if info.get("aof_enabled") == "1" else "without"
    return f"{name} {version}, {info.get('maxmemory_policy')}, {aof} an append-only file"


async def find_fault(
    server: RedisServer, info: Mapping[str, str], settings: StoreSettings
) -> ServerFault | None:
    """Find why a server does not meet the settings; what is unsafe comes first."""
    policy = info.get("maxmemory_policy", "unknown")
    if policy != "noeviction" and not settings.allow_eviction:
        return ServerFault(
            f"the store at {server.redacted_url} has maxmemory-policy {policy}, expected "
            "noeviction: under another policy streams are lost and silently start over. Set it to "
            "noeviction, or CARRY_ALLOW_EVICTION=true to accept the risk",
            is_unsafe=True,
        )
    if settings.durability is Durability.FSYNC:
        wrong: dict[str, str] = {}
        for name, expected in _FSYNC_OPTIONS.items():
            try:
                reply = await server.read("CONFIG", "GET", name)
            except StoreRefused as error:
                reason = "CARRY_DURABILITY=fsync has to read the server's configuration"
                return ServerFault(f"{reason}: {error.detail}", is_unsafe=True)
            value = reply[1].decode() if reply else "unknown"
            if value != expected:
                wrong[name] = value
        if wrong:
            got = ", ".join(f"{name} {value}" for name, value in wrong.items())
            expected = ", ".join(f"{name} {_FSYNC_OPTIONS[name]}" for name in wrong)
            return ServerFault(
                f"the store at {server.redacted_url} has {got}; CARRY_DURABILITY=fsync expects "
                f"{expected}",
                is_unsafe=True,
            )
    if settings.durability is Durability.REPLICATED and info.get("role") == "master":
        replicas = sum(
            name.startswith("slave") and "state=online" in value for name, value in info.items()
        )
        if replicas < settings.replicas:
            return ServerFault(
                f"{server.redacted_url} has {replicas} replicas, expected {settings.replicas}"
            )
    return None


async def _check_partitions(router: Router, *, initialise: bool) -> None:
    """Compare the `meta` key with the settings; write that of a new store."""
    settings, key = router.settings, router.settings.keys.meta
    expected = {"format": META_FORMAT, "partitions": settings.partitions}
    value: bytes | None = read_value(await router.execute_one("GET", key))
    if value is None:
        # only a new store is written: a full one is started on, and read
        if not initialise:
            return
        read_value(await router.execute_one("SET", key, json.dumps(expected), "NX"))
        value = read_value(await router.execute_one("GET", key))
    try:
        stored = json.loads(value or b"")
        matches = stored["format"] == META_FORMAT and stored["partitions"] == settings.partitions
    except (TypeError, ValueError, KeyError) as error:
        raise StoreRefused(
            f"key {key!r} of the store at {router.redacted_url} was not written by Carry: {value!r}"
        ) from error
    if not matches:
        raise StoreRefused(
            f"the store at {router.redacted_url} was created with {stored}, expected {expected}; "
            f"set CARRY_PARTITIONS to {stored['partitions']}, or use another CARRY_NAMESPACE"
        )


async def find_missing_permissions(router: Router) -> dict[str, list[str]]:
    """Find the commands that the store's user may not run, by what needs them; runs none of them.

    Raises:
        StoreUnavailable, StoreRefused: a server does not answer, or the user may not run scripts.
    """
    settings = router.settings
    key, channel = settings.keys.probe(0, "permissions"), f"{settings.namespace}:watched"
    needed = {
        command.format(key=key, channel=channel): purpose
        for purpose, commands in required_commands(settings).items()
        for command in commands
    }
    missing: dict[str, list[str]] = {}
    for server in (await router.layout()).servers:
        for command in await server.read("EVAL", _FIND_MISSING_PERMISSIONS, 0, *needed):
            text = command.decode()
            words = text.split()[: 2 if text.startswith(("CONFIG", "CLUSTER")) else 1]
            names = missing.setdefault(needed[text], [])
            names += [" ".join(words)] * (" ".join(words) not in names)
    return missing


def required_commands(settings: StoreSettings) -> dict[str, tuple[str, ...]]:
    """The commands that the service sends, as examples, by what needs them."""
    commands = dict(REQUIRED_COMMANDS)
    if settings.durability is not Durability.MEMORY:
        commands[ALWAYS] += ("WAIT 0 0", "CONFIG GET appendfsync")
    if settings.is_cluster:
        commands[ALWAYS] += ("CLUSTER SLOTS", "ASKING")
    return commands


def memory_ratio(info: Mapping[str, str]) -> float:
    """The share of `maxmemory` that is used, as the server computes it; 0 without a limit."""
    limit = int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    return used / limit if limit else 0.0


def parse_info(reply: bytes) -> dict[str, str]:
    """Parse the reply to INFO."""
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
