"""The printed tables of "Returning the hidden state in keras RNNs with return_state".

The post prints what one-unit layers return for five inputs, to eight decimals, but not their
weights; the weights here were solved for, so that the same layers give the same numbers.
"""

from __future__ import annotations

import numpy as np

from models.spec import ModelSpec, parse_spec

INPUT = (0.1, 0.2, 0.3, 0.4, 0.5)
PRINTED = 2e-8
"""Largest difference that still agrees with eight printed decimals."""

LSTM_OUTPUTS = (0.00734747, 0.02000349, 0.03651035, 0.05576567, 0.07689518)
LSTM_HIDDEN = 0.07689518
LSTM_CARRY = 0.15496857
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

GRU_OUTPUTS = (0.02443524, 0.06332285, 0.1107745, 0.16312647, 0.21796873)
GRU_HIDDEN = 0.21796873
GRU_KERNEL = (0.16116131133056427, 0.00516463009902529, 0.49307392126638067)
GRU_RECURRENT_KERNEL = (-0.4339989510650185, 0.8121823896194228, 0.3898777711880326)


def post_model(kind: str) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """The post's one-unit layer, `lstm` or `gru`, and its weights."""
    spec = parse_spec(
        {
            "name": f"post-{kind}",
            "features": 1,
            "layers": [{"kind": kind, "units": 1, "name": "cell"}],
            "heads": [{"kind": "sequence", "name": "output"}],
        }
    )
    if kind == "lstm":
        kernel, recurrent = LSTM_KERNEL, LSTM_RECURRENT_KERNEL
        bias = np.array(LSTM_BIAS, np.float32)
    else:
        kernel, recurrent = GRU_KERNEL, GRU_RECURRENT_KERNEL
        bias = np.zeros((2, 3), np.float32)
    return spec, {
        "cell.kernel": np.array([kernel], np.float32),
        "cell.recurrent_kernel": np.array([recurrent], np.float32),
        "cell.bias": bias,
    }
