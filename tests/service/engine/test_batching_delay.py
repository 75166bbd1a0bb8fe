"""The batching delay."""

from __future__ import annotations

import pytest

from service.engine.policy import (
    LINGER_TICK_S,
    LOOP_TURN_S,
    MAX_DELAY_TURNS,
    MAX_LINGER_TICKS,
    MIN_SECOND_ROWS,
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
    delay = BatchingDelay(lambda: 0.0)
    delay.note_start(last, 0.0)
    for _ in range(2):
        for _ in range(waits):
            assert delay.decide(waiting, in_flight) is not None
        assert delay.decide(waiting, in_flight) == expected
        assert delay.decide(last, in_flight) is None, "a batch starts"


@pytest.mark.parametrize(
    ("ready", "last", "in_flight", "busy_share", "expected"),
    [
        (MIN_SECOND_ROWS - 1, 2, 1, 0.95, LINGER_TICK_S),
        (MIN_SECOND_ROWS, 2, 1, 0.95, None),
        (MIN_SECOND_ROWS, MIN_SECOND_ROWS + 1, 1, 0.95, LINGER_TICK_S),
        (MIN_SECOND_ROWS - 1, 2, 1, 0.85, None),
        (MIN_SECOND_ROWS - 1, 2, 0, 0.95, None),
        (1, 1, 1, 0.95, None),
    ],
)
def test_small_second_batch_is_delayed_while_the_core_is_busy(
    ready: int, last: int, in_flight: int, busy_share: float, expected: float | None
) -> None:
    cpu_s = 0.0
    delay = BatchingDelay(lambda: cpu_s)
    for second in range(100):
        delay.note_start(last, float(second))
        cpu_s += busy_share
    assert delay.decide(ready, in_flight) == expected


def test_core_is_not_busy_soon_after_it_gets_idle_time() -> None:
    cpu_s = 0.0
    delay = BatchingDelay(lambda: cpu_s)
    for second in range(100):
        delay.note_start(2, float(second))
        cpu_s += second < 90
    assert delay.decide(2, 1) is None
