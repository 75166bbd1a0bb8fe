"""Causal convolution whose padding is the stream's past, as TensorFlow ops.

With x_t the layer's input at step t, k the kernel size and d the dilation:

    y_t = a(sum_j x_(t - (k - 1 - j) d) W_j + b)        j = 0 .. k - 1

as Keras' `Conv1D` with `padding="causal"`, which reads zeros before the sequence. Here it reads the
last (k - 1) d rows of the chunks before, which are the layer's state; a new stream has zeros.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models.networks.activations import activation_of
from models.spec.layers import Conv1dLayer

Tensor = Any


class CausalConvolution:
    """One layer over sequences of `width` values."""

    def __init__(self, layer: Conv1dLayer, width: int):
        def variable(kind: str, *shape: int) -> Any:
            zeros = np.zeros(shape, np.float32)
            return keras.Variable(zeros, dtype="float32", name=f"{layer.name}_{kind}")

        self.kernel = variable("kernel", layer.kernel_size, width, layer.units)
        self.bias = variable("bias", layer.units) if layer.use_bias else None
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
