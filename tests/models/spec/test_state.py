"""State layouts: packing by name, and errors that name the part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.errors import StateError
from models.spec.state import State, StatePart, StateSpec

SPEC = StateSpec(
    (
        StatePart("a.hidden", (2,), "float32"),
        StatePart("clock", (), "int64"),
        StatePart("b.memory", (2, 3), "float32"),
        StatePart("counts", (2,), "int64"),
    )
)
STATE = State(np.arange(1, 9, dtype=np.float32) / 8, np.array([2**53 + 1, -5, 2**63 - 1], np.int64))


def values(**changes: Any) -> dict[str, Any]:
    return {**SPEC.by_name(STATE), **changes}


def test_parts_are_packed_by_dtype_in_order() -> None:
    assert (SPEC.float_size, SPEC.int_size) == (8, 3)
    assert SPEC.slices == {
        "a.hidden": slice(0, 2),
        "clock": slice(0, 1),
        "b.memory": slice(2, 8),
        "counts": slice(1, 3),
    }


def test_zero_returns_a_new_zero_state() -> None:
    zero = SPEC.zero()
    zero.floats[0] = 1

    assert not SPEC.zero().floats.any()
    assert zero.floats.dtype == np.float32
    assert zero.ints.tolist() == [0, 0, 0]


def test_by_name_returns_views_of_every_part() -> None:
    named = SPEC.by_name(STATE)

    assert list(named) == ["a.hidden", "clock", "b.memory", "counts"]
    assert named["clock"].shape == ()
    assert int(named["clock"]) == 2**53 + 1
    np.testing.assert_array_equal(named["b.memory"], np.arange(3, 9).reshape(2, 3) / 8)
    assert np.shares_memory(named["b.memory"], STATE.floats)


@pytest.mark.parametrize("plain", [False, True])
def test_from_names_inverts_by_name(plain: bool) -> None:
    named = {
        name: value.tolist() if plain else value for name, value in SPEC.by_name(STATE).items()
    }

    state = SPEC.from_names(dict(reversed(named.items())))

    np.testing.assert_array_equal(state.floats, STATE.floats)
    np.testing.assert_array_equal(state.ints, STATE.ints)
    assert not np.shares_memory(state.floats, STATE.floats)


def test_a_float_part_accepts_integers() -> None:
    assert SPEC.from_names(values(**{"a.hidden": [1, 2]})).floats[:2].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("a.hidden", [1.0], r"expected shape \[2\], got \[1\]"),
        ("a.hidden", 1.0, r"expected shape \[2\], got \[\]"),
        ("b.memory", [[1.0, 2.0], [3.0]], r"expected shape \[2, 3\]"),
        ("b.memory", [[1.0] * 2] * 3, r"expected shape \[2, 3\], got \[3, 2\]"),
        ("a.hidden", ["1", "2"], "expected float32 values"),
        ("a.hidden", [True, False], "expected float32 values"),
        ("a.hidden", [None, None], "expected float32 values"),
        ("a.hidden", [1.0, float("nan")], "expected finite"),
        ("a.hidden", [1.0, float("inf")], "expected finite"),
        ("a.hidden", [1.0, 1e39], "expected finite"),
        ("clock", 1.0, "expected int64 values"),
        ("clock", True, "expected int64 values"),
        ("clock", "1", "expected int64 values"),
        ("clock", 2**63, "out of range"),
        ("clock", [1], r"expected shape \[\], got \[1\]"),
        ("counts", [1, 2**64], "expected int64 values"),
    ],
)
def test_an_invalid_part_is_named(part: str, value: Any, message: str) -> None:
    with pytest.raises(StateError, match=f"part '{part}': .*{message}"):
        SPEC.from_names(values(**{part: value}))


def test_missing_and_unknown_parts_are_named() -> None:
    named = values(other=1)
    del named["clock"]

    with pytest.raises(StateError, match=r"missing \['clock'\], unknown \['other'\]"):
        SPEC.from_names(named)
