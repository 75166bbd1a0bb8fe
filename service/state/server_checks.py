"""What a store must be before streams are entrusted to it; read once, at start.

Refused: a server that may evict keys when its memory is full (a stream would begin anew in
silence), a node of a cluster (streams of one batch lie in different slots), and a store that
was made with another number of partitions (its streams would not be found).
"""

from __future__ import annotations

import json

from service.errors import StoreRefused
from service.state.link import ServerLink
from service.state.settings import StoreSettings

META_FORMAT = 1


async def check_server(link: ServerLink, settings: StoreSettings) -> str:
    """Check the server and set the store up where it is new.

    Returns:
        The server in words, for logs: its name, version and eviction policy.

    Raises:
        StoreUnavailable, StoreRefused: the server does not answer, or must not be used.
    """
    facts = _info(await link.read("INFO"))
    if facts.get("cluster_enabled") == "1":
        raise StoreRefused(
            f"the store at {link.where} is a node of a cluster; expected a single server"
        )
    policy = await _eviction_policy(link, facts)
    if policy != "noeviction" and not settings.allow_eviction:
        raise StoreRefused(
            f"the store at {link.where} has maxmemory-policy {policy}, expected noeviction: "
            "under another policy streams vanish and begin anew in silence. Set it to "
            "noeviction, or CARRY_ALLOW_EVICTION=true to take the risk"
        )
    await _check_partitions(link, settings)
    name = "Valkey" if "valkey_version" in facts else "Redis"
    version = facts.get("valkey_version") or facts.get("redis_version", "of unknown version")
    return f"{name} {version}, {policy}"


async def _eviction_policy(link: ServerLink, facts: dict[str, str]) -> str:
    """By INFO; CONFIG, which hosted servers often forbid, only where that does not say it."""
    if "maxmemory_policy" in facts:
        return facts["maxmemory_policy"]
    reply = await link.read("CONFIG", "GET", "maxmemory-policy")
    return reply[1].decode() if reply else "unknown"


async def _check_partitions(link: ServerLink, settings: StoreSettings) -> None:
    meta = settings.keys.meta
    ours = {"format": META_FORMAT, "partitions": settings.partitions}
    await link.read("SET", meta, json.dumps(ours), "NX")
    stored = await link.read("GET", meta)
    try:
        found = json.loads(stored)
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


def _info(reply: bytes) -> dict[str, str]:
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
