"""Opens the store that the settings name."""

from __future__ import annotations

from service.store.base import Store
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings


def open_store(settings: StoreSettings) -> Store:
    """Create the store; `start` it before use.

    Raises:
        StoreRefused: the address cannot be used.
    """
    return RedisStore(settings)
