"""Measures the rate at which a queue drains, for admission control.

There is no rate while the queue is empty, and a period without progress (the store is unavailable)
does not change it.
"""

from __future__ import annotations

from typing import Final

WINDOW_S: Final = 0.2
"""Length of one measurement; the rate is the mean of the new and the previous one."""


class DrainRate:
    """The drain rate of one queue; use from one task at a time.

    Attributes:
        done: number of jobs done so far, counted by the owner.
        per_s: jobs done per second; None if unknown.
    """

    __slots__ = ("_before", "_since_s", "done", "per_s")

    def __init__(self) -> None:
        self.done = 0
        self.per_s: float | None = None
        self._before = 0
        self._since_s: float | None = None

    def note(self, now_s: float, waiting: int) -> None:
        """Note the number of waiting jobs; call after starting all jobs that may start."""
        if not waiting:
            self.per_s = self._since_s = None
            return
        if self._since_s is not None:
            seconds, done = now_s - self._since_s, self.done - self._before
            if seconds < WINDOW_S:
                return
            if done:
                rate = done / seconds
                self.per_s = rate if self.per_s is None else (self.per_s + rate) / 2
        self._since_s, self._before = now_s, self.done
