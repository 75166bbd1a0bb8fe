"""LSTM, GRU and simple RNN layers as ONNX operators.

Keras and ONNX compute the same cells, LSTM with its gates in another order. If a weight has
its gates side by side, [..., gates * H], `_gates` reorders them for ONNX:

    LSTM        Keras i, f, c, o    ONNX i, o, f, c
    peepholes         i, f, o            i, o, f
    GRU               z, r, h            z, r, h
    simple RNN        h                  h

ONNX keeps weights transposed, [1, gates * H, in], and two biases, one added to x W and one to
h R. Keras' GRU has both with `reset_after` (ONNX: `linear_before_reset`); every other cell has
the first, and the second is zero.

Sequences are [T, B, width] and state parts [1, B, H], as the operators expect.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.onnx.activations import CellFunction, cell_function
from models.onnx.nodes import Nodes, Value
from models.onnx.recurrence import lstm_loop
from models.spec.layers import ActivationName, Cell, GruLayer, LstmLayer, SimpleRnnLayer

Floats = NDArray[np.float32]

LSTM_GATES = (0, 3, 1, 2)
GRU_GATES = (0, 1, 2)
RNN_GATES = (0,)
PEEPHOLE_GATES = (0, 2, 1)
"""Order of ONNX' gates among Keras'; an LSTM's peepholes are i, f, o and in ONNX i, o, f."""


def lstm(
    nodes: Nodes,
    layer: LstmLayer,
    weights: Mapping[str, Floats],
    x: Value,
    lengths: Value,
    state: list[Value],
    direction: str | None = None,
) -> tuple[Value, list[Value]]:
    """One LSTM layer.

    Args:
        x: float32 [T, B, in].
        lengths: int32 [B], valid steps of each row.
        state: hidden and carry, float32 [1, B, H].
        direction: forward, or `reverse`: from each row's last valid step to its first.

    Returns:
        The sequence [T, B, H], and hidden and carry after a row's length.

    Raises:
        GraphUnsupportedError: an activation that the operator does not have.
    """
    if layer.layer_normalization or layer.projection is not None:
        return lstm_loop(nodes, layer, weights, x, lengths, state)
    hidden, carry = state
    functions = _functions(
        layer.name, layer.recurrent_activation, layer.activation, layer.activation
    )
    sequence, after, carry_after = nodes.add_many(
        "LSTM",
        x,
        *_constants(nodes, layer, weights, LSTM_GATES),
        lengths,
        hidden,
        carry,
        *_peepholes(nodes, layer, weights),
        count=3,
        hidden_size=layer.units,
        direction=direction,
        **functions,
    )
    return nodes.add("Squeeze", sequence, nodes.integers(1)), [after, carry_after]


def gru(
    nodes: Nodes,
    layer: GruLayer,
    weights: Mapping[str, Floats],
    x: Value,
    lengths: Value,
    state: list[Value],
    direction: str | None = None,
) -> tuple[Value, list[Value]]:
    """One GRU layer; as `lstm`, with the hidden part alone."""
    sequence, after = nodes.add_many(
        "GRU",
        x,
        *_constants(nodes, layer, weights, GRU_GATES),
        lengths,
        *state,
        count=2,
        hidden_size=layer.units,
        direction=direction,
        linear_before_reset=int(layer.reset_after),
        **_functions(layer.name, layer.recurrent_activation, layer.activation),
    )
    return nodes.add("Squeeze", sequence, nodes.integers(1)), [after]


def simple_rnn(
    nodes: Nodes,
    layer: SimpleRnnLayer,
    weights: Mapping[str, Floats],
    x: Value,
    lengths: Value,
    state: list[Value],
    direction: str | None = None,
) -> tuple[Value, list[Value]]:
    """One simple RNN layer; as `gru`."""
    sequence, after = nodes.add_many(
        "RNN",
        x,
        *_constants(nodes, layer, weights, RNN_GATES),
        lengths,
        *state,
        count=2,
        hidden_size=layer.units,
        direction=direction,
        **_functions(layer.name, layer.activation),
    )
    return nodes.add("Squeeze", sequence, nodes.integers(1)), [after]


def _constants(
    nodes: Nodes, layer: Cell, weights: Mapping[str, Floats], order: tuple[int, ...]
) -> list[Value]:
    """The operator's W [1, gates * H, in], R [1, gates * H, H] and B [1, 2 * gates * H]."""
    width = len(order) * layer.units
    biases = np.zeros((2, width), np.float32)
    if layer.use_bias:
        bias = weights[f"{layer.name}.bias"]
        biases[: 1 if bias.ndim == 1 else 2] = bias
    matrices = [weights[f"{layer.name}.{kind}"] for kind in ("kernel", "recurrent_kernel")]
    return [
        *(nodes.constant(_gates(matrix, order).T[np.newaxis]) for matrix in matrices),
        nodes.constant(_gates(biases, order).reshape(1, -1)),
    ]


def _peepholes(nodes: Nodes, layer: LstmLayer, weights: Mapping[str, Floats]) -> list[Value]:
    """The operator's P [1, 3 * H], if there is one."""
    if not layer.peepholes:
        return []
    peepholes = weights[f"{layer.name}.peepholes"][np.newaxis]
    return [nodes.constant(_gates(peepholes, PEEPHOLE_GATES))]


def _gates(weight: Floats, order: tuple[int, ...]) -> Floats:
    """The same gates in ONNX' order: [..., gates * H] -> [..., gates * H]."""
    blocks = weight.reshape(*weight.shape[:-1], len(order), -1)
    return blocks[..., order, :].reshape(weight.shape)


def _functions(layer: str, *names: ActivationName) -> dict[str, list[str] | list[float] | None]:
    """The operator's attributes; its numbers are given in order, to those that take any."""
    functions: list[CellFunction] = [cell_function(layer, name) for name in names]
    alphas = [function.alpha for function in functions if function.alpha is not None]
    betas = [function.beta for function in functions if function.beta is not None]
    return {
        "activations": [function.name for function in functions],
        "activation_alpha": alphas or None,
        "activation_beta": betas or None,
    }
