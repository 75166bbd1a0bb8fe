"""Waits for new entries of a topic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from service.store.topics import END, Entry, TopicKeys, Topics

UNNOTICED_S: Final = 1.0
"""Longest time between two reads of a topic that is watched."""

PACE_S: Final = 0.001
"""Shortest time between two reads, so that a busy topic is not read for each of its entries."""


class Arrivals:
    """The arrivals of new entries in a topic, for its owner alone."""

    def __init__(self, topics: Topics, keys: TopicKeys):
        self._topics = topics
        self._keys = keys
        self._last = END
        self._has_entries = False
        self._noticed: asyncio.Future[bool] | None = None
        self._ended_s = 0.0

    def restart(self) -> None:
        """Forget which entries were read: the topic was acquired again."""
        self._last, self._has_entries = END, False

    async def wait(self, entries: Sequence[Entry], longest_s: float) -> None:
        """Wait until there may be entries that were not read yet, or `wake` is called.

        Args:
            entries: those of the read before.
            longest_s: longest wait if the topic cannot be watched.
        """
        if entries:
            self._last, self._has_entries = entries[-1].id.decode(), False
        elif self._has_entries:
            # those behind the last one were read by others of the group
            self._last = END
        if len(entries) > 1:
            # busy: more of them follow before a watch would be worth its calls
            await asyncio.sleep(PACE_S)
            return
        loop = asyncio.get_running_loop()
        noticed = self._noticed = loop.create_future()
        is_watched = self._topics.watch(self._keys, self._last, noticed)
        longest_s = UNNOTICED_S if is_watched else longest_s
        # until the clock is at a multiple, so that one call reads many topics
        timer = loop.call_later(longest_s - time.monotonic() % longest_s, self.wake)
        try:
            self._has_entries = await noticed
        finally:
            timer.cancel()
        early_s = self._ended_s + PACE_S - time.monotonic()
        if early_s > 0:
            await asyncio.sleep(early_s)
        self._ended_s = time.monotonic()

    def wake(self) -> None:
        """End the wait."""
        if self._noticed is not None and not self._noticed.done():
            self._noticed.set_result(False)
