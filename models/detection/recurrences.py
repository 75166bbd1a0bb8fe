"""Recurrences y_t = r y_(t-1) + x_t over the events of a chunk, and the state between chunks.

A recurrence is a product with the matrix of the powers of r, so that a chunk needs no loop over its
steps. Arrays have the streams and steps last, so that NumPy's inner loops are long. Pure NumPy in
float64; states are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FloatRows = NDArray[np.float32]
Bools = NDArray[np.bool_]

MAX_COUNT: Final = 1 << 24
"""Largest number of events that float32 counts."""
MAX_STEPS: Final = 32
"""Events that are computed at once: products of larger matrices are slower than several ones, and
BLAS would compute them in threads."""


@lru_cache(maxsize=256)
def decay_matrix(events: int, steps: int) -> Floats:
    """The matrix [T + 1, T + 1] of y_t = r y_(t-1) + x_t with r = exp(-1 / events): the product of
    (y_0, x_1 .. x_T) with it is (y_0 .. y_T)."""
    rate = float(np.exp(-1.0 / events))
    distance = np.subtract.outer(np.arange(steps + 1), np.arange(steps + 1)).T
    return np.where(distance >= 0, rate ** np.maximum(distance, 0), 0.0)


@lru_cache(maxsize=64)
def average_matrices(scales: tuple[int, ...], steps: int) -> Floats:
    """The matrices [scales, T + 1, T + 1] of y_t = g y_(t-1) + (1 - g) x_t, g = exp(-1 / scale)."""
    matrices = np.stack([decay_matrix(scale, steps) for scale in scales])
    matrices[:, 1:] *= 1.0 - np.exp(-1.0 / np.array(scales))[:, np.newaxis, np.newaxis]
    return matrices


def solve_recurrence(matrix: Floats, initial: Floats, values: NDArray[Any]) -> Floats:
    """The values y of a recurrence, the initial one first.

    Args:
        matrix: [T + 1, T + 1], or one for each scale.
        initial: [K, B]; with scales [scales K, B].
        values: x, [K, B, T].

    Returns:
        [K, B, T + 1]; with scales [scales K, B, T + 1].
    """
    size, batch, steps = values.shape
    lead = matrix.shape[:-2]
    sequence = np.empty((*lead, size, batch, steps + 1))
    sequence[..., 0], sequence[..., 1:] = initial.reshape(*lead, size, batch), values
    product = np.matmul(sequence.reshape(*lead, size * batch, steps + 1), matrix)
    return np.asarray(product.reshape(-1, batch, steps + 1))


def solve_sequence(matrix: Floats, sequence: Floats) -> Floats:
    """The values y of a recurrence [..., T + 1], given the initial y followed by x [..., T + 1]."""
    product = sequence.reshape(-1, len(matrix)) @ matrix
    return np.asarray(product.reshape(sequence.shape))


def latest_values(x: Floats, is_present: Bools | None, last: Floats) -> Floats:
    """The latest value at or before each step, [N, B, T + 1], beginning with `last`.

    Args:
        x: [N, B, T].
        is_present: bool [N, B, T], whether there is a value; None if everywhere.
        last: [N, B].
    """
    values = np.concatenate([last[..., np.newaxis], x], axis=-1)
    if is_present is None:
        return values
    has_value = np.concatenate([np.ones_like(is_present[..., :1]), is_present], axis=-1)
    index = np.maximum.accumulate(np.where(has_value, np.arange(values.shape[-1]), 0), axis=-1)
    return np.asarray(np.take_along_axis(values, index, axis=-1))


class StateParts:
    """The parts of the states of B streams, before T events and after each row's last one.

    Args:
        state: [B, S].
        lengths: int [B], 0..T.
        columns: of each part, by name.

    Attributes:
        lengths: as given.
        is_full: whether they are all T.
        after: float32 [B, S]; parts that are not stored keep their values.
    """

    def __init__(
        self,
        state: FloatRows,
        lengths: NDArray[Any],
        steps: int,
        columns: Mapping[str, slice],
    ):
        # parts are rows, so that each is contiguous
        self._before = state.T.astype(np.float64, order="C")
        self._after = state.T.astype(np.float32, order="C")
        self._columns, self.lengths = columns, lengths
        self.is_full = int(lengths.min()) == steps
        self.after: FloatRows = self._after.T

    def before(self, name: str) -> Floats:
        """A part before the events, [size, B]."""
        return np.asarray(self._before[self._columns[name]])

    def before_positive(self, name: str) -> Floats:
        """A part of numbers that are not negative: a restored state may have any."""
        return np.maximum(self.before(name), 0.0)

    def last(self, sequence: Floats) -> Floats:
        """The values [size, B] after each row's last event, of [size, B, T + 1] before the events
        and after each."""
        if self.is_full:
            return sequence[..., -1]
        return sequence[:, np.arange(len(self.lengths)), self.lengths]

    def store(self, name: str, sequence: Floats) -> None:
        """Store a part, of its values [size, B, T + 1] before the events and after each."""
        self.replace(name, self.last(sequence))

    def replace(self, name: str, values: Floats | float) -> None:
        """Store a part, of its values [size, B] after each row's last event."""
        self._after[self._columns[name]] = values

    def store_window(self, name: str, history: Floats) -> None:
        """Store a part of N x L numbers, of its history [N, B, L + T]: the last L up to the
        length."""
        size = self._columns[name].stop - self._columns[name].start
        length = size // max(len(history), 1)
        if self.is_full:
            window = history[..., history.shape[-1] - length :]
        else:
            within = self.lengths[:, np.newaxis] + np.arange(length)
            window = history[:, np.arange(len(within))[:, np.newaxis], within]
        self.after[:, self._columns[name]] = window.transpose(1, 0, 2).reshape(-1, size)


def columns_of(indexes: Sequence[int]) -> slice | NDArray[np.int64]:
    """Indexes as a slice, which makes views, where they have equal distances."""
    if len(indexes) == 1:
        return slice(indexes[0], indexes[0] + 1)
    distances = {b - a for a, b in pairwise(indexes)}
    if len(distances) == 1 and (step := distances.pop()) > 0:
        return slice(indexes[0], indexes[-1] + 1, step)
    return np.array(indexes, np.int64)
