"""Short cuts of the fault suite: on one server a fault of each kind and a kill at each stage, on
a cluster what only a cluster does."""

from __future__ import annotations

import pytest
import uvloop

from tests.faults.plan import KINDS, Fault, Kind
from tests.faults.report import failures, losses, report, shortened
from tests.faults.run import Course, Outcome, new_seed, own_folder, run
from tests.faults.sight import COMMIT_SENT, STAGES
from tests.support.needs import needs_redis

LONGEST_S = 0.6
ON_A_CLUSTER = (
    Kind.LOSSY_FAILOVER,
    Kind.WORKER_KILL,
    Kind.FAILOVER,
    Kind.CUT_ANSWER,
    Kind.HOLD_WRITE,
    Kind.STORE_KILL,
)


def outcome_of(course: Course) -> Outcome:
    """Run a course; the report is shown where the test fails."""
    print(f"seed {course.seed}")

    async def course_run() -> Outcome:
        async with own_folder() as folder:
            return await run(course, folder)

    outcome = uvloop.run(course_run())
    print(report(outcome))
    found = failures(outcome, whole=False)
    assert not found, f"{shortened(found)}\n{losses(outcome)}"
    assert outcome.in_flight == course.faults
    assert outcome.warm_rollbacks == 1
    assert outcome.verdict.taken > 0
    assert outcome.replayed_undisturbed > 0
    for name in ("replays", "resends", "moved on differently", "appends"):
        assert outcome.history.seen[name] > 0, name
    return outcome


@pytest.mark.parametrize("store", ["valkey", pytest.param("redis", marks=needs_redis)])
def test_nothing_is_lost_doubled_or_mixed(store: str) -> None:
    faults = len(KINDS[store]) + len(STAGES)
    course = Course(store, new_seed(), 12_000, faults, streams=32, longest_s=LONGEST_S)
    outcome = outcome_of(course)
    assert set(outcome.faults) == {Kind.WORKER_KILL, *KINDS[store]}


def test_nothing_is_lost_doubled_or_mixed_where_a_cluster_fails_over() -> None:
    plan = tuple(
        Fault(kind, LONGEST_S, gap_s=0.1, pick=pick, stage=COMMIT_SENT)
        for pick, kind in enumerate(ON_A_CLUSTER)
    )
    course = Course("cluster", new_seed(), 12_000, len(plan), streams=32, plan=plan)
    outcome = outcome_of(course)
    assert set(outcome.faults) == set(ON_A_CLUSTER)
    assert outcome.history.seen["refused position_ahead"] > 0
