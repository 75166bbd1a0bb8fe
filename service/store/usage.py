"""What the access keys with quotas use of a store: the streams that each has fed, and their bytes.

A stream is registered under a key before the key first writes it, and counts from then on; it is
the key's as long as it exists. What is registered and was never written, or does not exist any
more, is removed by `reconcile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from service.core.values import StreamKey


class Quota(NamedTuple):
    """The most that a key may use; None for any number."""

    streams: int | None
    state_bytes: int | None


class Registration(NamedTuple):
    """The result of `StreamUsage.register`.

    Attributes:
        accepted: for each stream whether it is registered now.
        streams, state_bytes: what the key uses.
    """

    accepted: list[bool]
    streams: int
    state_bytes: int


class StreamUsage(Protocol):
    """The usage of all keys. Each method may raise StoreUnavailable and StoreRefused."""

    async def register(
        self, key_id: str, streams: Sequence[tuple[StreamKey, int]], quota: Quota
    ) -> Registration:
        """Register streams with the bytes of their states, as far as the quota allows; at once, so
        that concurrent calls never exceed it together."""

    async def release(self, key_id: str, streams: Sequence[StreamKey]) -> None:
        """Remove streams that were deleted."""

    async def reconcile(self, key_id: str) -> None:
        """Remove the streams that do not exist, except those that were registered just now."""
