"""Settings of a state store: its address, timeouts, TTLs and durability."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from service.store.keys import KeySpace

CLUSTER_SCHEMES: Final = ("redis+cluster", "rediss+cluster")
SENTINEL_SCHEMES: Final = ("redis+sentinel", "rediss+sentinel")
REDIS_SCHEMES: Final = ("redis", "rediss", "unix", *CLUSTER_SCHEMES, *SENTINEL_SCHEMES)


class Durability(StrEnum):
    """Where a write must be before a commit is acknowledged."""

    MEMORY = "memory"
    FSYNC = "fsync"
    REPLICATED = "replicated"


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Settings of a store.

    Attributes:
        url: address of the server (`redis://`, `rediss://` for TLS, or `unix://`), of a cluster
            (`redis+cluster://` or `rediss+cluster://`) with some of its nodes, or of a primary
            behind Sentinels (`redis+sentinel://` or `rediss+sentinel://`, see `redis.sentinel`).
        namespace: prefix of every key; give each service on a shared server its own.
        partitions: P, fixed when the store is created; see `KeySpace`.
        idle_ttl_ms: TTL of a state after its last commit; 0 for none.
        reply_ttl_ms: TTL of the last reply, which is stored for retries; 0 stores none.
        reply_max_bytes: larger replies are not stored.
        tombstone_ttl_ms: TTL of a tombstone; must be longer than the network may delay bytes.
        initialise: write the format and the number of partitions to a new store.
        allow_eviction: accept a server that may evict keys when its memory is full.
        wait_s: timeout of a call while the server is unavailable.
        max_connections: size of the connection pool for reads outside the commit path.
        scan_count: largest COUNT of a SCAN call.
        durability: where a write must be: in the server's memory, on its disk, or on replicas.
        replicas: number of replicas that must acknowledge a write, with `replicated`.
    """

    url: str = field(repr=False)
    namespace: str = "carry"
    partitions: int = 1024
    idle_ttl_ms: int = 0
    reply_ttl_ms: int = 600_000
    reply_max_bytes: int = 65_536
    tombstone_ttl_ms: int = 600_000
    initialise: bool = True
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
        """Whether the address is that of a cluster."""
        return self.url.partition("://")[0] in CLUSTER_SCHEMES

    @property
    def is_sentinel(self) -> bool:
        """Whether the address names Sentinels, which know the server."""
        return self.url.partition("://")[0] in SENTINEL_SCHEMES

    @property
    def keys(self) -> KeySpace:
        """Maps streams to key names."""
        return KeySpace(self.namespace, self.partitions)
