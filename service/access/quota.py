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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from service.core.errors import CarryError, LimitExceeded
from service.core.values import StreamKey
from service.store.capabilities import Quota, StreamUsage

RECONCILE_S: Final = 5.0
RETRY_AFTER_S: Final = 10.0


class StreamQuota:
    """The quota of one key in one process.

    Attributes:
        key_id: of the key.
        quota: the most that it may use.
    """

    def __init__(self, usage: StreamUsage, key_id: str, quota: Quota):
        self._usage = usage
        self.key_id = key_id
        self.quota = quota
        self._reconciled_s = -math.inf

    async def register(
        self, keys: Sequence[StreamKey], size_bytes: int, deadline_s: float = math.inf
    ) -> list[LimitExceeded | None]:
        """Register streams that are about to be created; the error of each that exceeds the quota.

        Call it between the read of the heads that the commits expect and the commits.

        Args:
            size_bytes: of the state of each.

        Raises:
            StoreUnavailable, StoreRefused
        """
        sizes = [(key, size_bytes) for key in keys]
        result = await self._usage.register(self.key_id, sizes, self.quota, deadline_s)
        return [
            None if accepted else self._error(key, size_bytes, result.streams, result.state_bytes)
            for key, accepted in zip(keys, result.accepted, strict=True)
        ]

    @property
    def may_reconcile(self) -> bool:
        """Whether `reconcile` was not called for a while."""
        return time.monotonic() - self._reconciled_s >= RECONCILE_S

    async def reconcile(self) -> None:
        """Remove the streams that do not exist from the count.

        Raises:
            StoreUnavailable, StoreRefused
        """
        # calls that find the quota reached meanwhile neither wait for this one nor start another
        self._reconciled_s = math.inf
        try:
            await self._usage.reconcile(self.key_id)
        finally:
            self._reconciled_s = time.monotonic()

    async def admit(self, key: StreamKey, size_bytes: int) -> None:
        """Register one stream that is about to be created.

        Raises:
            LimitExceeded, StoreUnavailable, StoreRefused
        """
        (error,) = await self.register([key], size_bytes)
        if error is not None and self.may_reconcile:
            await self.reconcile()
            (error,) = await self.register([key], size_bytes)
        if error is not None:
            raise error

    @asynccontextmanager
    async def releasing(self, keys: Sequence[StreamKey]) -> AsyncIterator[list[StreamKey]]:
        """Release streams that are deleted within the context: those that are added to the list,
        once a tombstone of each is written.

        Raises:
            StoreUnavailable, StoreRefused
        """
        before = await self._usage.find_registrations(self.key_id, keys)
        deleted: list[StreamKey] = []
        try:
            yield deleted
        finally:
            # streams that are not released now are removed when the quota is reached
            with suppress(CarryError):
                registrations = dict(zip(keys, before, strict=True))
                await self._usage.release(
                    self.key_id, [(key, registrations[key]) for key in deleted]
                )

    def _error(self, key: StreamKey, size: int, streams: int, state_bytes: int) -> LimitExceeded:
        most_streams, most_bytes = self.quota
        limit, allowed, used = "streams", most_streams, streams
        if most_streams is None or streams < most_streams:
            limit, allowed, used = "state_bytes", most_bytes, state_bytes
        needed = f", and the stream needs {size}" if limit == "state_bytes" else ""
        return LimitExceeded(
            f"the key {self.key_id} has reached its limit {limit}: {allowed}; it uses {used}"
            f"{needed}",
            key=self.key_id,
            limit=limit,
            allowed=allowed,
            used=used,
            stream=key.stream,
            retry_after_s=RETRY_AFTER_S,
        ).with_key(limit, self.key_id)
