"""Chooses the next chunk to send: chunk sizes, positions, and the order of events across streams.

Chunks are sent in the order in which their last events happened, as live streams would send
them; with a speed they also wait for that moment. `take` returns a stream with one chunk, and again
only after `give_back`, so that one chunk of a stream is in flight at a time.

The schedule is for one event loop: one task calls `take`, any task calls `give_back`.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from service.replay.source import StreamEvents


class Cursor:
    """Position of one stream in its events, and the cut of its next chunk.

    Attributes:
        events: the stream's events.
        position: how many of them the service has consumed.
        cuts: how many chunks were applied.
    """

    def __init__(self, events: StreamEvents, low: int, high: int, seed: int):
        """Chunks of `low` to `high` events; the same seed and stream give the same cuts."""
        self.events = events
        self.position = 0
        self.cuts = 0
        self._low, self._high = low, high
        self._random = Random(f"{seed} {events.name}")  # noqa: S311
        self._size = self._draw()

    @property
    def name(self) -> str:
        """The stream's name."""
        return self.events.name

    @property
    def remaining(self) -> int:
        """Events that are still to be sent."""
        return max(0, len(self.events) - self.position)

    @property
    def size(self) -> int:
        """Events of the next chunk; stays as it is until the stream moves."""
        return min(self._size, self.remaining)

    @property
    def rank(self) -> int:
        """Place of the next chunk's last event among all events."""
        return int(self.events.ranks[self.position + self.size - 1])

    @property
    def time_ms(self) -> int:
        """Timestamp of the next chunk's last event; 0 without timestamps."""
        times = self.events.times_ms
        return 0 if times is None else int(times[self.position + self.size - 1])

    def chunk(self) -> list[dict[str, Any]]:
        """The events of the next chunk."""
        return self.events.events(self.position, self.position + self.size)

    def advance(self, position: int) -> None:
        """The next chunk was applied; the stream is at `position`."""
        self.cuts += 1
        self.move(position)

    def move(self, position: int) -> None:
        """The stream is at `position`, forward or back; the next chunk is cut again."""
        self.position = position
        self._size = self._draw()

    def _draw(self) -> int:
        return self._random.randint(self._low, self._high)


class Schedule:
    """The streams that still have events, by the moment of their next chunk."""

    def __init__(
        self, cursors: list[Cursor], speed: float | None, clock: Callable[[], float]
    ) -> None:
        """Start now.

        Args:
            cursors: streams at their positions in the service.
            speed: times real time, or None to wait for nothing.
            clock: seconds on a clock that never goes back.
        """
        self._speed = speed
        self._clock = clock
        self._start_s = clock()
        waiting = [cursor for cursor in cursors if cursor.remaining]
        self._first_ms = min((_first_ms(cursor) for cursor in waiting), default=0)
        self._heap: list[tuple[int, str, Cursor]] = []
        for cursor in waiting:
            self._push(cursor)
        self._in_flight = 0
        self._changed = asyncio.Event()

    async def take(self, most: int) -> list[Cursor]:
        """The next 1 to `most` streams whose chunks are due; empty when all is done."""
        while True:
            self._changed.clear()
            due: list[Cursor] = []
            while self._heap and len(due) < most and self._wait_s(self._heap[0][2]) <= 0:
                due.append(heapq.heappop(self._heap)[2])
            if due:
                self._in_flight += len(due)
                return due
            if not self._heap and not self._in_flight:
                return []
            await self._until_change()

    def give_back(self, cursor: Cursor) -> None:
        """The stream's chunk is answered; it is scheduled again if it has more events."""
        self._in_flight -= 1
        if cursor.remaining:
            self._push(cursor)
        self._changed.set()

    async def _until_change(self) -> None:
        wait_s = self._wait_s(self._heap[0][2]) if self._heap else None
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _push(self, cursor: Cursor) -> None:
        heapq.heappush(self._heap, (cursor.rank, cursor.name, cursor))

    def _wait_s(self, cursor: Cursor) -> float:
        if self._speed is None:
            return 0.0
        due_s = (cursor.time_ms - self._first_ms) / 1000 / self._speed
        return due_s - (self._clock() - self._start_s)


def _first_ms(cursor: Cursor) -> int:
    times = cursor.events.times_ms
    return 0 if times is None else int(times[cursor.position])
