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


MOST_TURNS: Final = 16
"""How many turns of the loop the next batch is put off at most where nothing is in flight."""

PATIENCE_TICKS: Final = 2
"""How many milliseconds it is put off at most for the answers of a batch in flight."""

ENOUGH_ROWS: Final = 32
"""So many jobs are not put off for answers: they share the cost of a batch well enough, and beside
the one in flight they leave neither the loop nor the store idle."""


class PutOff(Enum):
    """How long the next batch is put off."""

    NOT = "it is formed now"
    A_TURN = "for a turn of the loop"
    FOR_ANSWERS = "until a batch in flight is done, or for `PATIENCE_TICKS`"


def put_off(waiting: int, last: int, in_flight: int, turns: int) -> PutOff:
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
        return PutOff.NOT
    if in_flight:
        return PutOff.FOR_ANSWERS if waiting < ENOUGH_ROWS else PutOff.NOT
    return PutOff.A_TURN if turns < MOST_TURNS else PutOff.NOT
