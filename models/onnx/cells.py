"""Recurrent and bidirectional layers as ONNX operators, and Keras activations as nodes.

Keras and ONNX compute the same cells, LSTM with its gates in another order. If a weight has its
gates side by side, [..., gates * H], `_gates` reorders them for ONNX:

    LSTM        Keras i, f, c, o    ONNX i, o, f, c
    peepholes         i, f, o            i, o, f
    GRU               z, r, h            z, r, h
    simple RNN        h                  h

ONNX keeps weights transposed, [1, gates * H, in], and two biases, one added to x W and one to h R.
Keras' GRU has both with `reset_after` (ONNX: `linear_before_reset`); every other cell has the
first, and the second is zero.

Sequences are [T, B, width] and state parts [1, B, H], as the operators expect.

Cells without an ONNX operator are an explicit loop: `Scan` runs one step's nodes for every event.
What does not depend on the state, the product of the inputs and its normalisation, is computed
before it for all steps at once. A step at or beyond a row's length keeps the state, as the
operators do. The equations and the names of the weights are those of `models.networks.cells`.

A bidirectional layer is two operators, one of them with direction `reverse`, which reverse by each
row's length, as Keras does under a mask; each direction keeps its own state value. In blocks
(`models.spec.blocks`) the steps are those of a window: a forward operator runs over the block and
another goes on over the lookahead, and the state between them is the one that is carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import GraphUnsupportedError
from models.onnx.messages import MOST, DataType, Nodes, Value, tensor_value
from models.spec.blocks import BlockSpec
from models.spec.layers import (
    NORMALISATION_EPSILON,
    ActivationName,
    BidirectionalLayer,
    Cell,
    GruLayer,
    LstmLayer,
    SimpleRnnLayer,
)

_HARD_SIGMOID = {"alpha": 1 / 6, "beta": 0.5}
_LEAKY_SLOPE = 0.2
_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "hard_sigmoid": ("HardSigmoid", _HARD_SIGMOID),
    "tanh": ("Tanh", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "elu": ("Elu", {"alpha": 1.0}),
    "selu": ("Selu", {}),
    "exponential": ("Exp", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": _LEAKY_SLOPE}),
    "hard_silu": ("HardSwish", {}),
    "log_softmax": ("LogSoftmax", {"axis": -1}),
}


_NOT_IN_CELLS = ("selu", "exponential", "hard_silu", "log_softmax")
_CELL_FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("Affine", {"alpha": 1.0, "beta": 0.0}),
    **{name: own for name, own in _NODES.items() if name not in _NOT_IN_CELLS},
}
"""The functions that recurrent operators have inside; the numbers only if one takes them."""

Weights = Mapping[str, NDArray[np.float32]]

LSTM_GATES = (0, 3, 1, 2)
PEEPHOLE_GATES = (0, 2, 1)
"""Order of ONNX' gates among Keras'; an LSTM's peepholes are i, f, o and in ONNX i, o, f."""


def activation(nodes: Nodes, name: ActivationName, x: Value) -> Value:
    """The activation of every value; softmax and its logarithm over the last axis."""
    match name:
        case "linear":
            return x
        case "softmax":
            return nodes.add("Softmax", x, axis=-1)
        case "silu":
            return nodes.add("Mul", x, nodes.add("Sigmoid", x))
        case "mish":
            return nodes.add("Mul", x, nodes.add("Tanh", nodes.add("Softplus", x)))
        case "relu6":
            return nodes.add("Min", nodes.add("Relu", x), nodes.number(6.0))
        case "gelu":
            # x / 2 (1 + erf(x / sqrt 2))
            error = nodes.add("Erf", nodes.add("Mul", x, nodes.number(1 / sqrt(2))))
            share = nodes.add("Add", error, nodes.number(1.0))
            return nodes.add("Mul", nodes.add("Mul", x, nodes.number(0.5)), share)
    operator, attributes = _NODES[name]
    return nodes.add(operator, x, **attributes)


def recurrent(
    nodes: Nodes,
    cell: Cell,
    weights: Weights,
    x: Value,
    lengths: Value,
    state: list[Value],
    direction: str | None = None,
) -> tuple[Value, list[Value]]:
    """One recurrent layer of one direction.

    Args:
        x: float32 [T, B, in].
        lengths: int32 [B], valid steps of each row.
        state: hidden, and of an LSTM carry, float32 [1, B, H].
        direction: forward, or `reverse`: from each row's last valid step to its first.

    Returns:
        The sequence [T, B, H], and the state after a row's length.

    Raises:
        GraphUnsupportedError: an activation that the operator does not have.
    """
    names = [cell.activation]
    gates: tuple[int, ...]
    options: dict[str, Any] = {}
    match cell:
        case LstmLayer() if cell.layer_normalization or cell.projection is not None:
            return _lstm_loop(nodes, cell, weights, x, lengths, state)
        case LstmLayer():
            operator, gates = "LSTM", LSTM_GATES
            names = [cell.recurrent_activation, cell.activation, cell.activation]
        case GruLayer():
            operator, gates = "GRU", (0, 1, 2)
            names = [cell.recurrent_activation, cell.activation]
            options["linear_before_reset"] = int(cell.reset_after)
        case SimpleRnnLayer():
            operator, gates = "RNN", (0,)
    inputs = [x, *_constants(nodes, cell, weights, gates), lengths, *state]
    if isinstance(cell, LstmLayer) and cell.peepholes:
        peepholes = weights[f"{cell.name}.peepholes"][np.newaxis]
        inputs.append(nodes.constant(_gates(peepholes, PEEPHOLE_GATES)))
    sequence, *after = nodes.add_many(
        operator,
        *inputs,
        count=1 + len(state),
        hidden_size=cell.units,
        direction=direction,
        **options,
        **_functions(cell.name, names),
    )
    return nodes.add("Squeeze", sequence, nodes.integers(1)), after


