"""The store behind an address; the scheme picks the backend."""

from __future__ import annotations

from service.errors import StoreRefused
from service.state.protocol import StateStore
from service.state.redis_store import RedisStore
from service.state.settings import REDIS_SCHEMES, StoreSettings


def open_store(settings: StoreSettings) -> StateStore:
    """A store that is not yet started.

    Raises:
        StoreRefused: the address has another scheme or cannot be used.
    """
    scheme, separator, _ = settings.url.partition("://")
    if separator and scheme in REDIS_SCHEMES:
        return RedisStore(settings)
    accepted = ", ".join(f"{name}://" for name in REDIS_SCHEMES)
    raise StoreRefused(f"expected a store address that begins with {accepted}, got {scheme!r}")
