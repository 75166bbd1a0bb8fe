"""Attention with context, over a chunk and over a stream, as TensorFlow ops.

Yang et al., "Hierarchical attention networks for document classification", 2016. With h_t the
layer's input at step t:

    u_t = tanh(h_t W + b)      s_t = u_t . context

Over the chunk, i and j running over its valid steps:

    a_i = exp(s_i) / sum_j exp(s_j)        v = sum_i a_i h_i

which is the output at every step. Over the stream v_t is the same with j and i from the stream's
first event to t, kept as Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018:

    m_t = max(m_(t-1), s_t)
    n_t = n_(t-1) exp(m_(t-1) - m_t) + exp(s_t - m_t)
    w_t = w_(t-1) exp(m_(t-1) - m_t) + h_t exp(s_t - m_t)          v_t = w_t / n_t

Deviations from the recurrence: the steps of a block are summed at once, from the state before it;
n and w are accumulated in float64 and stored as two float32 parts, high + low, since float32 alone
loses what one step adds to a long sum; and m is stored as 0 before the first step (n = 0), so that
the zero state is finite and is the state of a new stream (after any step n >= 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from models.networks.activations import activation_of
from models.spec.layers import EMPTY_MAXIMUM, MASKED_SCORE, AttentionLayer

Tensor = Any

BLOCK_STEPS = 64
"""Steps that are summed at once; memory grows with the square of this, not of the chunk."""

_tanh: Any = activation_of("tanh")


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
        def variable(kind: str, *shape: int) -> Any:
            name = f"{layer.name}_{kind}"
            return keras.Variable(np.zeros(shape, np.float32), dtype="float32", name=name)

        self.kernel = variable("kernel", width, layer.units)
        self.bias = variable("bias", layer.units)
        self.context = variable("context", layer.units)
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
