"""Bidirectional layers over Keras cells: Keras' `Bidirectional`, with its states explicit.

Schuster & Paliwal, "Bidirectional recurrent neural networks" (1997): at step t the forward cell has
read steps 1..t, the backward cell steps T..t, T the last valid step of the row; `merge` combines
both. States are in the order of Keras' wrapper: h and c forward, h and c backward.

In blocks (`models.spec.blocks`) the steps are those of a window. A forward cell runs over the block
and the lookahead, and returns its state after the block; a backward cell starts from zero at the
end of the window, and its final state is discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from models.networks.heads import Tensor
from models.spec.blocks import BlockSpec
from models.spec.layers import BidirectionalLayer

_MERGES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": lambda forward, backward: tf.concat([forward, backward], axis=-1),
    "sum": lambda forward, backward: forward + backward,
    "mul": lambda forward, backward: forward * backward,
    "ave": lambda forward, backward: (forward + backward) / 2,
}


def run_forward(
    cell: Any,
    x: Tensor,
    initial: Sequence[Tensor],
    mask: Tensor,
    training: bool,
    blocks: BlockSpec | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a forward cell over a batch; arguments as for `run_bidirectional`, for the one cell.

    Returns:
        The sequence [B, T, H], and the states after the last step, or in blocks after the block.
    """
    if blocks is None or not blocks.lookahead:
        sequence, *after = cell(x, initial_state=list(initial), mask=mask, training=training)
        return sequence, after
    size = blocks.size
    block, after = run_forward(cell, x[:, :size], initial, mask[:, :size], training, None)
    lookahead, _ = run_forward(cell, x[:, size:], after, mask[:, size:], training, None)
    return tf.concat([block, lookahead], axis=1), after


def run_bidirectional(
    layer: BidirectionalLayer,
    cells: Sequence[Any],
    x: Tensor,
    initial: Sequence[Tensor],
    mask: Tensor,
    training: bool,
    blocks: BlockSpec | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run both directions over a batch.

    Args:
        cells: the Keras layers, forward and backward, each returning sequence and states.
        x: float32 [B, T, in].
        initial: the states of the forward cell, then of the backward cell, each [B, H]; in
            blocks those of the backward cell are not read.
        mask: bool [B, T], True at valid steps, which come first.
        training: whether dropout is active.
        blocks: the blocks that the steps are a window of, if they are.

    Returns:
        The merged sequence [B, T, width] and the states after, in the order of `initial`.
    """
    forward, backward = cells
    half = len(initial) // 2
    forward_outputs, after = run_forward(forward, x, initial[:half], mask, training, blocks)
    backward_initial = list(initial[half:])
    if blocks is not None:
        backward_initial = [tf.zeros((tf.shape(x)[0], layer.units)) for _ in backward_initial]
    # reversed as a whole, so the padding comes first, where it is masked
    backward_outputs, *after_back = backward(
        tf.reverse(x, [1]),
        initial_state=backward_initial,
        mask=tf.reverse(mask, [1]),
        training=training,
    )
    outputs = _MERGES[layer.merge](forward_outputs, tf.reverse(backward_outputs, [1]))
    return outputs, [*after, *after_back]
