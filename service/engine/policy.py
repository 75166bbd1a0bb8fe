"""Batching policy: the limits of a batch, and the batching delay; pure functions."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple


class BatchLimits(NamedTuple):
    """How large a batch may grow.

    Attributes:
        max_rows: jobs per batch.
        max_padded_steps: rows times the steps of the longest row; a longer job runs alone.
        long_steps: a job of more steps is a long job, which takes several runtime calls.
    """

    max_rows: int
    max_padded_steps: int
    long_steps: int = 2**31


MAX_DELAY_TURNS: Final = 16
"""Longest batching delay while no batch is in flight, in turns of the event loop."""

LINGER_TICKS: Final = 2
"""Longest batching delay (linger) while a batch is in flight, in milliseconds."""

NO_LINGER_ROWS: Final = 32
"""A batch of this many rows never lingers: its fixed cost is spread well enough, and with the batch
in flight it keeps both the event loop and the store busy."""


class BatchDelay(Enum):
    """How long to delay the next batch."""

    NONE = "start it now"
    LOOP_TURN = "for one turn of the event loop"
    LINGER = "until a batch in flight ends, for `LINGER_TICKS` at most"


def batching_delay(waiting: int, last: int, in_flight: int, turns: int) -> BatchDelay:
    """Decide the batching delay: a batch smaller than the last one waits briefly for more jobs.

    Every batch has a fixed cost, which its chunks share. Closed-loop clients send their next
    requests within a few turns of the event loop after the replies, so a batch in flight that is
    about to end brings more jobs. A lone request is never delayed.

    Args:
        waiting: number of ready jobs.
        last: rows of the last batch.
        in_flight: number of running batches, without those of long jobs.
        turns: turns of the event loop by which the batch was delayed already.
    """
    if not 0 < waiting < last:
        return BatchDelay.NONE
    if in_flight:
        return BatchDelay.LINGER if waiting < NO_LINGER_ROWS else BatchDelay.NONE
    return BatchDelay.LOOP_TURN if turns < MAX_DELAY_TURNS else BatchDelay.NONE
