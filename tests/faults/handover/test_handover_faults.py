"""Short runs of the hand-over under load: no output is lost or doubled; planted bugs are found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.deployment import MOST_RUNS, new_seed
from tests.faults.handover.run import LOADED_AGAIN, HandoverRun, RunOptions, report, run
from tests.faults.planted_bugs.sitecustomize import HANDOVER_CODE

pytestmark = pytest.mark.timeout(1800)


async def run_short(**options: Any) -> HandoverRun:
    """Run with a fault of each kind; pytest shows the report where the test fails."""
    size = {"streams": 200, "events": 1_500, "kills": 1, "consumers": 2}
    chosen = RunOptions("valkey", new_seed(), **size, **options)
    running = await run(chosen)
    print(*report(running), sep="\n")
    return running


def check_is_whole(running: HandoverRun) -> None:
    """Check that a run has no finding, and that its streams were taken over from their history."""
    assert running.findings == []
    assert running.seen[LOADED_AGAIN] == 1
    assert running.seen["outputs of history events checked"] > 0
    assert running.seen["outputs of live events checked"] > 0


async def test_live_streams_continue_their_history() -> None:
    check_is_whole(await run_short())


@pytest.mark.harness
async def test_consumers_of_one_topic_start_at_the_lowest_offset() -> None:
    check_is_whole(await run_short(partitioned=False, start="lowest"))


@pytest.mark.harness
@pytest.mark.parametrize("bug", sorted(HANDOVER_CODE))
async def test_planted_bug_of_a_hand_over_is_detected(bug: str) -> None:
    for _ in range(MOST_RUNS):
        running = await run_short(plant=bug)
        # in the outputs of live events, not only in what the loader says
        if any(", live: " in each for each in running.findings):
            return
    pytest.fail("no output of a live event was wrong")
