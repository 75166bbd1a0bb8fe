"""Limits of a batch, and when to delay the next one: pure functions."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple


class BatchLimits(NamedTuple):
    """How large a batch may grow.

    Attributes:
        max_rows: jobs per batch.
        max_padded_steps: rows times the longest row's steps; a single longer job goes alone.
        long_steps: a job of more steps is a long one, which takes several runtime calls.
    """

    max_rows: int
    max_padded_steps: int
    long_steps: int = 2**31


MAX_DELAY_TURNS: Final = 16
"""How many turns of the loop the next batch is put off at most where nothing is in flight."""

LINGER_TICKS: Final = 2
"""How many milliseconds it is put off at most for the answers of a batch in flight."""

NO_LINGER_ROWS: Final = 32
"""So many jobs are not put off for answers: they share the cost of a batch well enough, and beside
the one in flight they leave neither the loop nor the store idle."""


class BatchDelay(Enum):
    """How long the next batch is put off."""

    NONE = "start it now"
    LOOP_TURN = "for one turn of the event loop"
    LINGER = "until a batch in flight ends, for `LINGER_TICKS` at most"


def batching_delay(waiting: int, last: int, in_flight: int, turns: int) -> BatchDelay:
    """Whether the next batch waits to be as large as the last one, for a moment.

    Every batch has a cost of its own, which its chunks share. Where clients answer replies with
    requests, these come in a few turns of the loop, and so do those that the batches in flight
    are about to answer. Who is alone waits for nobody.

    Args:
        waiting: number of ready jobs.
        last: rows of the last batch.
        in_flight: batches that are under way, without those of long jobs.
        turns: of the loop, for which it was put off already.
    """
    if not 0 < waiting < last:
        return BatchDelay.NONE
    if in_flight:
        return BatchDelay.LINGER if waiting < NO_LINGER_ROWS else BatchDelay.NONE
    return BatchDelay.LOOP_TURN if turns < MAX_DELAY_TURNS else BatchDelay.NONE
