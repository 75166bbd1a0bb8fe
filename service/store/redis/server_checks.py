"""What servers must be before streams are entrusted to them; read at start.

Refused: a server that may evict keys when its memory is full (a stream would silently
start over), a node of a cluster under the address of a single server and the other way round, a
store that was made with another number of partitions (its streams would not be found), and with
`fsync` a server whose disk has a write later than it is acknowledged.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

import structlog

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.redis.redis_server import Server
from service.store.redis.router import Link
from service.store.redis.store_request import Answer, Request
from service.store.settings import Durability, StoreSettings

META_FORMAT = 1
PROBE_S: Final = 1.0

_FSYNC: Final = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}

log = structlog.get_logger(__name__)


async def check_servers(link: Link, settings: StoreSettings) -> str:
    """Check every server and set the store up where it is new.

    Returns:
        The servers in words, for logs: name, version and eviction policy.

    Raises:
        StoreUnavailable: no server answers, or not the one that stores `meta`.
        StoreRefused: a server is not set up as required.
    """
    layout = await link.layout()
    checks = [_check_server(server, settings) for server in layout.servers]
    words: list[str] = []
    away: list[StoreUnavailable] = []
    for found in await asyncio.gather(*checks, return_exceptions=True):
        if isinstance(found, StoreUnavailable):
            away.append(found)
        elif isinstance(found, BaseException):
            raise found
        else:
            words.append(found)
    if not words:
        raise away[0]
    for error in away:
        # readiness checks it once it is back
        log.warning("primary_away", store=link.where, reason=error.detail)
    for server in link.others():
        try:
            await server.try_once(PROBE_S, "PING")
        except StoreUnavailable as error:
            log.warning("replica_away", store=server.where, reason=error.detail)
        else:
            await _check_server(server, settings)
    await _check_partitions(link, settings)
    return "; ".join(dict.fromkeys(words))


async def _check_server(server: Server, settings: StoreSettings) -> str:
    facts = read_info(await server.read("INFO"))
    if (facts.get("cluster_enabled") == "1") != settings.is_cluster:
        what, scheme = ("a single server", "redis://")
        if not settings.is_cluster:
            what, scheme = ("a node of a cluster", "redis+cluster://")
        raise StoreRefused(
            f"the store at {server.where} is {what}, whose address begins with {scheme}"
        )
    policy = await _eviction_policy(server, facts)
    check_policy(server, policy, settings)
    if facts.get("aof_enabled") == "0" and not settings.allow_eviction:
        log.warning(
            "append_only_file_off",
            store=server.where,
            risk="a restart of the server loses what was written since its last snapshot",
        )
    if settings.durability is Durability.FSYNC:
        check_fsync(server, await fsync_options(server))
    if settings.durability is Durability.REPLICATED and facts.get("role") == "master":
        replicas = online_replicas(facts)
        if replicas < settings.replicas:
            # Not refused: a replica that is down at a restart must not keep readers out too.
            log.warning(
                "replicas_missing", store=server.where, found=replicas, expected=settings.replicas
            )
    name = "Valkey" if "valkey_version" in facts else "Redis"
    version = facts.get("valkey_version") or facts.get("redis_version", "of unknown version")
    return f"{name} {version}, {policy}"


def check_policy(server: Server, policy: str, settings: StoreSettings) -> None:
    """Refuse a server that may evict streams.

    Raises:
        StoreRefused: its `maxmemory-policy` evicts, and the settings do not allow it.
    """
    if policy != "noeviction" and not settings.allow_eviction:
        raise StoreRefused(
            f"the store at {server.where} has maxmemory-policy {policy}, expected noeviction: "
            "under another policy streams are lost and silently start over. Set it to "
            "noeviction, or CARRY_ALLOW_EVICTION=true to take the risk"
        )


async def _eviction_policy(server: Server, facts: dict[str, str]) -> str:
    """By INFO; CONFIG, which hosted servers often forbid, only where that does not say it."""
    if "maxmemory_policy" in facts:
        return facts["maxmemory_policy"]
    reply = await server.read("CONFIG", "GET", "maxmemory-policy")
    return reply[1].decode() if reply else "unknown"


async def fsync_options(server: Server) -> dict[str, str]:
    """Read the server's options that `check_fsync` checks.

    Raises:
        StoreUnavailable: it does not answer.
        StoreRefused: it does not let its configuration be read.
    """
    found: dict[str, str] = {}
    for name in _FSYNC:
        try:
            reply = await server.read("CONFIG", "GET", name)
        except StoreRefused as error:
            raise StoreRefused(
                f"CARRY_DURABILITY=fsync has to read the server's configuration: {error.detail}"
            ) from error
        found[name] = reply[1].decode() if reply else "unknown"
    return found


def check_fsync(server: Server, found: dict[str, str]) -> None:
    """Refuse a server that acknowledges writes before they are synced to disk.

    Raises:
        StoreRefused: naming the options that are wrong.
    """
    wrong = {name: value for name, value in found.items() if value != _FSYNC[name]}
    if wrong:
        got = ", ".join(f"{name} {value}" for name, value in wrong.items())
        expected = ", ".join(f"{name} {_FSYNC[name]}" for name in wrong)
        raise StoreRefused(
            f"the store at {server.where} has {got}; CARRY_DURABILITY=fsync expects {expected}"
        )


async def _check_partitions(link: Link, settings: StoreSettings) -> None:
    meta = settings.keys.meta
    ours = {"format": META_FORMAT, "partitions": settings.partitions}
    slot = link.slot(meta)
    stored: bytes | None = None
    for command in (("SET", meta, json.dumps(ours), "NX"), ("GET", meta)):
        (outcome,) = await link.ask(Request.of(*command, slot=slot))
        if isinstance(outcome, CarryError):
            raise outcome
        if not isinstance(outcome, Answer):
            raise StoreUnavailable(f"the store does not answer: {outcome}") from outcome
        stored = outcome.value
    try:
        found = json.loads(stored or b"")
        same = found["format"] == META_FORMAT and found["partitions"] == settings.partitions
    except (TypeError, ValueError, KeyError) as error:
        raise StoreRefused(
            f"key {meta!r} of the store at {link.where} is not one that Carry wrote: {stored!r}"
        ) from error
    if not same:
        raise StoreRefused(
            f"the store at {link.where} was made with {found}, expected {ours}; set "
            f"CARRY_PARTITIONS to {found['partitions']}, or use another CARRY_NAMESPACE"
        )


def online_replicas(facts: dict[str, str]) -> int:
    """Count the replicas that are connected and in sync."""
    return sum(
        name.startswith("slave") and "state=online" in value for name, value in facts.items()
    )


def read_info(reply: bytes) -> dict[str, str]:
    """Parse the reply to INFO."""
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
