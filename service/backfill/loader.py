"""Loads streams in batches, a few at a time, at a limited rate."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Final

from service.backfill.load_progress import LoadProgress, Report
from service.core.errors import CarryError
from service.core.values import StreamKey, StreamState
from service.store.base import Store

BATCH_STREAMS: Final = 256
"""Most streams of one commit, so that no live chunk waits long behind it."""

BATCHES_IN_FLIGHT: Final = 4
RATE_BATCH_S: Final = 0.05
"""With a rate, the streams of about this time are committed together."""


class Loader(ABC):
    """Loads streams into a store.

    Args:
        progress: is updated.
        report: is called with it after each batch.
        rate_per_s: most streams a second; 0 for no limit.
    """

    def __init__(self, store: Store, progress: LoadProgress, report: Report, rate_per_s: float):
        self._store = store
        self._progress = progress
        self._report = report
        self._rate_per_s = rate_per_s
        self._batch_streams = BATCH_STREAMS
        if rate_per_s:
            self._batch_streams = max(1, min(BATCH_STREAMS, round(rate_per_s * RATE_BATCH_S)))
        self._next_batch_s = time.monotonic()

    async def load(self, streams: Mapping[StreamKey, StreamState]) -> None:
        """Load streams; each is loaded or kept when it returns.

        Raises:
            CarryError: the store does not accept them.
        """
        keys, size = list(streams), self._batch_streams
        batches = [
            {key: streams[key] for key in keys[at : at + size]} for at in range(0, len(keys), size)
        ]
        pending = iter(batches)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(BATCHES_IN_FLIGHT, len(batches))):
                    group.create_task(self._load_batches(pending))
        except* CarryError as errors:
            raise errors.exceptions[0] from None

    async def _load_batches(self, pending: Iterator[dict[StreamKey, StreamState]]) -> None:
        for batch in pending:
            await self._wait_for_rate(len(batch))
            await self.load_batch(batch)
            self._report(self._progress)

    async def _wait_for_rate(self, count: int) -> None:
        """Wait until so many streams may be written, at the rate."""
        if self._rate_per_s:
            now_s = time.monotonic()
            start_s = max(now_s, self._next_batch_s)
            self._next_batch_s = start_s + count / self._rate_per_s
            await asyncio.sleep(start_s - now_s)

    @abstractmethod
    async def load_batch(self, streams: dict[StreamKey, StreamState]) -> None:
        """Load or keep each of a few streams."""