def _constants(nodes: Nodes, layer: Cell, weights: Weights, order: tuple[int, ...]) -> list[Value]:
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


def _gates(weight: NDArray[np.float32], order: tuple[int, ...]) -> NDArray[np.float32]:
    """Reorder gates as ONNX has them: [..., gates * H] -> [..., gates * H]."""
    blocks = weight.reshape(*weight.shape[:-1], len(order), -1)
    return blocks[..., order, :].reshape(weight.shape)


def _functions(layer: str, names: list[ActivationName]) -> dict[str, Any]:
    """The operator's attributes; its numbers are given in order, to those that take any."""
    for name in names:
        if name not in _CELL_FUNCTIONS:
            raise GraphUnsupportedError(
                f"layer {layer!r}: ONNX' recurrent operators have no activation {name!r}, "
                f"expected one of {sorted(_CELL_FUNCTIONS)}"
            )
    functions = [_CELL_FUNCTIONS[name] for name in names]
    return {
        "activations": [operator for operator, _ in functions],
        "activation_alpha": [own["alpha"] for _, own in functions if "alpha" in own] or None,
        "activation_beta": [own["beta"] for _, own in functions if "beta" in own] or None,
    }


def _lstm_loop(
    nodes: Nodes,
    layer: LstmLayer,
    weights: Weights,
    x: Value,
    lengths: Value,
    state: list[Value],
) -> tuple[Value, list[Value]]:
    """One LSTM layer with any of its options; as `lstm`.

    Beyond a row's length the sequence repeats the row's last hidden part.
    """
    own = {
        name.rpartition(".")[2]: nodes.constant(weight)
        for name, weight in weights.items()
        if name.rpartition(".")[0] == layer.name
    }
    x_part = nodes.add("MatMul", x, own["kernel"])
    if layer.layer_normalization:
        x_part = _normalise(nodes, x_part, own["kernel_gamma"])
    if layer.use_bias:
        x_part = nodes.add("Add", x_part, own["bias"])
    squeezed = [nodes.add("Squeeze", part, nodes.integers(0)) for part in state]
    names = {
        part: nodes.name() for part in ("hidden", "carry", "x_part", "valid", "h", "c", "sequence")
    }
    body = nodes.inner()
    hidden, carry = _lstm_step(body, layer, own, names["x_part"], names["hidden"], names["carry"])
    body.add("Where", names["valid"], hidden, names["hidden"], name=names["h"])
    body.add("Where", names["valid"], carry, names["carry"], name=names["c"])
    body.add("Identity", names["h"], name=names["sequence"])
    body.graph.name = b"one_step"
    for side, part, dtype, size in (
        (body.graph.input, "hidden", DataType.FLOAT32, layer.width),
        (body.graph.input, "carry", DataType.FLOAT32, layer.units),
        (body.graph.input, "x_part", DataType.FLOAT32, 4 * layer.units),
        (body.graph.input, "valid", DataType.BOOL, 1),
        (body.graph.output, "h", DataType.FLOAT32, layer.width),
        (body.graph.output, "c", DataType.FLOAT32, layer.units),
        (body.graph.output, "sequence", DataType.FLOAT32, layer.width),
    ):
        side.append(tensor_value(names[part], dtype, ["B", size]))
    after, carry_after, sequence = nodes.add_many(
        "Scan",
        *squeezed,
        x_part,
        _valid(nodes, x, lengths),
        count=3,
        body=body.graph,
        num_scan_inputs=2,
    )
    lifted = [nodes.add("Unsqueeze", part, nodes.integers(0)) for part in (after, carry_after)]
    return sequence, lifted


