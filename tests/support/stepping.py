"""Calls a runtime like the engine: pads ragged rows to its shape, and drops the padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.engine.runtimes.base import Runtime

Floats = NDArray[np.float32]


def step(
    runtime: Runtime,
    rows: Sequence[Floats],
    states: Floats,
    *,
    more_rows: int = 0,
    more_steps: int = 0,
) -> tuple[list[Floats], Floats]:
    """One call.

    Args:
        rows: B streams' rows, float32 [T_b, F].
        states: float32 [B, N].
        more_rows: padding rows asked for beyond B.
        more_steps: padding steps asked for beyond the longest.

    Returns:
        Outputs float32 [T_b, O] of each stream, and the states after, float32 [B, N].
    """
    longest = max(len(row) for row in rows)
    size, steps = runtime.padded_shape(len(rows) + more_rows, longest + more_steps)
    batch = np.zeros((size, steps, rows[0].shape[1]), np.float32)
    lengths = np.ones(size, np.int32)
    padded = np.zeros((size, states.shape[1]), np.float32)
    for index, row in enumerate(rows):
        batch[index, : len(row)] = row
        lengths[index] = len(row)
    padded[: len(rows)] = states
    outputs, after = runtime.step(batch, lengths, padded)
    assert outputs.shape[:2] == (size, steps)
    found = [outputs[index, : len(row)] for index, row in enumerate(rows)]
    return found, after[: len(rows)]


def in_cuts(
    runtime: Runtime, rows: Floats, state: Floats, cuts: Sequence[int]
) -> tuple[Floats, Floats]:
    """One stream alone, [T, F], chunk after chunk of these lengths; outputs and state [N]."""
    assert sum(cuts) == len(rows)
    outputs, at = [], 0
    for length in cuts:
        (found,), after = step(runtime, [rows[at : at + length]], state[np.newaxis])
        outputs.append(found)
        state = after[0]
        at += length
    return np.concatenate(outputs), state
