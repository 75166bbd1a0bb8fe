"""How a store is reached and what it keeps; plain values, read once at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from service.store.redis.keys import KeySpace

CLUSTER_SCHEMES: Final = ("redis+cluster", "rediss+cluster")
REDIS_SCHEMES: Final = ("redis", "rediss", "unix", *CLUSTER_SCHEMES)


class Durability(StrEnum):
    """When a commit counts as done."""

    MEMORY = "memory"
    FSYNC = "fsync"
    REPLICATED = "replicated"


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Settings of a store.

    Attributes:
        url: `redis://`, `rediss://` (TLS) or `unix://` address of the server; of a cluster
            `redis+cluster://` or `rediss+cluster://`, with some of its nodes.
        namespace: first part of every key; give each service on a shared server its own.
        partitions: P, fixed when the store is made; see `keys`.
        idle_ttl_ms: a stream is forgotten this long after its last commit; 0 never.
        reply_ttl_ms: how long the last reply is kept for retries; 0 keeps none.
        reply_max_bytes: larger replies are not kept.
        tombstone_ttl_ms: how long a tombstone is kept; longer than the network may delay bytes.
        allow_eviction: accept a server that may evict keys when its memory is full.
        wait_s: how long a call waits for a server that is away.
        max_connections: connections for everything but commits, which have their own.
        scan_count: keys the server looks at per step of a listing.
        durability: when a commit counts as done: the server has it, its disk has it, or so many
            replicas do.
        replicas: how many, with `replicated`.
    """

    url: str = field(repr=False)
    namespace: str = "carry"
    partitions: int = 1024
    idle_ttl_ms: int = 0
    reply_ttl_ms: int = 600_000
    reply_max_bytes: int = 65_536
    tombstone_ttl_ms: int = 600_000
    allow_eviction: bool = False
    wait_s: float = 10.0
    max_connections: int = 16
    scan_count: int = 1000
    durability: Durability = Durability.MEMORY
    replicas: int = 1

    def __post_init__(self) -> None:
        KeySpace(self.namespace, self.partitions)
        for name in ("idle_ttl_ms", "reply_ttl_ms", "reply_max_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("tombstone_ttl_ms", "wait_s", "max_connections", "scan_count", "replicas"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")

    @property
    def is_cluster(self) -> bool:
        """Whether the address is a cluster's."""
        return self.url.partition("://")[0] in CLUSTER_SCHEMES

    @property
    def keys(self) -> KeySpace:
        """The names of the keys."""
        return KeySpace(self.namespace, self.partitions)
