"""Monotonic clock that tests advance, for deadlines that expire at a known time."""

from __future__ import annotations

import time

AHEAD_S = 3600.0

SHORT_S = 0.02
PAST_S = 0.08
"""Beyond a short deadline and the batcher's grace of 0.05 s, and before 0.1 s, when a store that
has not answered is at fault."""


class ManualClock:
    """Replaces the module `time` where deadlines are set and compared.

    It runs an hour ahead of the real clock: what a store is given as a deadline is never over.
    Timers run in real time, find that no time has passed, and look again.

    Attributes:
        now_s: what it shows.
        tick_s: how far each reading moves it.
    """

    def __init__(self) -> None:
        self.now_s = time.monotonic() + AHEAD_S
        self.tick_s = 0.0

    def monotonic(self) -> float:
        """The time, in seconds."""
        self.now_s += self.tick_s
        return self.now_s

    def soon(self) -> float:
        """A deadline that passes with `expire`."""
        return self.now_s + SHORT_S

    def later(self) -> float:
        """A deadline that does not."""
        return self.now_s + 60

    def expire(self) -> None:
        """Pass all `soon` deadlines."""
        self.now_s += PAST_S
