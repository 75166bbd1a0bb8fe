"""Time limit and progress reports of baselines."""

from __future__ import annotations

import time
from collections.abc import Callable

Note = Callable[[str], None]


class OutOfTimeError(Exception):
    """A baseline would take longer than it may; it is left out."""


class TimeBudget:
    """A time limit, divided among parts of the work; it also reports their progress.

    Args:
        limit_s: from now; None is no limit.
        note: called with a line of progress.
        now_s: a monotonic clock.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        note: Note = lambda text: None,
        now_s: Callable[[], float] = time.monotonic,
    ):
        self._now_s = now_s
        self._end_s = None if limit_s is None else now_s() + limit_s
        self.note = note

    @property
    def is_expired(self) -> bool:
        """Whether the time is over."""
        return self._end_s is not None and self._now_s() >= self._end_s

    def part(self, parts: int, name: str = "") -> TimeBudget:
        """The first of `parts` equal shares of the time left; its notes begin with `name`."""
        left_s = None if self._end_s is None else max(0.0, self._end_s - self._now_s()) / parts
        prefix = f"{name}, " if name else ""
        return TimeBudget(left_s, lambda text: self.note(f"{prefix}{text}"), self._now_s)
