"""Settings of the state store: its address, timeouts, TTLs and durability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo

from service.core.settings import KIB, settings_group
from service.store.keys import KeySpace
from service.store.redis.address import (
    CLUSTER_SCHEMES,
    SENTINEL_SCHEMES,
    add_password,
    add_password_of,
    add_sentinel_password,
    check_address,
)


class Durability(StrEnum):
    """Where a write must be before a commit is acknowledged."""

    MEMORY = "memory"
    FSYNC = "fsync"
    REPLICATED = "replicated"


def _check_address(url: str | None) -> str | None:
    if url is not None:
        check_address(url)
    return url


def _check_password_file(add: Callable[[str, str], str]) -> AfterValidator:
    def check(file: Path | None, info: ValidationInfo) -> Path | None:
        if file is not None and "redis_url" in info.data:
            add_password_of(file, info.data["redis_url"], add)
        return file

    return AfterValidator(check)


@settings_group
class StoreSettings:
    """The state store: a server, a cluster or a primary behind Sentinels; or the embedded one."""

    redis_url: Annotated[str | None, AfterValidator(_check_address)] = field(
        default=None, repr=False
    )
    """The store: redis://, rediss:// (TLS) or unix://; for a cluster redis+cluster:// or
    rediss+cluster://, with some of its nodes; behind Sentinels redis+sentinel:// or
    rediss+sentinel://. If it is not set, the service starts an embedded Valkey in `data_dir`."""

    redis_password_file: Annotated[Path | None, _check_password_file(add_password)] = None
    """File whose first line is the password of the store's user, such as a mounted secret;
    `redis_url` then contains no password. Read at the start of each worker."""

    redis_sentinel_password_file: Annotated[
        Path | None, _check_password_file(add_sentinel_password)
    ] = None
    """The same for the password of the Sentinels' user, if they have one."""

    data_dir: Path = Path(".carry")
    """Folder of the embedded Valkey; unused with `redis_url`. Put it on a persistent disk."""

    namespace: Annotated[
        str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=32)
    ] = "carry"
    """Prefix of every key in the store; independent services on one store need different ones."""

    partitions: Annotated[int, Field(ge=1, le=16384)] = 1024
    """Partitions over which the streams are spread, written into the store at its first use; it
    cannot be changed later. Some tens per node of the largest expected cluster are enough."""

    allow_eviction: bool = False
    """Accept a store whose maxmemory-policy may evict states. Streams then silently start over:
    only for data that may be lost."""

    durability: Durability = Durability.MEMORY
    """When a chunk is acknowledged: the store's server has it (`memory`), its disk has it
    (`fsync`, needs `appendfsync always` on every server), or `CARRY_REPLICAS` replicas have it
    (`replicated`). docs/explanation/guarantees.md says what each survives."""

    replicas: Annotated[int, Field(ge=1, le=16)] = 1
    """Number of replicas of its server that must have a chunk with `durability=replicated`. Set it
    to the number of all replicas, so that each one that may be promoted has it."""

    store_wait_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    """Longest wait for an unavailable store if no request deadline bounds it (the start, reading
    and deleting streams), in seconds. The service replaces a connection that is unresponsive for a
    third of it."""

    idle_ttl_s: Annotated[int, Field(ge=0)] = 0
    """Delete a stream this many seconds after its last commit; 0 never does. Longer than any pause
    of a live stream."""

    reply_ttl_s: Annotated[int, Field(ge=1)] = 600
    """How long the reply of a stream's last chunk is stored for retries, in seconds. Longer than
    clients retry."""

    tombstone_ttl_s: Annotated[int, Field(ge=1)] = 600
    """How long a deleted stream leaves a tombstone, in seconds, so that writes from before the
    deletion are not applied after it. Longer than a proxy or the network may delay bytes of an
    abandoned connection. A worker drops a stream's state from its cache after as long without a
    chunk."""

    reply_max_bytes: Annotated[int, Field(ge=0)] = 64 * KIB
    """A larger reply is not stored, and a retry of its chunk gets `already_applied`; 0 stores
    none. In bytes per stream, in the store's memory."""

    @cached_property
    def url(self) -> str:
        """The store's address with the passwords of the files, which are read once.

        Raises:
            ValueError: there is no address, or a file has no password.
        """
        url = self.redis_url
        if self.redis_password_file is not None:
            url = add_password_of(self.redis_password_file, url)
        if self.redis_sentinel_password_file is not None:
            url = add_password_of(self.redis_sentinel_password_file, url, add_sentinel_password)
        if url is None:
            raise ValueError("expected CARRY_REDIS_URL, which `carry serve` sets for its workers")
        return url

    def at(self, url: str) -> StoreSettings:
        """The settings for the server at another address, which has its password."""
        return replace(
            self, redis_url=url, redis_password_file=None, redis_sentinel_password_file=None
        )

    @property
    def is_cluster(self) -> bool:
        """Whether the address is that of a cluster."""
        return self.url.partition("://")[0] in CLUSTER_SCHEMES

    @property
    def is_sentinel(self) -> bool:
        """Whether the address names Sentinels, which know the server."""
        return self.url.partition("://")[0] in SENTINEL_SCHEMES

    @cached_property
    def keys(self) -> KeySpace:
        """Maps streams to key names."""
        return KeySpace(self.namespace, self.partitions)
