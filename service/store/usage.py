"""Usage of a store by access keys with quotas: the streams that each has created, and their bytes.

A stream is registered under a key right before each commit of the key that would create it, and
counts from then on, until it is deleted or expires. A registration and the stream may be on
different servers, so nothing writes both in one step. Instead, a registration is removed only after
its stream was fenced: a tombstone was written after the registration was read, so that every commit
that was registered before conflicts. A later registration of the stream has another id. So a stream
that exists is always counted; `reconcile` removes those that are counted and do not exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NewType, Protocol

from service.core.values import StreamKey

RegistrationId = NewType("RegistrationId", bytes)
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

    async def find_registrations(
        self, key_id: str, streams: Sequence[StreamKey]
    ) -> list[RegistrationId]:
        """Find the registration of each stream; empty if there is none."""

    async def release(
        self, key_id: str, registrations: Sequence[tuple[StreamKey, RegistrationId]]
    ) -> None:
        """Remove registrations that were read before a tombstone of their stream was written."""

    async def reconcile(self, key_id: str) -> None:
        """Remove the registrations whose streams do not exist."""
