"""Layout of a stream's state: named parts with shape and dtype, packed into two rows.

float32 parts are packed into one row, and float16 parts with them, whose values float32 holds
exactly. All other parts are packed into a second row of 8 bytes a value: integers and booleans as
int64, float64 by their bits. Parts are accessed by name; only `StateSpec` knows their order in the
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import StateError

STATISTICS_PREFIX = "events."
"""Prefix of the parts that hold the statistics of the encoder (`models.events.statistics`)."""

MAX_REPORTED: Final = 5
"""Unknown parts that an error names."""

MAX_NAME_CHARS: Final = 100

MAX_DIMENSIONS: Final = 8
"""Dimensions of a client's lists that an error names."""

_TYPE_NAMES: Final = {
    bool: "true or false",
    int: "integers",
    float: "fractions",
    str: "strings",
    dict: "objects",
    type(None): "null",
}

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

Dtype = Literal[
    "float32",
    "int64",
    "float16",
    "float64",
    "bool",
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
]


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

    @property
    def in_floats(self) -> bool:
        """Whether its values are in the float32 row."""
        return self.dtype in ("float32", "float16")

    def decode(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of its row [..., size] in its dtype (a view if the row has it)."""
        if self.dtype == "float64":
            return values.view(np.float64)
        return values.astype(self.dtype, copy=False)

    def encode(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of its dtype as values of its row; the inverse of `decode`."""
        if self.dtype == "float64":
            return np.ascontiguousarray(values).view(np.int64)
        return values.astype(np.float32 if self.in_floats else np.int64, copy=False)


class State(NamedTuple):
    """One stream's state.

    Attributes:
        floats: float32 [N], the float32 and float16 parts, packed.
        ints: int64 [M], all other parts, packed.
    """

    floats: FloatArray
    ints: IntArray


@dataclass(frozen=True)
class StateSpec:
    """The ordered parts of a model's state.

    Attributes:
        initial_values: by part, in its shape and dtype, the values that a new stream starts from;
            zero for a part that is not named.
    """

    parts: tuple[StatePart, ...]
    initial_values: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)

    @cached_property
    def float_size(self) -> int:
        """N, the length of the packed float32 row."""
        return sum(part.size for part in self.parts if part.in_floats)

    @cached_property
    def int_size(self) -> int:
        """M, the length of the packed int64 row."""
        return sum(part.size for part in self.parts if not part.in_floats)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The slice of each part in its row."""
        slices: dict[str, slice] = {}
        ends = {True: 0, False: 0}
        for part in self.parts:
            start = ends[part.in_floats]
            ends[part.in_floats] = start + part.size
            slices[part.name] = slice(start, ends[part.in_floats])
        return slices

    @cached_property
    def statistics(self) -> slice:
        """The slice of the encoder's statistics in the int64 row, which are side by side."""
        own = [
            self.slices[part.name]
            for part in self.parts
            if not part.in_floats and part.name.startswith(STATISTICS_PREFIX)
        ]
        return slice(own[0].start, own[-1].stop) if own else slice(0, 0)

    @cached_property
    def statistic_counts(self) -> tuple[tuple[str, int], ...]:
        """Name and index in the int64 row of each count among the encoder's statistics."""
        return self._statistics_named(".count", ".events")

    @cached_property
    def statistic_variances(self) -> tuple[tuple[str, int], ...]:
        """Name and index in the int64 row of each variance among the encoder's statistics."""
        return self._statistics_named(".variance")

    def _statistics_named(self, *ends: str) -> tuple[tuple[str, int], ...]:
        return tuple(
            (part.name, self.slices[part.name].start)
            for part in self.parts
            if not part.in_floats
            and part.name.startswith(STATISTICS_PREFIX)
            and part.name.endswith(ends)
        )

    def zero(self) -> State:
        """The state whose every value is zero."""
        return State(np.zeros(self.float_size, np.float32), np.zeros(self.int_size, np.int64))

    def initial(self) -> State:
        """The state of a new stream."""
        state = self.zero()
        for part in self.parts:
            if part.name in self.initial_values:
                self._set(state, part, self.initial_values[part.name])
        return state

    def by_name(self, state: State) -> dict[str, NDArray[Any]]:
        """Split the packed rows into named arrays (views, if the row has their dtype)."""
        return {
            part.name: part.decode(self._row(state, part)[self.slices[part.name]]).reshape(
                part.shape
            )
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
            # a client chooses the unknown ones
            few = [name[:MAX_NAME_CHARS] for name in unknown[:MAX_REPORTED]]
            more = f" and {len(unknown) - len(few)} more" if len(unknown) > len(few) else ""
            raise StateError(f"expected the parts {names}, missing {missing}, unknown {few}{more}")
        state = self.zero()
        for part in self.parts:
            self._set(state, part, _part_values(part, values[part.name]))
        return state

    def is_finite(self, state: State) -> bool:
        """Whether every floating-point value is finite."""
        doubles = [part for part in self.parts if part.dtype == "float64"]
        return bool(np.isfinite(state.floats).all()) and all(
            np.isfinite(part.decode(state.ints[self.slices[part.name]])).all() for part in doubles
        )

    def pack(self, state: State) -> FloatArray:
        """The row of a network's parts that a runtime takes, float32 [W]; of many states [..., W].

        W is N floats and two for each of the M integers.

        Args:
            state: a state whose first values are those of this layout, or many, [..., N] and
                [..., M]. (The floats of a network are all floats of its state, unless it has
                blocks.)

        Returns:
            The floats, and behind them each int64 as the two float32 words of the same bytes.
        """
        if not self.int_size:
            return state.floats
        own = np.ascontiguousarray(state.ints[..., : self.int_size])
        return np.concatenate([state.floats, own.view(np.float32)], axis=-1)

    def unpack(self, row: FloatArray, ints: IntArray) -> State:
        """The state of a runtime's row [..., W], in memory of its own; the inverse of `pack`.

        Args:
            ints: int64 [..., M] of the complete state, from which values behind the network's are
                taken.
        """
        if not self.int_size:
            return State(row.copy(), ints)
        own = row[..., self.float_size :].copy().view(np.int64)
        ints = np.concatenate([own, ints[..., self.int_size :]], axis=-1)
        return State(row[..., : self.float_size].copy(), ints)

    def _row(self, state: State, part: StatePart) -> NDArray[Any]:
        return state.floats if part.in_floats else state.ints

    def _set(self, state: State, part: StatePart, values: NDArray[Any]) -> None:
        self._row(state, part)[self.slices[part.name]] = part.encode(values).ravel()


def _part_values(part: StatePart, value: Any) -> NDArray[Any]:
    """The values of a part in its shape and dtype; of an array, or of nested lists of a client."""
    if not isinstance(value, np.ndarray):
        _check_nested(part, value)
    array = np.asarray(value)
    if array.size == 0 and part.size == 0:
        array = array.astype(part.dtype)
    if array.shape != part.shape:
        raise StateError(
            f"part {part.name!r}: expected shape {list(part.shape)}, got {list(array.shape)}"
        )
    kinds = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[np.dtype(part.dtype).kind]
    if array.dtype.kind not in kinds:
        raise StateError(f"part {part.name!r}: expected {part.dtype} values, got {array.dtype}")
    with np.errstate(over="ignore"):
        cast = array.astype(part.dtype)
    if "f" in kinds:
        if not np.isfinite(cast).all():
            raise StateError(f"part {part.name!r}: expected finite {part.dtype} values")
    elif not np.array_equal(cast, array):
        raise StateError(f"part {part.name!r}: expected {part.dtype} values, got one out of range")
    return cast


def _check_nested(part: StatePart, value: Any) -> None:
    """Reject nested lists of another shape, or of values that are no numbers, before NumPy reads
    them: it would copy lists that are far larger than the part, and make an array of strings as
    wide as the longest one. It would also convert booleans to numbers."""
    types = _types(value, part.shape)
    if types is None:
        expected, lengths = list(part.shape), _first_lengths(value)
        got = "lists of several lengths" if lengths == expected else str(lengths)
        raise StateError(f"part {part.name!r}: expected shape {expected}, got {got}")
    wrong = types - ({bool} if part.dtype == "bool" else {int, float})
    if wrong:
        got = ", ".join(sorted(_TYPE_NAMES.get(each, each.__name__) for each in wrong))
        raise StateError(f"part {part.name!r}: expected {part.dtype} values, got {got}")


def _types(value: Any, shape: tuple[int, ...]) -> set[type] | None:
    """The types of the values in nested lists; None if these have another shape."""
    if not shape:
        return None if isinstance(value, list) else {type(value)}
    if not isinstance(value, list) or len(value) != shape[0]:
        return None
    types: set[type] = set()
    for item in value:
        inner = _types(item, shape[1:])
        if inner is None:
            return None
        types |= inner
    return types


def _first_lengths(value: Any) -> list[int]:
    """The lengths of nested lists along their first elements, of the outermost few."""
    lengths: list[int] = []
    while isinstance(value, list) and len(lengths) < MAX_DIMENSIONS:
        lengths.append(len(value))
        value = value[0] if value else None
    return lengths
