"""State layouts: packing by name, and errors that name the part."""

from __future__ import annotations

import tracemalloc
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
        ("b.memory", [[1.0, 2.0], [3.0]], r"expected shape \[2, 3\], got \[2, 2\]"),
        ("b.memory", [[1.0] * 3, [3.0]], r"expected shape \[2, 3\], got lists of several lengths"),
        ("b.memory", [[1.0] * 3, [[3.0]] * 3], r"shape \[2, 3\], got lists of several lengths"),
        ("b.memory", [[[[]]] * 3] * 2, r"expected shape \[2, 3\], got \[2, 3, 1, 0\]"),
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
    with pytest.raises(StateError, match=r"missing \[\], unknown \['other'\]"):
        SPEC.from_names(values(other=1))
    named = values()
    del named["clock"]
    with pytest.raises(StateError, match=r"missing \['clock'\], unknown \[\]"):
        SPEC.from_names(named)


def test_errors_name_few_of_many_unknown_parts() -> None:
    given = values(**{f"{at}{'x' * 1000}": 1 for at in range(10_000)})
    with pytest.raises(StateError, match=r"'0x+', .*'4x+'\] and 9995 more\Z") as rejected:
        SPEC.from_names(given)
    assert len(str(rejected.value)) < 1000


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("a.hidden", ["x" * 2**21, 1.0], "expected float32 values, got strings"),
        ("a.hidden", [[0.0]] * 300_000, r"expected shape \[2\], got \[300000, 1\]"),
        ("b.memory", [[0.0] * 3, [0.0] * 300_000], "got lists of several lengths"),
        ("clock", "1" * 2**21, "expected int64 values, got strings"),
    ],
)
def test_an_invalid_part_is_rejected_without_an_array_of_it(
    part: str, value: Any, message: str
) -> None:
    """NumPy would make every string as wide as the longest."""
    given = values(**{part: value})
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match=message):
            SPEC.from_names(given)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


MIXED = StateSpec(
    (
        StatePart("half", (2,), "float16"),
        StatePart("count", (), "int32"),
        StatePart("double", (2,), "float64"),
        StatePart("plain", (1,), "float32"),
        StatePart("flags", (2,), "bool"),
        StatePart("byte", (1,), "uint8"),
    ),
    {"double": np.array([1 / 3, -0.0]), "flags": np.array([True, False])},
)
VALUES: dict[str, Any] = {
    "half": np.array([0.1, -65504], np.float16),
    "count": np.array(-(2**31), np.int32),
    "double": np.array([np.pi, 5e-324]),
    "plain": np.array([1e-45], np.float32),
    "flags": np.array([False, True]),
    "byte": np.array([255], np.uint8),
}


@pytest.mark.parametrize("plain", [False, True])
def test_every_dtype_is_packed_without_loss(plain: bool) -> None:
    given = {name: value.tolist() if plain else value for name, value in VALUES.items()}
    state = MIXED.from_names(given)
    assert (state.floats.dtype, state.ints.dtype) == (np.float32, np.int64)
    assert (MIXED.float_size, MIXED.int_size) == (3, 6)
    for name, value in MIXED.by_name(state).items():
        assert value.dtype == VALUES[name].dtype
        assert value.tobytes() == VALUES[name].tobytes()


def test_a_runtime_row_holds_the_bytes_of_every_value() -> None:
    state = MIXED.from_names(VALUES)
    row = MIXED.pack(state)
    assert (row.shape, row.dtype) == ((15,), np.float32)
    unpacked = MIXED.unpack(row, np.zeros(0, np.int64))
    assert unpacked.floats.tobytes() == state.floats.tobytes()
    assert unpacked.ints.tobytes() == state.ints.tobytes()
    assert not np.shares_memory(unpacked.floats, row)


def test_unpacking_keeps_ints_that_the_network_does_not_own() -> None:
    state = MIXED.from_names(VALUES)
    longer = State(state.floats, np.append(state.ints, 7))
    unpacked = MIXED.unpack(MIXED.pack(longer), np.append(np.zeros(6, np.int64), 8))
    assert unpacked.ints.tolist() == [*state.ints.tolist(), 8]


def test_a_new_stream_starts_from_initial_values() -> None:
    named = MIXED.by_name(MIXED.initial())
    assert named["double"].tolist() == [1 / 3, -0.0]
    assert named["flags"].tolist() == [True, False]
    assert named["plain"].tolist() == [0]
    assert not MIXED.zero().ints.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["double", "plain", "half"])
def test_non_finite_values_are_detected_in_every_float_dtype(part: str, value: float) -> None:
    state = MIXED.from_names(VALUES)
    assert MIXED.is_finite(state)
    row = state.ints.view(np.float64) if part == "double" else state.floats
    row[MIXED.slices[part].start] = value
    assert not MIXED.is_finite(state)
    # what the engine checks first is a part of the row that is not finite
    assert not np.isfinite(MIXED.pack(state)).all()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("byte", [256], "expected uint8 values, got one out of range"),
        ("count", 2**31, "expected int32 values, got one out of range"),
        ("count", 0.5, "expected int32 values, got float64"),
        ("half", [1e5, 0], "expected finite float16 values"),
        ("flags", [0, 1], "expected bool values, got integers"),
        ("double", [True, 0.5], "expected float64 values, got true or false"),
    ],
)
def test_values_of_another_dtype_are_rejected(part: str, value: Any, message: str) -> None:
    with pytest.raises(StateError, match=rf"part '{part}': {message}"):
        MIXED.from_names({**VALUES, part: value})
