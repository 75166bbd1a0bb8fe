"""Waits for new entries of a topic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from service.store.topics import Entry, TopicKeys, Topics

MAX_READ_INTERVAL_S: Final = 5.0
"""Longest time between two reads of a topic that is watched."""

PACE_S: Final = 0.001
"""Shortest time between two reads, so that a busy topic is not read for each of its entries."""


class Arrivals:
    """The arrivals of new entries in a topic, for its owner alone."""

    def __init__(self, topics: Topics, keys: TopicKeys):
        self._topics = topics
        self._keys = keys
        self._last: bytes | None = None
        self._has_entries = False
        self._notification: asyncio.Future[bool] | None = None
        self._wakeup: asyncio.Future[None] | None = None
        self._ended_s = 0.0

    def restart(self) -> None:
        """Forget which entries were read: the topic was acquired again."""
        self._last, self._has_entries = None, False

    async def wait(self, entries: Sequence[Entry], longest_s: float) -> None:
        """Wait until there may be entries that were not read yet, or `wake` is called.

        Args:
            entries: those of the read before.
            longest_s: longest wait if the topic cannot be watched.

        Raises:
            StoreUnavailable, StoreRefused
        """
        if entries:
            self._last, self._has_entries = entries[-1].id, False
        elif self._last is None or self._has_entries:
            # what is behind it was read by others of the group; the next read has what follows
            self._last, self._has_entries = await self._topics.last_id(self._keys), False
            return
        if len(entries) > 1:
            # busy: more of them follow before a watch would be worth its calls
            await asyncio.sleep(PACE_S)
            return
        loop = asyncio.get_running_loop()
        self._wakeup = wakeup = loop.create_future()
        if self._notification is None or self._notification.done():
            self._watch(self._last)
        longest_s = longest_s if self._notification is None else MAX_READ_INTERVAL_S
        # until the clock is at a multiple, so that one call reads many topics
        timer = loop.call_later(longest_s - time.monotonic() % longest_s, self._expire)
        try:
            await wakeup
        finally:
            timer.cancel()
        early_s = self._ended_s + PACE_S - time.monotonic()
        if early_s > 0:
            await asyncio.sleep(early_s)
        self._ended_s = time.monotonic()

    def wake(self) -> None:
        """End the wait."""
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _expire(self) -> None:
        """End the wait, and watch again: the topic may have moved to another server."""
        self._notification = None
        self.wake()

    def _watch(self, last: bytes) -> None:
        """Watch the topic, if it can be watched now; a watch lasts until something is noticed."""
        notification: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        notification.add_done_callback(self._handle_notification)
        is_watched = self._topics.watch(self._keys, last, notification)
        self._notification = notification if is_watched else None

    def _handle_notification(self, notification: asyncio.Future[bool]) -> None:
        self._has_entries = notification.result()
        self.wake()
