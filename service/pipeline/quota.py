"""Quotas of access keys: the most streams that a key may have created, and the most bytes of their
states.

The store counts (`StreamUsage`), so that a quota holds over all processes, which remember
nothing. A chunk, a restore or a fork that would create a stream registers it first; a deletion with
the key releases the streams that it deleted. Streams that another key deleted, that expired, or
that a crash left registered are removed when the quota is reached, at most every `RECONCILE_S` in a
process.

Use from one event loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from service.access.limits import KeyLimits
from service.core.errors import CarryError, LimitExceeded
from service.core.values import StreamKey
from service.store.capabilities import Quota, StreamUsage

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
        self._reconciled_s = -RECONCILE_S

    async def register(
        self, keys: Sequence[StreamKey], deadline_s: float = math.inf
    ) -> list[LimitExceeded | None]:
        """Register streams that are about to be created; the error of each that exceeds the quota.

        Call it between the read of the heads that the commits expect and the commits.

        Raises:
            StoreUnavailable, StoreRefused
        """
        sizes = [(key, self._state_bytes(key.model)) for key in keys]
        result = await self._usage.register(self._key_id, sizes, self._quota, deadline_s)
        return [
            None if accepted else self._error(key, size, result.streams, result.state_bytes)
            for (key, size), accepted in zip(sizes, result.accepted, strict=True)
        ]

    @property
    def may_reconcile(self) -> bool:
        """Whether `reconcile` was not called for a while."""
        return self._clock() - self._reconciled_s >= RECONCILE_S

    async def reconcile(self) -> None:
        """Remove the streams that do not exist from the count.

        Raises:
            StoreUnavailable, StoreRefused
        """
        # calls that find the quota reached meanwhile neither wait for this one nor start another
        self._reconciled_s = math.inf
        try:
            await self._usage.reconcile(self._key_id)
        finally:
            self._reconciled_s = self._clock()

    async def admit(self, key: StreamKey) -> None:
        """Register one stream that is about to be created.

        Raises:
            LimitExceeded, StoreUnavailable, StoreRefused
        """
        (error,) = await self.register([key])
        if error is not None and self.may_reconcile:
            await self.reconcile()
            (error,) = await self.register([key])
        if error is not None:
            raise error

    @asynccontextmanager
    async def releasing(self, keys: Sequence[StreamKey]) -> AsyncIterator[list[StreamKey]]:
        """Release streams that are deleted within the context: those that are added to the list,
        once a tombstone of each is written.

        Raises:
            StoreUnavailable, StoreRefused
        """
        before = await self._usage.find_registrations(self._key_id, keys)
        deleted: list[StreamKey] = []
        try:
            yield deleted
        finally:
            # streams that are not released now are removed when the quota is reached
            with suppress(CarryError):
                registrations = dict(zip(keys, before, strict=True))
                await self._usage.release(
                    self._key_id, [(key, registrations[key]) for key in deleted]
                )

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
        ).with_key(limit, self._key_id)


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

    def __getitem__(self, key_id: str) -> StreamQuota:
        """The quota of a key that has one."""
        return self._quotas[key_id][1]

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
