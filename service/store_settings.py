"""The store's part of the settings."""

from __future__ import annotations

from service.settings import Settings
from service.store.settings import Durability, StoreSettings


def store_settings(settings: Settings) -> StoreSettings:
    """The store's part of the settings; the parent process has set the store's address.

    Raises:
        ValueError: there is no address.
    """
    url = settings.store_url()
    if url is None:
        raise ValueError("expected CARRY_REDIS_URL, which `carry serve` sets for its workers")
    return StoreSettings(
        url=url,
        namespace=settings.namespace,
        partitions=settings.partitions,
        idle_ttl_ms=round(settings.idle_ttl_s * 1000),
        reply_ttl_ms=round(settings.reply_ttl_s * 1000),
        reply_max_bytes=settings.reply_max_bytes,
        tombstone_ttl_ms=round(settings.tombstone_ttl_s * 1000),
        allow_eviction=settings.allow_eviction,
        wait_s=settings.store_wait_s,
        durability=Durability(settings.durability),
        replicas=settings.replicas,
    )
