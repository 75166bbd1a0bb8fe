"""Whether the next batch waits for company."""

from __future__ import annotations

import pytest

from service.engine.policy import ENOUGH_ROWS, MOST_TURNS, PutOff, put_off


@pytest.mark.parametrize(
    ("waiting", "last", "in_flight", "turns", "expected"),
    [
        (15, 16, 1, 0, PutOff.FOR_ANSWERS),
        (15, 16, 1, MOST_TURNS, PutOff.FOR_ANSWERS),
        (16, 16, 1, 0, PutOff.NOT),
        (ENOUGH_ROWS - 1, 64, 1, 0, PutOff.FOR_ANSWERS),
        (ENOUGH_ROWS, 64, 1, 0, PutOff.NOT),
        (ENOUGH_ROWS, 64, 0, 0, PutOff.A_TURN),
        (15, 16, 0, MOST_TURNS - 1, PutOff.A_TURN),
        (15, 16, 0, MOST_TURNS, PutOff.NOT),
        (16, 16, 0, 0, PutOff.NOT),
        (1, 1, 1, 0, PutOff.NOT),
        (1, 0, 0, 0, PutOff.NOT),
        (0, 16, 1, 0, PutOff.NOT),
    ],
)
def test_a_batch_smaller_than_the_last_is_put_off(
    waiting: int, last: int, in_flight: int, turns: int, expected: PutOff
) -> None:
    assert put_off(waiting, last, in_flight, turns) is expected
