"""Layers other than Keras' own, as TensorFlow ops: activations, convolution, attention, directions.

**Causal convolution.** With x_t the layer's input at step t, k the kernel size and d the dilation:

    y_t = a(sum_j x_(t - (k - 1 - j) d) W_j + b)        j = 0 .. k - 1

as Keras' `Conv1D` with `padding="causal"`, which reads zeros before the sequence. Here it reads the
last (k - 1) d rows of the chunks before, which are the layer's state; a new stream has zeros.

**Attention with context.** Yang et al., "Hierarchical attention networks for document
classification", 2016. With h_t the layer's input at step t:

    u_t = tanh(h_t W + b)      s_t = u_t . context

Over the chunk, i and j running over its valid steps:

    a_i = exp(s_i) / sum_j exp(s_j)        v = sum_i a_i h_i

which is the output at every step. Over the stream v_t is the same with j and i from the stream's
first event to t, kept as Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018:

    m_t = max(m_(t-1), s_t)
    n_t = n_(t-1) exp(m_(t-1) - m_t) + exp(s_t - m_t)
    w_t = w_(t-1) exp(m_(t-1) - m_t) + h_t exp(s_t - m_t)          v_t = w_t / n_t

Deviations from the recurrence: the steps of a block are summed at once, from the state before it; n
and w are accumulated in float64 and stored as two float32 parts, high + low, since float32 alone
loses what one step adds to a long sum; and m is stored as 0 before the first step (n = 0), so that
the zero state is finite and is the state of a new stream (after any step n >= 1).

**Both directions.** Schuster & Paliwal, "Bidirectional recurrent neural networks" (1997): at step t
the forward cell has read steps 1..t, the backward cell steps T..t, T the last valid step of the
row; `merge` combines both. States are in the order of Keras' wrapper: h and c forward, h and c
backward.

In blocks (`models.spec.blocks`) the steps are those of a window. A forward cell runs over the block
and the lookahead, and returns its state after the block; a backward cell starts from zero at the
end of the window, and its final state is discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from models.spec.blocks import BlockSpec
from models.spec.layers import (
    EMPTY_MAXIMUM,
    MASKED_SCORE,
    ActivationName,
    AttentionLayer,
    BidirectionalLayer,
    Conv1dLayer,
)

Tensor: TypeAlias = Any
"""A tf.Tensor; TensorFlow ships no types."""
Activation: TypeAlias = str | Callable[[Any], Any]


def activation_of(name: ActivationName) -> Activation:
    """The value of a Keras layer's `activation` argument for that name."""
    return _tanh if name == "tanh" else name


def _tanh(x: Any) -> Any:
    return tf.cast(tf.tanh(tf.cast(x, tf.float64)), tf.float32)


def _variable(name: str, *shape: int, value: float = 0.0, trainable: bool = True) -> Any:
    values = np.full(shape, value, np.float32)
    return keras.Variable(values, trainable=trainable, dtype="float32", name=name)


class Affine:
    """(x - shift) scale + offset, with constants that training does not change."""

    def __init__(self, name: str, width: int):
        self.shift = _variable(f"{name}_shift", width, trainable=False)
        self.scale = _variable(f"{name}_scale", width, value=1.0, trainable=False)
        self.offset = _variable(f"{name}_offset", width, trainable=False)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return (x - self.shift) * self.scale + self.offset


class Prelu:
    """x where x >= 0, slope x elsewhere (He et al., "Delving deep into rectifiers", 2015)."""

    def __init__(self, name: str, width: int):
        self.slope = _variable(f"{name}_slope", width)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return tf.where(x >= 0, x, self.slope * x)


