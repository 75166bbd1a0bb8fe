"""Short cuts of the fault suite: on one server a fault of each kind and a kill at each stage, on
a cluster what only a cluster does."""

from __future__ import annotations

import pytest
import uvloop

from tests.faults.injector import CHUNKS_IN_FLIGHT, WARM_ROLLBACKS
from tests.faults.plan import KINDS, Fault, Kind
from tests.faults.report import describe_failures, failures, report
from tests.faults.run import Outcome, RunOptions, new_seed, run, temporary_folder
from tests.faults.traffic import COMMIT_SENT, STAGES
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


def outcome_of(options: RunOptions) -> Outcome:
    """Run a plan of faults; pytest shows the report where the test fails."""
    print(f"seed {options.seed}")

    async def run_in_folder() -> Outcome:
        async with temporary_folder() as folder:
            return await run(options, folder)

    outcome = uvloop.run(run_in_folder())
    print(report(outcome))
    found = failures(outcome, whole=False)
    assert not found, describe_failures(outcome, found)
    assert outcome.history.seen[CHUNKS_IN_FLIGHT] == options.faults
    assert outcome.history.seen[WARM_ROLLBACKS] == 1
    assert outcome.result.rolled_back > 0
    for name in ("replays", "resends", "advanced by others", "appends"):
        assert outcome.history.seen[name] > 0, name
    return outcome


@pytest.mark.parametrize("store", ["valkey", pytest.param("redis", marks=needs_redis)])
def test_nothing_is_lost_doubled_or_mixed(store: str) -> None:
    faults = len(KINDS[store]) + len(STAGES)
    options = RunOptions(store, new_seed(), 12_000, faults, streams=32, longest_s=LONGEST_S)
    outcome = outcome_of(options)
    assert set(outcome.history.faults) == {Kind.WORKER_KILL, *KINDS[store]}


def test_nothing_is_lost_doubled_or_mixed_where_a_cluster_fails_over() -> None:
    plan = tuple(
        Fault(kind, LONGEST_S, gap_s=0.1, pick=pick, stage=COMMIT_SENT)
        for pick, kind in enumerate(ON_A_CLUSTER)
    )
    options = RunOptions("cluster", new_seed(), 12_000, len(plan), streams=32, plan=plan)
    outcome = outcome_of(options)
    assert set(outcome.history.faults) == set(ON_A_CLUSTER)
    assert outcome.history.seen["refused position_ahead"] > 0
