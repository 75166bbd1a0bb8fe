"""Waits of a run, which end once what they wait for can no longer come."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

STALLED_S: Final = 150.0
"""A wait fails after so long without progress: workers start again in that time on a busy machine,
and a test ends by its own words before its timeout."""


async def wait(
    is_met: Callable[[], bool],
    what: str,
    progress: Callable[[], Any],
    *needed: asyncio.Task[Any] | None,
) -> None:
    """Wait for a condition.

    Args:
        what: the condition, for the error.
        progress: a value that changes as long as the run gets on.
        needed: tasks without which the condition is never met, if any; the error of one is raised.

    Raises:
        AssertionError: the run gets on no more.
    """
    before, changed_s = progress(), time.monotonic()
    while not is_met():
        for task in needed:
            if task is not None and task.done():
                task.result()
        if (present := progress()) != before:
            before, changed_s = present, time.monotonic()
        stalled_s = time.monotonic() - changed_s
        assert stalled_s < STALLED_S, f"{what}: no progress for {STALLED_S:.0f} s at {present}"
        await asyncio.sleep(0.02)