class CausalConvolution:
    """One layer over sequences of `width` values."""

    def __init__(self, layer: Conv1dLayer, width: int):
        name, units = layer.name, layer.units
        self.kernel = _variable(f"{name}_kernel", layer.kernel_size, width, units)
        self.bias = _variable(f"{name}_bias", units) if layer.use_bias else None
        self._activation = keras.activations.get(activation_of(layer.activation))
        self._layer = layer
        self._width = width

    def __call__(self, x: Tensor, lengths: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve a chunk.

        Args:
            x: float32 [B, T, W].
            lengths: int32 [B]; a row of length 0 keeps its state.
            past: float32 [B, P W], the P = (k - 1) d rows before the chunk.

        Returns:
            The sequence [B, T, units], and the last P rows up to each row's length, [B, P W].
        """
        layer = self._layer
        steps, count = x.shape[1] or tf.shape(x)[1], layer.past_steps
        batch = tf.shape(x)[0]
        rows = tf.concat([tf.reshape(past, [batch, count, self._width]), x], axis=1)
        taps = [rows[:, start : start + steps] for start in range(0, count + 1, layer.dilation)]
        kernel = tf.reshape(self.kernel, [-1, layer.units])
        y = tf.linalg.matmul(tf.concat(taps, axis=-1), kernel)
        if self.bias is not None:
            y += self.bias
        last = lengths[:, tf.newaxis] + tf.range(count)
        after = tf.gather(rows, last, axis=1, batch_dims=1)
        return self._activation(y), tf.reshape(after, [batch, count * self._width])


BLOCK_STEPS = 64
"""Steps that are summed at once; memory grows with the square of this, not of the chunk."""


class AttentionState(NamedTuple):
    """The state of attention over the stream, in the layout of the packed state.

    Attributes:
        maximum: float32 [B, 1].
        normaliser: float32 [B, 2], high and low part.
        total: float32 [B, 2 W], high parts, then low ones; the part `sum`.
    """

    maximum: Tensor
    normaliser: Tensor
    total: Tensor


class Attention:
    """One attention layer over a sequence of `width` values."""

    def __init__(self, layer: AttentionLayer, width: int):
        self.kernel = _variable(f"{layer.name}_kernel", width, layer.units)
        self.bias = _variable(f"{layer.name}_bias", layer.units)
        self.context = _variable(f"{layer.name}_context", layer.units)
        self._width = width

    def over_chunk(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend over the valid steps of each row.

        Args:
            x: float32 [B, T, W].
            mask: bool [B, T], True where a step is valid.

        Returns:
            The value, the same at every step, float32 [B, T, W], and the weights [B, T], which
            are 0 beyond a row's length.
        """
        weights = tf.nn.softmax(tf.where(mask, self._scores(x), MASKED_SCORE), axis=-1)
        value = tf.linalg.matmul(weights[:, tf.newaxis, :], x)
        return tf.broadcast_to(value, tf.shape(x)), weights

    def over_stream(
        self, x: Tensor, lengths: Tensor, state: AttentionState
    ) -> tuple[Tensor, AttentionState]:
        """Attend over all steps of the stream up to each step.

        Args:
            x: float32 [B, T, W], T known while tracing.
            lengths: int32 [B]; a row of length 0 keeps its state.
            state: the state before the chunk.

        Returns:
            The values float32 [B, T, W], and the state after each row's last valid step.
        """
        exact, scores = tf.cast(x, tf.float64), tf.cast(self._scores(x), tf.float64)
        before = self._exact(state)
        blocks = []
        for begin in range(0, x.shape[1], BLOCK_STEPS):
            block = slice(begin, begin + BLOCK_STEPS)
            blocks.append(_accumulate(scores[:, block], exact[:, block], before))
            before = blocks[-1][:, -1:]
        sums = tf.concat(blocks, axis=1)
        values = tf.cast(sums[..., 2:] / sums[..., 1:2], tf.float32)
        last = tf.gather(sums, tf.maximum(lengths - 1, 0), axis=1, batch_dims=1)
        after = AttentionState(
            tf.cast(last[:, :1], tf.float32),
            _split_float64(last[:, 1:2]),
            _split_float64(last[:, 2:]),
        )
        has_steps = (lengths > 0)[:, tf.newaxis]
        parts = [tf.where(has_steps, new, old) for new, old in zip(after, state, strict=True)]
        return values, AttentionState(*parts)

    def _scores(self, x: Tensor) -> Tensor:
        """s_t: float32 [B, T]."""
        hidden = _tanh(tf.linalg.matmul(x, self.kernel) + self.bias)
        return tf.reduce_sum(hidden * self.context, axis=-1)

    def _exact(self, state: AttentionState) -> Tensor:
        """Maximum, normaliser and sum side by side, float64 [B, 1, 2 + W]."""
        maximum, normaliser, total = (tf.cast(part, tf.float64) for part in state)
        maximum = tf.where(normaliser[:, :1] > 0, maximum, EMPTY_MAXIMUM)
        width = self._width
        columns = [maximum, normaliser[:, :1] + normaliser[:, 1:]]
        columns.append(total[:, :width] + total[:, width:])
        return tf.concat(columns, axis=-1)[:, tf.newaxis, :]


def _accumulate(scores: Tensor, x: Tensor, before: Tensor) -> Tensor:
    """Maximum, normaliser and sum after each step of a block.

    Args:
        scores: float64 [B, T].
        x: float64 [B, T, W].
        before: float64 [B, 1, 2 + W], those before its first step.

    Returns:
        float64 [B, T, 2 + W].
    """
    steps = tf.range(tf.shape(scores)[1])
    causal = steps[:, tf.newaxis] >= steps
    pairs = tf.where(causal, scores[:, tf.newaxis, :], tf.constant(EMPTY_MAXIMUM, tf.float64))
    start = before[..., :1]
    # the result does not depend on it, so neither does its gradient
    maximum = tf.stop_gradient(tf.maximum(start, tf.reduce_max(pairs, axis=-1, keepdims=True)))
    shares = tf.exp(pairs - maximum)
    decay = tf.exp(start - maximum)
    normaliser = decay * before[..., 1:2] + tf.reduce_sum(shares, axis=-1, keepdims=True)
    total = decay * before[..., 2:] + tf.linalg.matmul(shares, x)
    return tf.concat([maximum, normaliser, total], axis=-1)


def _split_float64(value: Tensor) -> Tensor:
    """A float64 [B, n] as float32 [B, 2 n]: the rounded value, and the remainder."""
    high = tf.cast(value, tf.float32)
    low = tf.cast(value - tf.cast(high, tf.float64), tf.float32)
    return tf.concat([high, low], axis=-1)


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
