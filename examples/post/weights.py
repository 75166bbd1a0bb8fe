"""Weights with which one-unit layers return what the post on `return_state` prints.

The post shows the outputs of an LSTM and a GRU for five inputs, to eight decimals, but not
their weights, which were random. These were solved for, so that the same layers return the same
numbers; `tests/support/post_tables.py` holds what was printed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

LSTM_KERNEL = (
    -0.4447798843820714,
    0.46231304374295984,
    0.30179282527343426,
    -0.07272730458424718,
)
LSTM_RECURRENT_KERNEL = (
    -0.7263635029979324,
    -0.12025956274825447,
    0.13120876679180524,
    0.6638659191411659,
)
LSTM_BIAS = (0.0, 1.0, 0.0, 0.0)

PEEPHOLES = (0.8, -0.4, 0.6)
"""Of input, forget and output gate; chosen, for the post has no peepholes."""

GRU_KERNEL = (0.16116131133056427, 0.00516463009902529, 0.49307392126638067)
GRU_RECURRENT_KERNEL = (-0.4339989510650185, 0.8121823896194228, 0.3898777711880326)


def known_weights(model: str) -> dict[str, NDArray[np.float32]]:
    """The weights of a one-unit layer named `cell`.

    Args:
        model: `lstm` and `gru` return the post's numbers; `peephole` is the same LSTM with
            `PEEPHOLES` added.
    """
    weights: dict[str, ArrayLike] = {
        "kernel": [LSTM_KERNEL],
        "recurrent_kernel": [LSTM_RECURRENT_KERNEL],
        "bias": LSTM_BIAS,
    }
    if model == "peephole":
        weights["peepholes"] = PEEPHOLES
    if model == "gru":
        weights = {
            "kernel": [GRU_KERNEL],
            "recurrent_kernel": [GRU_RECURRENT_KERNEL],
            "bias": np.zeros((2, 3)),
        }
    return {f"cell.{name}": np.array(value, np.float32) for name, value in weights.items()}
