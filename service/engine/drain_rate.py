"""The rate at which a queue drains, measured while more comes than is done.

Refuses to guess: there is no rate while nothing waits, and a time in which nothing was done (the
store is away) changes none.
"""

from __future__ import annotations

from typing import Final

WINDOW_S: Final = 0.2
"""Over how long the rate is measured; half of the one before is kept."""


class DrainRate:
    """Of one queue; use from one task at a time.

    Attributes:
        done: jobs done so far, counted by whoever does them.
        per_s: how many are done in a second; None where that is not known.
    """

    __slots__ = ("_before", "_since_s", "done", "per_s")

    def __init__(self) -> None:
        self.done = 0
        self.per_s: float | None = None
        self._before = 0
        self._since_s: float | None = None

    def note(self, now_s: float, waiting: int) -> None:
        """So many wait now, after all was begun that may be."""
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
