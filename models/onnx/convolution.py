"""Causal convolution as ONNX nodes; equations in `models.networks.convolution`.

The steps that the kernel reads are put side by side, so that the convolution is one product of
matrices. Sequences are [T, B, W].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.onnx.activations import activation
from models.onnx.messages import DataType
from models.onnx.nodes import MOST, Nodes, Value
from models.spec.layers import Conv1dLayer


def causal_convolution(
    nodes: Nodes,
    layer: Conv1dLayer,
    weights: Mapping[str, NDArray[np.float32]],
    x: Value,
    lengths: Value,
    past: Value,
) -> tuple[Value, Value]:
    """One layer over a chunk.

    Args:
        x: float32 [T, B, W].
        lengths: int32 [B], each 1..T.
        past: float32 [1, B, P W], the P rows before the chunk; "" if P is 0.

    Returns:
        The sequence [T, B, units], and the last P rows up to each row's length, [1, B, P W]; ""
        if P is 0.
    """
    kernel, count = weights[f"{layer.name}.kernel"], layer.past_steps
    width = kernel.shape[1]
    rows, after = x, ""
    if count:
        shape = nodes.integers(0, count, width)
        before = nodes.add("Reshape", nodes.add("Squeeze", past, nodes.integers(0)), shape)
        rows = nodes.concat([nodes.add("Transpose", before, perm=[1, 0, 2]), x], axis=0)
        after = _last_rows(nodes, rows, lengths, count, width)
    taps = [
        nodes.part(rows, start, start - count if start < count else MOST, axis=0)
        for start in range(0, count + 1, layer.dilation)
    ]
    matrix = nodes.constant(kernel.reshape(-1, layer.units))
    y = nodes.add("MatMul", nodes.concat(taps, axis=2), matrix)
    if layer.use_bias:
        y = nodes.add("Add", y, nodes.constant(weights[f"{layer.name}.bias"]))
    return activation(nodes, layer.activation, y), after


def _last_rows(nodes: Nodes, rows: Value, lengths: Value, count: int, width: int) -> Value:
    """Rows length .. length + count - 1 of each stream: [P + T, B, W] -> [1, B, P W]."""
    first = nodes.add("Cast", lengths, to=DataType.INT64)
    steps = nodes.constant(np.arange(count, dtype=np.int64)[:, np.newaxis])
    places = nodes.add("Unsqueeze", nodes.add("Add", steps, first), nodes.integers(2))
    places = nodes.add("Expand", places, nodes.integers(1, 1, width))
    last = nodes.add("Transpose", nodes.add("GatherElements", rows, places, axis=0), perm=[1, 0, 2])
    flat = nodes.add("Reshape", last, nodes.integers(0, count * width))
    return nodes.add("Unsqueeze", flat, nodes.integers(0))
