"""The time that the challenger may compute beside the champion, as a token bucket of seconds.

It fills by a share of the time that the champion computes, and by the same share of the time in
which the process is idle. So the challenger takes part in every chunk while the process has time to
spare, and its share of the champion's time when the process is busy.
"""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.25
"""Most seconds that are saved up: how long the challenger computes at once after a pause."""


class ShadowBudget:
    """The budget of one process's challengers for one model; use from one event loop.

    Args:
        share: seconds for each second that the champion computes or the process is idle.
        now_s: the wall clock when it begins, monotonic.
        cpu_s: the CPU time of the process then, of all its threads.
    """

    def __init__(self, share: float, now_s: float, cpu_s: float):
        self._share = share
        self._seen = now_s, cpu_s
        self._left_s = BURST_S if share else 0.0

    @property
    def has_time(self) -> bool:
        """Whether the challenger may compute now; its last call may have overdrawn the budget."""
        return self._left_s > 0

    def earn(self, champion_s: float) -> None:
        """Note that the champion computed for so long."""
        self._left_s = min(BURST_S, self._left_s + self._share * champion_s)

    def note_clocks(self, now_s: float, cpu_s: float) -> None:
        """Note both clocks: what passed since the last time without CPU time was idle."""
        (since_s, before_s), self._seen = self._seen, (now_s, cpu_s)
        self.earn(max(0.0, now_s - since_s - (cpu_s - before_s)))

    def spend(self, seconds: float) -> None:
        """Note that the challenger computed for so long."""
        self._left_s -= seconds
