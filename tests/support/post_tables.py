"""The printed tables of "Returning the hidden state in keras RNNs with return_state".

The post prints what one-unit layers return for five inputs, to eight decimals, but not their
weights; those of `examples.post.weights` were solved for, so that the same layers give
the same numbers.
"""

from __future__ import annotations

import numpy as np

from examples.post.weights import known_weights
from models.spec.model import ModelSpec, parse_spec

INPUT = (0.1, 0.2, 0.3, 0.4, 0.5)
PRINTED = 2e-8
"""Largest difference that still agrees with eight printed decimals."""

LSTM_OUTPUTS = (0.00734747, 0.02000349, 0.03651035, 0.05576567, 0.07689518)
LSTM_HIDDEN = 0.07689518
LSTM_CARRY = 0.15496857

GRU_OUTPUTS = (0.02443524, 0.06332285, 0.1107745, 0.16312647, 0.21796873)
GRU_HIDDEN = 0.21796873

OUTPUTS = {"lstm": LSTM_OUTPUTS, "gru": GRU_OUTPUTS}
STATES = {
    "lstm": {"cell.hidden": LSTM_HIDDEN, "cell.carry": LSTM_CARRY},
    "gru": {"cell.hidden": GRU_HIDDEN},
}


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
    return spec, known_weights(kind)
