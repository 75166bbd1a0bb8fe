"""A recurrent layer as an explicit ONNX loop, for cells without an ONNX operator.

`Scan` runs one step's nodes for every event. What does not depend on the state, the product
of the inputs and its normalisation, is computed before it for all steps at once. A step at or
beyond a row's length keeps the state, as the operators do. The equations and the names of the
weights are those of `models.networks.cells.LstmCell`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.onnx.activations import activation
from models.onnx.messages import DataType, tensor_value
from models.onnx.nodes import Nodes, Value
from models.spec.layers import NORMALISATION_EPSILON, LstmLayer


def lstm_loop(
    nodes: Nodes,
    layer: LstmLayer,
    weights: Mapping[str, NDArray[np.float32]],
    x: Value,
    lengths: Value,
    state: list[Value],
) -> tuple[Value, list[Value]]:
    """One LSTM layer with any of its options; as `models.onnx.cells.lstm`.

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
