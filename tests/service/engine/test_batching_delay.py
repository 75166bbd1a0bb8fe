"""The batching delay."""

from __future__ import annotations

import pytest

from service.engine.policy import MAX_DELAY_TURNS, NO_LINGER_ROWS, BatchDelay, batching_delay


@pytest.mark.parametrize(
    ("waiting", "last", "in_flight", "turns", "expected"),
    [
        (15, 16, 1, 0, BatchDelay.LINGER),
        (15, 16, 1, MAX_DELAY_TURNS, BatchDelay.LINGER),
        (16, 16, 1, 0, BatchDelay.NONE),
        (NO_LINGER_ROWS - 1, 64, 1, 0, BatchDelay.LINGER),
        (NO_LINGER_ROWS, 64, 1, 0, BatchDelay.NONE),
        (NO_LINGER_ROWS, 64, 0, 0, BatchDelay.LOOP_TURN),
        (15, 16, 0, MAX_DELAY_TURNS - 1, BatchDelay.LOOP_TURN),
        (15, 16, 0, MAX_DELAY_TURNS, BatchDelay.NONE),
        (16, 16, 0, 0, BatchDelay.NONE),
        (1, 1, 1, 0, BatchDelay.NONE),
        (1, 0, 0, 0, BatchDelay.NONE),
        (0, 16, 1, 0, BatchDelay.NONE),
    ],
)
def test_batch_smaller_than_the_last_is_delayed(
    waiting: int, last: int, in_flight: int, turns: int, expected: BatchDelay
) -> None:
    assert batching_delay(waiting, last, in_flight, turns) is expected
