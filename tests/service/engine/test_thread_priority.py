"""The event loop's thread has low priority while any queue sheds load, and only then."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engine.thread_priority import LoopPriority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies are Linux's")


def in_a_thread(check: Callable[[], None]) -> None:
    """Run a check in a thread of its own, since a policy belongs to a thread."""

    def checked() -> None:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        check()

    with ThreadPoolExecutor(1) as executor:
        executor.submit(checked).result()


def test_priority_is_low_until_the_last_queue_is_drained() -> None:
    def check() -> None:
        loop_priority = LoopPriority()
        seen = [os.sched_getscheduler(0)]
        for shedding in (True, True, False, False, True):
            loop_priority.note_shedding(is_shedding=shedding)
            seen.append(os.sched_getscheduler(0))
        other, batch = os.SCHED_OTHER, os.SCHED_BATCH
        assert seen == [other, batch, batch, batch, other, batch]

    in_a_thread(check)


def test_operators_scheduling_policy_is_kept() -> None:
    def check() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        loop_priority = LoopPriority()
        for shedding in (True, False):
            loop_priority.note_shedding(is_shedding=shedding)
            assert os.sched_getscheduler(0) == os.SCHED_IDLE

    in_a_thread(check)


def test_forbidden_policy_change_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    loop_priority = LoopPriority()
    loop_priority.note_shedding(is_shedding=True)
    loop_priority.note_shedding(is_shedding=False)
