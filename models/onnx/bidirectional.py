"""Bidirectional layers as two ONNX operators, one of them with direction `reverse`.

The operators reverse by each row's length, as Keras does under a mask. Two operators in place of
one with direction `bidirectional`: each direction keeps its own state value, and the two
sequences are merged as Keras merges them.

In blocks (`models.spec.blocks`) the steps are those of a window: a forward operator runs over the
block and another goes on over the lookahead, and the state between them is the one that is carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.onnx.cells import gru, lstm, simple_rnn
from models.onnx.nodes import MOST, Nodes, Value
from models.spec.blocks import BlockSpec
from models.spec.layers import BidirectionalLayer, Cell, GruLayer, LstmLayer

Weights = Mapping[str, NDArray[np.float32]]


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
        return _run(nodes, cell, weights, x, steps.lengths, initial)
    block, lookahead = nodes.part(x, 0, steps.size, axis=0), nodes.part(x, steps.size, MOST, axis=0)
    first, after = _run(nodes, cell, weights, block, steps.block, initial)
    second, _ = _run(nodes, cell, weights, lookahead, steps.lookahead, after)
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
    backward_outputs, after_back = _run(
        nodes, back_cell, weights, x, steps.lengths, initial[half:], "reverse"
    )
    return _merge(nodes, layer, forward_outputs, backward_outputs), [*after, *after_back]


def _run(
    nodes: Nodes,
    cell: Cell,
    weights: Weights,
    x: Value,
    lengths: Value,
    initial: list[Value],
    direction: str | None = None,
) -> tuple[Value, list[Value]]:
    if isinstance(cell, LstmLayer):
        return lstm(nodes, cell, weights, x, lengths, initial, direction)
    if isinstance(cell, GruLayer):
        return gru(nodes, cell, weights, x, lengths, initial, direction)
    return simple_rnn(nodes, cell, weights, x, lengths, initial, direction)


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
