"""A short cut of the fault suite: one fault of each kind, a kill at each stage."""

from __future__ import annotations

import pytest
import uvloop

from tests.faults.plan import KINDS, Kind
from tests.faults.report import failures, report, shortened
from tests.faults.run import Course, Outcome, new_seed, own_folder, run
from tests.faults.sight import STAGES
from tests.support.needs import needs_redis

LONGEST_S = 0.6


@pytest.mark.parametrize("store", ["valkey", pytest.param("redis", marks=needs_redis)])
def test_nothing_is_lost_doubled_or_mixed(store: str) -> None:
    seed = new_seed()
    print(f"seed {seed}")
    faults = len(KINDS[store]) + len(STAGES)
    course = Course(store, seed, 12_000, faults, streams=32, longest_s=LONGEST_S)

    async def course_run() -> Outcome:
        async with own_folder() as folder:
            return await run(course, folder)

    outcome = uvloop.run(course_run())
    print(report(outcome))
    found = failures(outcome, whole=False)
    assert not found, shortened(found)
    assert set(outcome.faults) == {Kind.WORKER_KILL, *KINDS[store]}
    assert outcome.warm_rollbacks == 1
    assert outcome.in_flight == faults
    assert outcome.verdict.taken > 0
    assert outcome.replayed_undisturbed > 0
    for name in ("replays", "resends", "moved on differently", "appends"):
        assert outcome.history.seen[name] > 0
