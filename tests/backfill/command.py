"""`carry` with small units and buckets, so that a short history has many of them.

`BACKFILL_SIZES` has, as JSON, what replaces the sizes of `service.backfill.plan.Plan`, from which
the processes of a run have them. `BACKFILL_BUG` names a bug that is planted into all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count
from typing import Any, Final

import msgspec

from carry.cli import main
from service.backfill import bucket, run
from service.backfill.plan import Plan


def with_sizes(plan_backfill: Callable[..., Plan], sizes: dict[str, int]) -> Callable[..., Plan]:
    """Plan a backfill with other sizes."""

    def plan(*arguments: Any, **options: Any) -> Plan:
        return msgspec.structs.replace(plan_backfill(*arguments, **options), **sizes)

    return plan


def ignore_records() -> None:
    """Compute every bucket, whether it is finished or not."""
    run.read_record = bucket.read_record = lambda *_: None


def count_states() -> None:
    """Write into each state how many the process has written before."""
    encode_state, numbers = bucket.encode_state, count()

    def encode(state: Any) -> bytes:
        return encode_state(state._replace(updated_ms=next(numbers)))

    bucket.encode_state = encode


BUGS: Final = {"records ignored": ignore_records, "states counted": count_states}

# also in the processes that the command starts, which import this module
if bug := os.environ.get("BACKFILL_BUG"):
    BUGS[bug]()
if __name__ == "__main__":
    chosen = json.loads(os.environ.get("BACKFILL_SIZES", "{}"))
    run.plan_backfill = with_sizes(run.plan_backfill, chosen)
    main()
