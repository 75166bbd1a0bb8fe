"""Creates the router for the address of a store."""

from __future__ import annotations

from service.core.errors import StoreRefused
from service.store.redis.address import check_address, check_tls_files
from service.store.redis.cluster_router import ClusterRouter
from service.store.redis.router import Router, SingleServerRouter
from service.store.redis.sentinel_router import SentinelRouter
from service.store.settings import StoreSettings


def open_router(settings: StoreSettings) -> Router:
    """Create the router; `start` it before use.

    Raises:
        StoreRefused: the address cannot be used.
    """
    try:
        check_address(settings.url)
    except ValueError as error:
        raise StoreRefused(f"the store's address cannot be used: {error}") from None
    check_tls_files(settings.url)
    if settings.is_cluster:
        return ClusterRouter(settings)
    return SentinelRouter(settings) if settings.is_sentinel else SingleServerRouter(settings)
