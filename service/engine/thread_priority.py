"""While more comes than can be done, the event loop lets the network finish what it is at.

Each request that comes wakes the loop, and the kernel lets a thread that just woke interrupt one
that computes. For two switches and cold caches a chunk is read, or refused, a little earlier,
though the queue is half a second long. So while chunks are refused, the loop's thread is a batch
thread for the kernel (Linux, sched(7)): it takes its turn when that of the computing thread is
over, some milliseconds later, and then reads all that has come.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress


class GivingWay:
    """Of one event loop, for all that it serves; use from its thread."""

    def __init__(self) -> None:
        self._refusing = 0

    def tell(self, *, refusing: bool) -> None:
        """One queue begins to refuse, or ceases."""
        before = self._refusing
        self._refusing += 1 if refusing else -1
        if bool(before) != bool(self._refusing):
            _set_batch(self._refusing > 0)


def _set_batch(batch: bool) -> None:
    """Change the calling thread, where it is as threads are by default and may be changed."""
    if sys.platform != "linux":
        return
    now, wanted = os.SCHED_OTHER, os.SCHED_BATCH
    if not batch:
        now, wanted = wanted, now
    with suppress(OSError):
        if os.sched_getscheduler(0) == now:
            os.sched_setscheduler(0, wanted, os.sched_param(0))
