"""The batching delay."""

from __future__ import annotations

import pytest

from service.engine.policy import (
    LINGER_TICK_S,
    LOOP_TURN_S,
    MAX_DELAY_TURNS,
    MAX_LINGER_TICKS,
    NO_LINGER_ROWS,
    BatchingDelay,
)


@pytest.mark.parametrize(
    ("waiting", "last", "in_flight", "waits", "expected"),
    [
        (15, 16, 1, 0, LINGER_TICK_S),
        (15, 16, 1, MAX_LINGER_TICKS - 1, LINGER_TICK_S),
        (15, 16, 1, MAX_LINGER_TICKS, None),
        (16, 16, 1, 0, None),
        (NO_LINGER_ROWS - 1, 64, 1, 0, LINGER_TICK_S),
        (NO_LINGER_ROWS, 64, 1, 0, None),
        (NO_LINGER_ROWS, 64, 0, 0, LOOP_TURN_S),
        (15, 16, 0, MAX_DELAY_TURNS - 1, LOOP_TURN_S),
        (15, 16, 0, MAX_DELAY_TURNS, None),
        (16, 16, 0, 0, None),
        (1, 1, 1, 0, None),
        (1, 0, 0, 0, None),
        (0, 16, 1, 0, None),
    ],
)
def test_batch_smaller_than_the_last_is_delayed(
    waiting: int, last: int, in_flight: int, waits: int, expected: float | None
) -> None:
    delay = BatchingDelay()
    delay.last_rows = last
    for _ in range(2):
        for _ in range(waits):
            assert delay.decide(waiting, in_flight) is not None
        assert delay.decide(waiting, in_flight) == expected
        assert delay.decide(last, in_flight) is None, "a batch starts"
