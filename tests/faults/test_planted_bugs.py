"""Each planted bug fails the run, with findings of the right kind."""

from __future__ import annotations

from typing import Any

import pytest
import uvloop

from tests.faults.plan import Fault, Kind
from tests.faults.result import LOST, MIXED
from tests.faults.run import RunOptions, new_seed, run, temporary_folder
from tests.support.needs import needs_redis

ROLLBACK = Fault(Kind.ROLLBACK, seconds=0.3, gap_s=0.5, pick=0)
HOLD = Fault(Kind.HOLD_WRITE, seconds=1.0, gap_s=0.0, pick=0)
BUSY = {"appenders": 6, "append_pause_s": 0.01, "short_lived": 0, "removals": 0.0}
SHORT_LIVED = {"appenders": 0, "short_lived": 1, "removals": 0.4, "plan": (HOLD,) * 40}


@needs_redis
@pytest.mark.parametrize(
    ("plant", "kinds", "how"),
    [
        ("position-only", {LOST, MIXED}, {**BUSY, "plan": (ROLLBACK,)}),
        ("equal-tags", {LOST}, BUSY),
        ("cached-refusal", {LOST}, BUSY),
        ("raised-stream", {MIXED}, {**BUSY, "removals": 0.05}),
        ("unconditional-delete", {LOST}, SHORT_LIVED),
        ("no-tombstone", {LOST, MIXED}, SHORT_LIVED),
    ],
)
def test_planted_bug_is_detected(plant: str, kinds: set[str], how: dict[str, Any]) -> None:
    seed = new_seed()
    print(f"seed {seed}")
    options = RunOptions("redis", seed, 8_000, 0, streams=24, plant=plant, **how)

    async def planted() -> set[str]:
        async with temporary_folder() as folder:
            outcome = await run(options, folder)
            return {finding.kind for finding in outcome.result.findings}

    assert uvloop.run(planted()) & kinds
