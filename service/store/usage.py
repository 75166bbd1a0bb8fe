"""What the access keys with quotas use of a store: the streams that each has created, their bytes.

A stream is registered under a key right before each commit of the key that would create it, and
counts from then on, until it is deleted or expires. A registration and the stream may be on
different servers, so nothing writes both in one step. Instead, a registration is removed only by
who knows that its stream does not exist and that no commit behind it can still create it: a
tombstone was written after the registration was read (fencing), and no commit expects that one.
A later registration of the stream is another one. So a stream that exists is always counted; what
is counted and does not exist is removed by `reconcile`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NewType, Protocol

from service.core.values import StreamKey

Registered = NewType("Registered", bytes)
"""Identifies one registration of a stream."""


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
        self,
        key_id: str,
        streams: Sequence[tuple[StreamKey, int]],
        quota: Quota,
        deadline_s: float = math.inf,
    ) -> Registration:
        """Register streams with the bytes of their states, as far as the quota allows; at once, so
        that concurrent calls never exceed it together.

        Call it after the stream's head was read that the commit will expect.
        """

    async def registered(self, key_id: str, streams: Sequence[StreamKey]) -> list[Registered]:
        """The registration of each stream; empty if there is none."""

    async def release(
        self, key_id: str, registrations: Sequence[tuple[StreamKey, Registered]]
    ) -> None:
        """Remove registrations, as read before a tombstone of the stream was written."""

    async def reconcile(self, key_id: str) -> None:
        """Remove the registrations whose streams do not exist."""
