"""Short runs of the fault tests of topics: on one server every kind of fault, on a cluster what
only a cluster does; and a planted bug fails a run."""

from __future__ import annotations

import re

import pytest

from tests.faults.deployment import MOST_RUNS, new_seed
from tests.faults.planted_bugs.sitecustomize import TOPIC_SCRIPTS
from tests.faults.topics.run import TopicOptions, TopicRun, kinds_of, report, run

LONGEST_S = 0.6
ON_A_CLUSTER = ["failover", "consumers suspended for longer than their leases", "store rolled back"]
PLANTED = {
    "acknowledge-first": ["all consumers killed"] * 4,
    "no-fence": ["consumers suspended for longer than their leases"] * 3,
}


def run_short(store: str, plan: list[str], events: int, plant: str | None = None) -> TopicRun:
    """Run a plan of faults; pytest shows the report where the test fails."""
    options = TopicOptions(
        store, new_seed(), events=events, streams=24, plant=plant, longest_s=LONGEST_S
    )
    running = run(options, plan)
    print(*report(running), sep="\n")
    return running


@pytest.mark.parametrize(("store", "plan"), [("valkey", []), ("cluster", ON_A_CLUSTER)])
def test_each_output_is_written_once_and_in_order(store: str, plan: list[str]) -> None:
    plan = plan or kinds_of(store)
    running = run_short(store, plan, events=1_000 * len(plan))
    assert running.findings == []
    assert running.seen.keys() >= {*plan}
    assert running.seen["outputs checked"] > 0
    assert running.seen["duplicates in the topics"] > 0


@pytest.mark.harness
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bug", sorted(TOPIC_SCRIPTS))
def test_a_planted_bug_of_topics_is_detected(bug: str) -> None:
    found = False
    for _ in range(MOST_RUNS):
        findings = run_short("valkey", PLANTED[bug], events=20_000, plant=bug).findings
        # of the outputs of a stream: a run that stalls says nothing of the bug
        found = any(re.match(r"s\d+: ", each) for each in findings)
        if found:
            break
    assert found
