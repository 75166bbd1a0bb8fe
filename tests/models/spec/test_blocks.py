"""Blocks: window arithmetic and the block parts of a state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import StateError
from models.spec.blocks import (
    CLOSED,
    COUNT,
    WAITING,
    BlockSpec,
    BlockStateLayout,
    block_parts,
    cut_blocks,
)
from models.spec.state import State, StatePart, StateSpec

BLOCKS = BlockSpec(size=3, lookahead=2)
LAYOUT = StateSpec(
    (
        StatePart("layer.forward.hidden", (2,), "float32"),
        StatePart("clock.seen", (), "int64"),
        *block_parts(BLOCKS, 2),
    )
)
HELD = BlockStateLayout(BLOCKS, LAYOUT)


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(0, 7), max_size=8))
def test_windows_and_pending_rows_do_not_depend_on_chunking(
    size: int, lookahead: int, cuts: list[int]
) -> None:
    """Every window is [kC, kC + C + R) of the stream, for any chunks; each occurs once."""
    blocks = BlockSpec(size=size, lookahead=lookahead)
    total = sum(cuts)
    rows = np.arange(total, dtype=np.float32)[:, np.newaxis]
    waiting, position, windows = rows[:0], 0, []
    for count in cuts:
        known = np.concatenate([waiting, rows[position : position + count]])
        found = cut_blocks(blocks, known, final=False)
        windows += found.windows
        waiting, position = found.waiting, position + count
        assert len(waiting) < blocks.window
        assert len(windows) * size == blocks.outputs_emitted_at(position) == position - len(waiting)
    windows += cut_blocks(blocks, waiting, final=True).windows
    assert len(windows) == -(-total // size)
    for k, window in enumerate(windows):
        expected = np.arange(k * size, min(k * size + blocks.window, total))
        np.testing.assert_array_equal(window[:, 0], expected)


def test_a_state_stores_the_pending_rows() -> None:
    rows = np.array([[1, 2], [3, 4]], np.float32)
    ints = np.array([9, 0, 0], np.int64)
    state = HELD.pack(np.array([5, 6], np.float32), ints, rows, closed=False)
    named = LAYOUT.by_name(state)
    assert (named[COUNT], named[CLOSED], named["clock.seen"]) == (2, 0, 9)
    np.testing.assert_array_equal(named[WAITING], [[1, 2], [3, 4], [0, 0], [0, 0]])
    np.testing.assert_array_equal(HELD.pending_rows(state), rows)
    np.testing.assert_array_equal(HELD.network_floats(state), [5, 6])
    assert not HELD.is_closed(state)
    np.testing.assert_array_equal(ints, [9, 0, 0], "what is given is not written to")


def changed(**parts: object) -> State:
    """The state of a stream at position 7, where 4 rows wait, with some parts changed."""
    good = {"layer.forward.hidden": [0, 0], "clock.seen": 7, COUNT: 4, CLOSED: 0}
    return LAYOUT.from_names({**good, WAITING: [[1, 1]] * 4, **parts})


def test_a_state_that_matches_its_position_is_accepted() -> None:
    HELD.check_at(changed(), 7)
    HELD.check_at(changed(**{WAITING: [[1, 1]] * 2 + [[0, 0]] * 2, COUNT: 2}), 8)
    HELD.check_at(changed(**{WAITING: [[0, 0]] * 4, COUNT: 0, CLOSED: 1}), 8)


@pytest.mark.parametrize(
    ("parts", "position", "message"),
    [
        ({COUNT: 5}, 7, "expected 0 to 4 pending rows"),
        ({COUNT: -1}, 7, "expected 0 to 4 pending rows"),
        ({CLOSED: 2}, 7, "expected 0 or 1"),
        ({CLOSED: 1}, 7, "expected 0 to 0 pending rows"),
        ({}, 8, "expected 2 pending rows at position 8, got 4"),
        ({COUNT: 3}, 7, "expected 4 pending rows"),
        ({COUNT: 2}, 8, "zeros after"),
    ],
)
def test_invalid_block_parts_are_rejected(
    parts: dict[str, object], position: int, message: str
) -> None:
    with pytest.raises(StateError, match=message):
        HELD.check_at(changed(**parts), position)
