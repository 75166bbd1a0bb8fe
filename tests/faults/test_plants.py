"""Each planted bug turns the suite red, and the suite says what is wrong."""

from __future__ import annotations

import pytest
import uvloop

from tests.faults.plan import Fault, Kind
from tests.faults.run import Course, new_seed, own_folder, run
from tests.faults.verdict import LOST, MIXED
from tests.support.needs import needs_redis

HOLD = Fault(Kind.HOLD_WRITE, seconds=1.0, gap_s=0.0, pick=0)
ROLLBACK = Fault(Kind.ROLLBACK, seconds=0.3, gap_s=0.5, pick=0)


@needs_redis
@pytest.mark.parametrize(
    ("plant", "plan", "forgets", "short_lived", "kinds"),
    [
        ("position-only", (ROLLBACK,), 0.0, 0, {LOST, MIXED}),
        ("equal-tags", (), 0.0, 0, {LOST}),
        ("cached-refusal", (), 0.0, 0, {LOST}),
        ("raised-stream", (), 0.05, 0, {MIXED}),
        ("unconditional-delete", (HOLD,) * 12, 0.4, 1, {LOST}),
        ("no-tombstone", (HOLD,) * 12, 0.4, 1, {LOST, MIXED}),
    ],
)
def test_a_planted_bug_is_found(
    plant: str, plan: tuple[Fault, ...], forgets: float, short_lived: int, kinds: set[str]
) -> None:
    seed = new_seed()
    print(f"seed {seed}")
    course = Course(
        "redis",
        seed,
        8_000,
        0,
        streams=24,
        plan=plan,
        plant=plant,
        forgets=forgets,
        short_lived=short_lived,
        appenders=6,
        append_pause_s=0.01,
        quiet=False,
    )

    async def planted() -> set[str]:
        async with own_folder() as folder:
            outcome = await run(course, folder)
            return {finding.kind for finding in outcome.verdict.findings}

    assert uvloop.run(planted()) & kinds
