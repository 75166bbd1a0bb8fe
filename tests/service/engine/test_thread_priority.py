"""The event loop's thread has low priority while any queue sheds load, and only then."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engine.thread_priority import LoopPriority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")


def policies(start: int, notes: Sequence[bool]) -> list[int]:
    """The policies of a thread before and after each note; in a thread of its own, since a policy
    belongs to a thread."""

    def follow() -> list[int]:
        os.sched_setscheduler(0, start, os.sched_param(0))
        loop_priority, seen = LoopPriority(), [os.sched_getscheduler(0)]
        for is_shedding in notes:
            loop_priority.note_shedding(is_shedding=is_shedding)
            seen.append(os.sched_getscheduler(0))
        return seen

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(follow).result()


def test_priority_is_low_until_the_last_queue_is_drained() -> None:
    other, batch = os.SCHED_OTHER, os.SCHED_BATCH
    seen = policies(other, (True, True, False, False, True))
    assert seen == [other, batch, batch, batch, other, batch]


def test_operators_scheduling_policy_is_kept() -> None:
    assert set(policies(os.SCHED_IDLE, (True, False))) == {os.SCHED_IDLE}


def test_forbidden_policy_change_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    loop_priority = LoopPriority()
    loop_priority.note_shedding(is_shedding=True)
    loop_priority.note_shedding(is_shedding=False)
