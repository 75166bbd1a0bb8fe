"""Makes the store of an address, after validating the address and the files that it names."""

from __future__ import annotations

from service.core.errors import StoreRefused
from service.store.base import Store
from service.store.redis.address import check_address, check_tls_files
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings


def open_store(settings: StoreSettings) -> Store:
    """Make a store; it is not started yet.

    Raises:
        StoreRefused: the address, or a file that it names, cannot be used.
    """
    try:
        check_address(settings.url)
    except ValueError as error:
        raise StoreRefused(f"the store's address cannot be used: {error}") from None
    check_tls_files(settings.url)
    return RedisStore(settings)
