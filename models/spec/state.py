"""Layout of a stream's state: named parts with shape and dtype, packed into two rows.

The network's parts are float32 and packed into one row. Parts that must be exact (the last
timestamp, counters) are int64 and packed into a second row. Parts are accessed by name; only
`StateSpec` knows their order in the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import StateError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

Dtype = Literal["float32", "int64"]


@dataclass(frozen=True, slots=True)
class StatePart:
    """One named array of the state, for example `lstm_1.hidden` of shape (64,)."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def size(self) -> int:
        """Number of values in the part."""
        return prod(self.shape)


class State(NamedTuple):
    """One stream's state.

    Attributes:
        floats: float32 [N], the network's parts, packed.
        ints: int64 [M], the parts that must be exact, packed.
    """

    floats: FloatArray
    ints: IntArray


@dataclass(frozen=True)
class StateSpec:
    """The ordered parts of a model's state."""

    parts: tuple[StatePart, ...]

    @cached_property
    def float_size(self) -> int:
        """N, the length of the packed float32 row."""
        return sum(part.size for part in self.parts if part.dtype == "float32")

    @cached_property
    def int_size(self) -> int:
        """M, the length of the packed int64 row."""
        return sum(part.size for part in self.parts if part.dtype == "int64")

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The slice of each part in the row of its dtype."""
        slices: dict[str, slice] = {}
        ends = {"float32": 0, "int64": 0}
        for part in self.parts:
            start = ends[part.dtype]
            ends[part.dtype] = start + part.size
            slices[part.name] = slice(start, ends[part.dtype])
        return slices

    def zero(self) -> State:
        """The initial state of a stream: every value is zero."""
        return State(np.zeros(self.float_size, np.float32), np.zeros(self.int_size, np.int64))

    def by_name(self, state: State) -> dict[str, NDArray[Any]]:
        """Split the packed rows into named arrays (views, not copies)."""
        rows: dict[str, NDArray[Any]] = {"float32": state.floats, "int64": state.ints}
        return {
            part.name: rows[part.dtype][self.slices[part.name]].reshape(part.shape)
            for part in self.parts
        }

    def from_names(self, values: Mapping[str, Any]) -> State:
        """Pack named arrays or nested lists; the inverse of `by_name`.

        Raises:
            StateError: a part is missing or unknown, has another shape, or values that are not
                finite numbers of its dtype.
        """
        names = [part.name for part in self.parts]
        missing = [name for name in names if name not in values]
        unknown = [name for name in values if name not in self.slices]
        if missing or unknown:
            raise StateError(f"expected the parts {names}, missing {missing}, unknown {unknown}")
        state = self.zero()
        for part in self.parts:
            row = state.floats if part.dtype == "float32" else state.ints
            row[self.slices[part.name]] = _part_values(part, values[part.name]).ravel()
        return state


def _part_values(part: StatePart, value: Any) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise StateError(
            f"part {part.name!r}: expected shape {list(part.shape)}, got {error}"
        ) from error
    if array.size == 0 and part.size == 0:
        array = array.astype(part.dtype)
    if array.shape != part.shape:
        raise StateError(
            f"part {part.name!r}: expected shape {list(part.shape)}, got {list(array.shape)}"
        )
    if _has_booleans(value):
        raise StateError(f"part {part.name!r}: expected {part.dtype} values, got true or false")
    kinds = "iuf" if part.dtype == "float32" else "iu"
    if array.dtype.kind not in kinds:
        raise StateError(f"part {part.name!r}: expected {part.dtype} values, got {array.dtype}")
    with np.errstate(over="ignore"):
        cast = array.astype(part.dtype)
    if part.dtype == "float32" and not np.isfinite(cast).all():
        raise StateError(f"part {part.name!r}: expected finite float32 values")
    if part.dtype == "int64" and not np.array_equal(cast, array):
        raise StateError(f"part {part.name!r}: expected int64 values, got one out of range")
    return cast


def _has_booleans(value: Any) -> bool:
    """Whether nested lists contain booleans; among numbers, NumPy converts them to numbers."""
    if isinstance(value, list | tuple):
        return any(_has_booleans(item) for item in value)
    return isinstance(value, bool)
