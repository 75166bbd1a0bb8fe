"""Quotas of access keys: the most streams that a key may feed, and the most bytes of their states.

The store counts, so that a quota holds over all processes. A stream is registered there before its
first write with the key; a process remembers it for a minute, so that a quota costs nothing for a
stream that is fed often. Streams that were deleted or have expired are removed when the quota is
reached, at most every `RECONCILE_S` in a process.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from service.access.limits import KeyLimits
from service.core.errors import LimitExceeded
from service.core.values import StreamKey
from service.store.usage import Quota, StreamUsage

REGISTRATION_TTL_S: Final = 60.0
"""How long a process relies on a registration; a stream that is deleted elsewhere and created again
within it is not counted."""

MAX_REGISTRATIONS: Final = 100_000
RECONCILE_S: Final = 5.0
RETRY_AFTER_S: Final = 10.0


class StreamQuota:
    """The quota of one key in one process.

    Args:
        state_bytes: the size of a state of a model.
    """

    def __init__(
        self,
        usage: StreamUsage,
        key_id: str,
        quota: Quota,
        state_bytes: Callable[[str], int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._usage = usage
        self._key_id = key_id
        self._quota = quota
        self._state_bytes = state_bytes
        self._clock = clock
        self._registered_until_s: dict[StreamKey, float] = {}
        self._waiting: Counter[StreamKey] = Counter()
        self._locks: dict[StreamKey, asyncio.Lock] = {}
        self._reconciled_s = -RECONCILE_S

    def admits(self, key: StreamKey) -> bool:
        """Whether a chunk of the stream may be queued at once: the stream is registered, and no
        earlier chunk of it waits."""
        return self._registered_until_s.get(key, 0.0) > self._clock() and key not in self._waiting

    def enter(self, key: StreamKey) -> None:
        """Hold later chunks of the stream back behind one that is not queued yet, until `leave`."""
        self._waiting[key] += 1

    def leave(self, key: StreamKey) -> None:
        """Release the later chunks: this one is queued or failed."""
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            self._locks.pop(key, None)

    @asynccontextmanager
    async def admission(self, key: StreamKey) -> AsyncIterator[None]:
        """Register the stream of a chunk that has entered; in the context it is queued, in the
        order of the calls.

        Raises:
            LimitExceeded: the quota is reached.
            StoreUnavailable, StoreRefused
        """
        # a lock is fair: it is acquired in the order of the calls
        async with self._locks.setdefault(key, asyncio.Lock()):
            await self.admit(key)
            yield

    async def admit(self, key: StreamKey) -> None:
        """Register a stream.

        Raises:
            LimitExceeded, StoreUnavailable, StoreRefused
        """
        (error,) = await self.admit_many([key])
        if error is not None:
            raise error

    async def admit_many(self, keys: Sequence[StreamKey]) -> list[LimitExceeded | None]:
        """Register streams; the error of each that exceeds the quota.

        Raises:
            StoreUnavailable, StoreRefused
        """
        now_s = self._clock()
        unknown = list(
            {key: None for key in keys if self._registered_until_s.get(key, 0.0) <= now_s}
        )
        errors: dict[StreamKey, LimitExceeded] = {}
        if unknown:
            errors = await self._register(unknown)
            if errors and self._clock() - self._reconciled_s >= RECONCILE_S:
                self._reconciled_s = self._clock()
                await self._usage.reconcile(self._key_id)
                errors = await self._register(list(errors))
        return [errors.get(key) for key in keys]

    async def release(self, keys: Sequence[StreamKey]) -> None:
        """Remove streams that were deleted with the key."""
        for key in keys:
            self._registered_until_s.pop(key, None)
        await self._usage.release(self._key_id, keys)

    def forget(self) -> None:
        """Forget all registrations: streams were deleted whose names are not known."""
        self._registered_until_s.clear()
        self._reconciled_s = -RECONCILE_S

    async def _register(self, keys: Sequence[StreamKey]) -> dict[StreamKey, LimitExceeded]:
        sizes = [(key, self._state_bytes(key.model)) for key in keys]
        result = await self._usage.register(self._key_id, sizes, self._quota)
        if len(self._registered_until_s) + len(keys) > MAX_REGISTRATIONS:
            self._registered_until_s.clear()
        until_s = self._clock() + REGISTRATION_TTL_S
        errors: dict[StreamKey, LimitExceeded] = {}
        for (key, size), accepted in zip(sizes, result.accepted, strict=True):
            if accepted:
                self._registered_until_s[key] = until_s
            else:
                errors[key] = self._error(key, size, result.streams, result.state_bytes)
        return errors

    def _error(self, key: StreamKey, size: int, streams: int, state_bytes: int) -> LimitExceeded:
        most_streams, most_bytes = self._quota
        limit, allowed, used = "streams", most_streams, streams
        if most_streams is None or streams < most_streams:
            limit, allowed, used = "state_bytes", most_bytes, state_bytes
        needed = f", and the stream needs {size}" if limit == "state_bytes" else ""
        return LimitExceeded(
            f"the key {self._key_id} has reached its limit {limit}: {allowed}; it uses {used}"
            f"{needed}",
            key=self._key_id,
            limit=limit,
            allowed=allowed,
            used=used,
            stream=key.stream,
            retry_after_s=RETRY_AFTER_S,
        )


class StreamQuotas:
    """The quotas of all keys that have one, in this process.

    Args:
        usage: counts in the store.
        state_bytes: the size of a state of a model.
    """

    def __init__(self, usage: StreamUsage, state_bytes: Callable[[str], int]):
        self._usage = usage
        self._state_bytes = state_bytes
        self._quotas: dict[str, tuple[Quota, StreamQuota]] = {}

    def quota(self, key_id: str, limits: KeyLimits | None) -> StreamQuota | None:
        """The quota of a key; None if it has none."""
        if limits is None or (limits.streams is None and limits.state_bytes is None):
            return None
        quota = Quota(limits.streams, limits.state_bytes)
        known = self._quotas.get(key_id)
        if known is None or known[0] != quota:
            created = StreamQuota(self._usage, key_id, quota, self._state_bytes)
            known = self._quotas[key_id] = quota, created
        return known[1]