def _lstm_step(
    body: Nodes,
    layer: LstmLayer,
    own: Mapping[str, Value],
    x_part: Value,
    hidden: Value,
    carry: Value,
) -> tuple[Value, Value]:
    """h', c' of one step; `x_part` is the normalised x W + b, [B, 4 * U]."""
    gate, squash = layer.recurrent_activation, layer.activation
    h_part = body.add("MatMul", hidden, own["recurrent_kernel"])
    if layer.layer_normalization:
        h_part = _normalise(body, h_part, own["recurrent_gamma"])
    in_i, in_f, in_g, in_o = body.split(body.add("Add", x_part, h_part), [layer.units] * 4, axis=1)
    peeps: list[Value] = []
    if layer.peepholes:
        peeps = body.split(own["peepholes"], [layer.units] * 3, axis=0)
        in_i = body.add("Add", in_i, body.add("Mul", peeps[0], carry))
        in_f = body.add("Add", in_f, body.add("Mul", peeps[1], carry))
    retained = body.add("Mul", activation(body, gate, in_f), carry)
    added = body.add("Mul", activation(body, gate, in_i), activation(body, squash, in_g))
    carry = body.add("Add", retained, added)
    if layer.peepholes:
        in_o = body.add("Add", in_o, body.add("Mul", peeps[2], carry))
    exposed = carry
    if layer.layer_normalization:
        exposed = _normalise(body, carry, own["carry_gamma"], own["carry_beta"])
    hidden = body.add("Mul", activation(body, gate, in_o), activation(body, squash, exposed))
    if layer.projection is not None:
        hidden = body.add("MatMul", hidden, own["projection"])
    return hidden, carry


def _normalise(nodes: Nodes, x: Value, gamma: Value, beta: Value = "") -> Value:
    inputs = [x, gamma, beta] if beta else [x, gamma]
    return nodes.add("LayerNormalization", *inputs, axis=-1, epsilon=NORMALISATION_EPSILON)


def _valid(nodes: Nodes, x: Value, lengths: Value) -> Value:
    """Which steps lie before their row's length: bool [T, B, 1]."""
    indices = nodes.add("Unsqueeze", nodes.steps(x), nodes.integers(1, 2))
    rows = nodes.add("Cast", lengths, to=DataType.INT64)
    return nodes.add("Less", indices, nodes.add("Unsqueeze", rows, nodes.integers(0, 2)))


class WindowSteps(NamedTuple):
    """The valid steps of each row, int32 [B], and in blocks also how they are divided.

    Attributes:
        lengths: of the whole row.
        block: of its block; "" if there are no blocks, or no lookahead.
        lookahead: of its lookahead.
        size: C, where the lookahead begins.
    """

    lengths: Value
    block: Value = ""
    lookahead: Value = ""
    size: int = 0

    @classmethod
    def of(cls, nodes: Nodes, lengths: Value, blocks: BlockSpec | None) -> WindowSteps:
        """The steps of a network with these blocks, if it has any."""
        if blocks is None or not blocks.lookahead:
            return cls(lengths)
        size, zero = (nodes.constant(np.array(n, np.int32)) for n in (blocks.size, 0))
        block = nodes.add("Min", lengths, size)
        lookahead = nodes.add("Max", nodes.add("Sub", lengths, size), zero)
        return cls(lengths, block, lookahead, blocks.size)


def forward(
    nodes: Nodes,
    cell: Cell,
    weights: Weights,
    x: Value,
    steps: WindowSteps,
    initial: list[Value],
) -> tuple[Value, list[Value]]:
    """A forward cell: the sequence, and the states after the last step, or after the block."""
    if not steps.block:
        return recurrent(nodes, cell, weights, x, steps.lengths, initial)
    block, lookahead = nodes.part(x, 0, steps.size, axis=0), nodes.part(x, steps.size, MOST, axis=0)
    first, after = recurrent(nodes, cell, weights, block, steps.block, initial)
    second, _ = recurrent(nodes, cell, weights, lookahead, steps.lookahead, after)
    return nodes.concat([first, second], axis=0), after


def bidirectional(
    nodes: Nodes,
    layer: BidirectionalLayer,
    weights: Weights,
    x: Value,
    steps: WindowSteps,
    initial: list[Value],
) -> tuple[Value, list[Value]]:
    """Both directions of a layer.

    Args:
        x: float32 [T, B, in].
        steps: valid steps of each row.
        initial: the states of the forward cell, then of the backward cell, each [1, B, H], or
            "" for zero.

    Returns:
        The merged sequence [T, B, width] and the states after, in the order of `initial`.
    """
    half = len(initial) // 2
    ahead_cell, back_cell = layer.directions
    forward_outputs, after = forward(nodes, ahead_cell, weights, x, steps, initial[:half])
    backward_outputs, after_back = recurrent(
        nodes, back_cell, weights, x, steps.lengths, initial[half:], "reverse"
    )
    return _merge(nodes, layer, forward_outputs, backward_outputs), [*after, *after_back]


def _merge(
    nodes: Nodes, layer: BidirectionalLayer, forward_outputs: Value, backward_outputs: Value
) -> Value:
    match layer.merge:
        case "concat":
            return nodes.concat([forward_outputs, backward_outputs], axis=2)
        case "mul":
            return nodes.add("Mul", forward_outputs, backward_outputs)
    total = nodes.add("Add", forward_outputs, backward_outputs)
    return total if layer.merge == "sum" else nodes.add("Div", total, nodes.number(2.0))
