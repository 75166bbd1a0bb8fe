"""Short runs of the fault tests: on one server a fault of each kind and a kill at each stage, on a
cluster what only a cluster does; and each planted bug fails a run."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from tests.faults.checker import LOST, MIXED, ROLLED_BACK
from tests.faults.deployment import MOST_RUNS, RunOptions
from tests.faults.faults import HOLD, IN_FLIGHT, KILL, KILLED, WARM_ROLLBACKS, Fault, kinds_of
from tests.faults.history import History
from tests.faults.planted_bugs.sitecustomize import CODE, SCRIPTS
from tests.faults.run import describe_failures, report, run
from tests.faults.traffic import COMMIT_SENT
from tests.faults.transports import TRANSPORTS
from tests.support.needs import needs_redis

LONGEST_S = 0.6
FASTEST = ("json", "msgpack")
"""Over WebSocket a run has half as many of the races that the planted bugs lose."""
SENT_BY = {
    "valkey": ("json", "websocket", "v2-binary"),
    "redis": ("msgpack", "grpc", "grpc-stream"),
    "cluster": ("msgpack", "websocket-json", "v2"),
    "sentinel": ("json", "grpc"),
}
"""Each run starts and loads no more than it needs; all transports are in one of them."""
ON_A_CLUSTER = (
    *("lossy failover", KILL[COMMIT_SENT], "failover", "commits' answers cut"),
    *(HOLD, "store killed"),
)
ROLLBACK = Fault("store rolled back", seconds=0.3, gap_s=0.5, pick=0)
HOLDS = (Fault(HOLD, seconds=5.0, gap_s=0.0, pick=0),) * 40
"""Held for longer than a client takes to remove and create its stream, on a machine with a load of
seven per core too."""
BUSY = {"events": 3_000, "appenders": 3, "append_pause_s": 0.05, "short_lived": 0, "removals": 0.0}
APPENDING = {"events": 1_500, "streams": 6, "appenders": 12, "append_pause_s": 0.01}
BRIEF = {"events": 4_000, "appenders": 0, "short_lived": 1}
PLANTED: dict[str, tuple[set[str], dict[str, Any], tuple[Fault, ...]]] = {
    "position-only": ({LOST, MIXED}, BUSY, (ROLLBACK,)),
    "equal-tags": ({LOST}, APPENDING, ()),
    "cached-refusal": ({LOST}, BUSY, ()),
    "raised-stream": ({MIXED}, {**BUSY, "removals": 0.3}, ()),
    "unconditional-delete": ({LOST}, {**BRIEF, "removals": 0.2}, HOLDS),
    "no-tombstone": ({LOST, MIXED}, {**BRIEF, "removals": 0.6}, HOLDS),
}


async def run_without_findings(
    store: str, faults: int, plan: Sequence[Fault] | None = None
) -> History:
    """Run a plan of faults; pytest shows the report where the test fails."""
    options = RunOptions(
        store,
        events=6_000,
        faults=faults,
        streams=16,
        transports=SENT_BY[store],
        longest_s=LONGEST_S,
    )
    history, findings = await run(options, plan)
    print(*report(options, history, findings), sep="\n")
    reasons = describe_failures(options, history, findings, whole=False)
    assert not reasons, "\n".join(reasons)
    assert history.seen[IN_FLIGHT] == faults
    assert history.seen[WARM_ROLLBACKS] == 1
    for name in (ROLLED_BACK, "replays", "resends", "advanced by others", "appends"):
        assert history.seen[name] > 0, name
    return history


@pytest.mark.parametrize("store", ["valkey", pytest.param("redis", marks=needs_redis)])
async def test_nothing_is_lost_doubled_or_mixed(store: str) -> None:
    kinds = kinds_of(store)
    history = await run_without_findings(store, len(kinds))
    # a kill at a stage happens if the proxies derive the stages from the traffic
    assert history.seen.keys() >= {*kinds, *KILLED.values()}
    assert history.seen["conflicts"] > 0


async def test_nothing_is_lost_doubled_or_mixed_where_a_cluster_fails_over() -> None:
    plan = [Fault(kind, LONGEST_S, gap_s=0.1, pick=pick) for pick, kind in enumerate(ON_A_CLUSTER)]
    history = await run_without_findings("cluster", len(plan), plan)
    assert history.seen.keys() >= set(ON_A_CLUSTER)
    assert history.seen["refused position_ahead"] > 0


async def test_chunks_are_applied_once_while_no_sentinel_runs() -> None:
    options = RunOptions(
        "sentinel", events=3_000, faults=1, streams=16, transports=SENT_BY["sentinel"]
    )
    history, findings = await run(options, [Fault("Sentinels killed", 0.2, gap_s=0.1, pick=0)])
    print(*report(options, history, findings), sep="\n")
    assert not describe_failures(options, history, findings, whole=False)
    assert history.seen["Sentinels killed"] == 1


@pytest.mark.harness
def test_short_runs_send_by_all_transports() -> None:
    assert set().union(*SENT_BY.values()) == set(TRANSPORTS)


@pytest.mark.harness
@needs_redis
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", sorted({*CODE, *SCRIPTS}))
async def test_planted_bug_is_detected(bug: str) -> None:
    kinds, how, plan = PLANTED[bug]
    how, found = {"streams": 24, **how}, set[str]()
    for number in range(MOST_RUNS):
        options = RunOptions("redis", transports=FASTEST, plant=bug, faults=0, **how)
        # clients may be slower than the machine was thought to be
        longer = [replace(fault, seconds=fault.seconds * 2**number) for fault in plan]
        _, findings = await run(options, longer)
        found |= {kind for kind, _ in findings} & kinds
        if found:
            break
    assert found


@pytest.mark.parametrize("bug", SCRIPTS)
def test_planted_bug_changes_text_of_the_present_scripts(bug: str) -> None:
    folder = files("service.store.redis").joinpath("lua")
    for script, old, _ in SCRIPTS[bug]:
        assert folder.joinpath(f"{script}.lua").read_text().count(old) == 1
