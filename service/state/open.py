"""Opens the store of an address: a single server or a cluster, by its scheme."""

from __future__ import annotations

from service.errors import StoreRefused
from service.state.address import check_address
from service.state.protocol import StateStore
from service.state.redis_store import RedisStore
from service.state.settings import StoreSettings


def open_store(settings: StoreSettings) -> StateStore:
    """A store that is not yet started.

    Raises:
        StoreRefused: the address has another scheme or cannot be used.
    """
    try:
        check_address(settings.url)
    except ValueError as error:
        raise StoreRefused(f"the store's address cannot be used: {error}") from None
    return RedisStore(settings)
