"""Attention with context as ONNX nodes; equations in `models.networks.layers`.

Sequences are [T, B, W], state parts [1, B, size]. Over the stream all steps of a call are summed
at once, in float64, from the state before it: memory grows with T squared. Calls are short if
the engine may slice them; otherwise T is limited to `MAX_STEPS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.errors import GraphUnsupportedError
from models.onnx.heads import dense
from models.onnx.messages import DataType, Nodes, Value
from models.spec.layers import EMPTY_MAXIMUM, MASKED_SCORE, AttentionLayer

Weights = Mapping[str, NDArray[np.float32]]

MAX_STEPS = 2048
"""T of the longest call with attention over the stream. Each pair of its steps takes 24 bytes while
they are summed: 100 MB a row."""


def check_steps(layer: AttentionLayer, chunk_limit: int | None) -> None:
    """Reject attention over the stream in calls that would exhaust the memory.

    Args:
        chunk_limit: of the model.

    Raises:
        GraphUnsupportedError
    """
    if chunk_limit is not None and chunk_limit > MAX_STEPS:
        raise GraphUnsupportedError(
            f"layer {layer.name!r}: a graph holds attention over the stream for calls of at most "
            f"{MAX_STEPS} steps, got max_chunk_steps {chunk_limit}"
        )


def over_chunk(
    nodes: Nodes, layer: AttentionLayer, weights: Weights, x: Value, lengths: Value
) -> tuple[Value, Value]:
    """One layer over the valid steps of each row.

    Args:
        x: float32 [T, B, W].
        lengths: int32 [B].

    Returns:
        The value, the same at every step, [T, B, W], and the weights [T, B, 1], 0 beyond a
        row's length.
    """
    steps = nodes.add("Unsqueeze", nodes.steps(x), nodes.integers(1))
    valid = nodes.add("Less", steps, nodes.add("Cast", lengths, to=DataType.INT64))
    valid = nodes.add("Unsqueeze", valid, nodes.integers(2))
    scores = nodes.add(
        "Where", valid, _scores(nodes, layer, weights, x), nodes.number(MASKED_SCORE)
    )
    shares = nodes.add("Softmax", scores, axis=0)
    value = nodes.add("ReduceSum", nodes.add("Mul", shares, x), nodes.integers(0), keepdims=1)
    return nodes.add("Expand", value, nodes.add("Shape", x)), shares


def over_stream(
    nodes: Nodes,
    layer: AttentionLayer,
    weights: Weights,
    x: Value,
    lengths: Value,
    state: list[Value],
    width: int,
) -> tuple[Value, list[Value]]:
    """One layer over everything up to each step.

    Args:
        x: float32 [T, B, W].
        lengths: int32 [B], each 1..T.
        state: maximum [1, B, 1], normaliser [1, B, 2] and sum [1, B, 2 W].
        width: W.

    Returns:
        The values [T, B, W], and the state after each row's last valid step.
    """
    start, normaliser_before, total_before = _exact(nodes, state, width)
    exact = _double(nodes, nodes.add("Transpose", x, perm=[1, 0, 2]))
    scores = _double(
        nodes, nodes.add("Transpose", _scores(nodes, layer, weights, x), perm=[1, 2, 0])
    )
    steps = nodes.steps(x)
    causal = nodes.add("GreaterOrEqual", nodes.add("Unsqueeze", steps, nodes.integers(1)), steps)
    nothing = nodes.constant(np.array(EMPTY_MAXIMUM, np.float64))
    pairs = nodes.add("Where", causal, scores, nothing)
    maximum = nodes.add("ReduceMax", pairs, nodes.integers(2), keepdims=1)
    maximum = nodes.add("Max", maximum, start)
    shares = nodes.add("Exp", nodes.add("Sub", pairs, maximum))
    decay = nodes.add("Exp", nodes.add("Sub", start, maximum))
    normaliser = nodes.add(
        "Add",
        nodes.add("Mul", decay, normaliser_before),
        nodes.add("ReduceSum", shares, nodes.integers(2), keepdims=1),
    )
    total = nodes.add(
        "Add", nodes.add("Mul", decay, total_before), nodes.add("MatMul", shares, exact)
    )
    values = nodes.add("Cast", nodes.add("Div", total, normaliser), to=DataType.FLOAT32)
    sums = nodes.concat([maximum, normaliser, total], axis=2)
    last = nodes.add("Cast", lengths, to=DataType.INT64)
    last = nodes.add("Sub", last, nodes.integers(1))
    last = nodes.add("Unsqueeze", last, nodes.integers(1, 2))
    last = nodes.add("Expand", last, nodes.integers(1, 1, 2 + width))
    final = nodes.split(nodes.add("GatherElements", sums, last, axis=1), [1, 1, width], axis=2)
    after = [
        nodes.add("Cast", final[0], to=DataType.FLOAT32),
        *(_parts(nodes, value) for value in final[1:]),
    ]
    return nodes.add("Transpose", values, perm=[1, 0, 2]), [
        nodes.add("Transpose", part, perm=[1, 0, 2]) for part in after
    ]


def _scores(nodes: Nodes, layer: AttentionLayer, weights: Weights, x: Value) -> Value:
    """s_t: float32 [T, B, 1]."""
    hidden = nodes.add("Tanh", dense(nodes, weights, layer.name, x))
    context = weights[f"{layer.name}.context"][:, np.newaxis]
    return nodes.add("MatMul", hidden, nodes.constant(context))


def _exact(nodes: Nodes, state: list[Value], width: int) -> tuple[Value, Value, Value]:
    """Maximum, normaliser and sum, float64 [B, 1, size]."""
    maximum, normaliser, total = (
        _double(nodes, nodes.add("Transpose", part, perm=[1, 0, 2])) for part in state
    )
    high, low = nodes.split(normaliser, [1, 1], axis=2)
    started = nodes.add("Greater", high, nodes.constant(np.array(0, np.float64)))
    maximum = nodes.add(
        "Where", started, maximum, nodes.constant(np.array(EMPTY_MAXIMUM, np.float64))
    )
    highs, lows = nodes.split(total, [width, width], axis=2)
    return maximum, nodes.add("Add", high, low), nodes.add("Add", highs, lows)


def _parts(nodes: Nodes, value: Value) -> Value:
    """A float64 [..., n] as float32 [..., 2 n]: what float32 holds of it, and the rest."""
    high = nodes.add("Cast", value, to=DataType.FLOAT32)
    low = nodes.add("Sub", value, _double(nodes, high))
    return nodes.concat([high, nodes.add("Cast", low, to=DataType.FLOAT32)], axis=2)


def _double(nodes: Nodes, value: Value) -> Value:
    return nodes.add("Cast", value, to=DataType.FLOAT64)
