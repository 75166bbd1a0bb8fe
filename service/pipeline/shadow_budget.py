"""The time that the challenger may compute beside the champion, as a token bucket of seconds.

It fills by a share of the time that the champion computes, and by the same share of the time in
which the process is idle. So the challenger takes part in every chunk while the process has time to
spare, and its share of the champion's time when the process is busy. A process is idle while it
neither runs nor waits for a core: on a machine that others keep busy there is no time to spare.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Final

BURST_S: Final = 0.02
"""Most seconds that are saved up: how long the challenger computes at once after a pause."""


class ShadowBudget:
    """The budget of one process's challengers for one model; use from one event loop.

    Args:
        share: seconds for each second that the champion computes or the process is idle.
        now_s, busy_s: both clocks when it begins, as for `note_clocks`.
    """

    def __init__(self, share: float, now_s: float, busy_s: float):
        self._share = share
        self._seen = now_s, busy_s
        self._left_s = 0.0

    @property
    def has_time(self) -> bool:
        """Whether the challenger may compute now; its last call may have overdrawn the budget."""
        return self._left_s > 0

    def earn(self, champion_s: float) -> None:
        """Note that the champion computed for so long."""
        self._left_s = min(BURST_S, self._left_s + self._share * champion_s)

    def note_clocks(self, now_s: float, busy_s: float) -> None:
        """Note both clocks: what passed since the last time and was not busy was idle.

        Args:
            now_s: the monotonic clock.
            busy_s: as `BusyClock` gives it.
        """
        (since_s, before_s), self._seen = self._seen, (now_s, busy_s)
        self.earn(max(0.0, now_s - since_s - (busy_s - before_s)))

    def spend(self, seconds: float) -> None:
        """Note that the challenger computed for so long."""
        self._left_s -= seconds


class BusyClock:
    """How long a process has been busy: the CPU time of all its threads, and how long the one that
    reads the clock was ready to run and had no core, if the kernel counts that (Linux)."""

    def __init__(self) -> None:
        self._file: int | None = None
        with suppress(OSError):
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def read_s(self) -> float:
        """The time in seconds, since some moment; always from the same thread."""
        waited_ns = 0
        if self._file is not None:
            with suppress(OSError, ValueError, IndexError):
                waited_ns = int(os.pread(self._file, 128, 0).split()[1])
        return time.process_time() + waited_ns / 1e9

    def close(self) -> None:
        """Close its file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
