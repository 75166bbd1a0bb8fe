"""Lowers the scheduling priority of the event loop's thread during load shedding (Linux).

Every request that arrives wakes the event loop, and by default the kernel lets a thread that just
woke preempt one that computes. Under overload that costs two context switches and cold caches for
each request, only to read or reject it a little earlier. So while requests are rejected, the loop's
thread runs under `SCHED_BATCH` (sched(7)), which does not preempt: it runs when the time slice of
the compute thread ends, some milliseconds later, and then reads everything that has arrived.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress


class LoopPriority:
    """The priority of one event loop's thread, for all queues of the loop; use from its thread."""

    def __init__(self) -> None:
        self._shedding_queues = 0

    def note_shedding(self, is_shedding: bool) -> None:
        """Note that one queue starts or stops load shedding."""
        was_shedding = self._shedding_queues > 0
        self._shedding_queues += 1 if is_shedding else -1
        if was_shedding != (self._shedding_queues > 0):
            _set_batch_policy(self._shedding_queues > 0)


def _set_batch_policy(batch: bool) -> None:
    """Switch the calling thread between SCHED_OTHER and SCHED_BATCH, if that is permitted."""
    if sys.platform != "linux":
        return
    current, wanted = os.SCHED_OTHER, os.SCHED_BATCH
    if not batch:
        current, wanted = wanted, current
    with suppress(OSError):
        if os.sched_getscheduler(0) == current:
            os.sched_setscheduler(0, wanted, os.sched_param(0))
