"""The recurrent layers of a network, as Keras layers.

A plain LSTM, the GRU and the simple RNN are Keras' own. An LSTM with peepholes, layer normalisation
or a projection is `LstmCell` in `keras.layers.RNN`, which takes the mask and the initial state and
returns the state as for Keras' own cells. The weights are created here and set by name from outside
(`models.networks.initial_weights`, an artifact); Keras saves nothing.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from models.networks.activations import activation_of
from models.spec.layers import NORMALISATION_EPSILON, Cell, GruLayer, LstmLayer, SimpleRnnLayer

Tensor = Any


class LstmCell(keras.layers.LSTMCell):  # type: ignore[misc]  # Keras ships no types
    """One step of an LSTM with the optional parts of its layer.

        i = s(N_x(x W)_i + N_h(h U)_i + p_i c + b_i)
        f = s(N_x(x W)_f + N_h(h U)_f + p_f c + b_f)
        g = a(N_x(x W)_g + N_h(h U)_g + b_g)
        c' = f c + i g
        o = s(N_x(x W)_o + N_h(h U)_o + p_o c' + b_o)
        h' = (o a(N_c(c'))) V

    - `peepholes`: the vectors p, element by element (Gers and Schmidhuber, "Recurrent nets that
      time and count", 2000). Input and forget gate see the old carry, the output gate the new
      one. Without: p = 0.
    - `layer_normalization`: N(z) = gamma (z - mean(z)) / sqrt(var(z) + 1e-3), N_x and N_h over
      all four gates at once and N_c over the carry (Ba et al., "Layer normalization", 2016,
      equations 20 to 22). The paper's offsets of N_x and N_h are only ever added to b, which
      covers all three; N_c has its own, beta. The carry itself, which the peepholes and
      the next step use, is not normalised. Without: N(z) = z.
    - `projection`: V [U, P] (Sak et al., "Long short-term memory recurrent neural network
      architectures for large scale acoustic modeling", 2014). The hidden part h, which is also
      the output, has P values, the carry U. The paper's second, non-recurrent projection is a
      `dense` layer beside it. Without: V is the identity.

    The weights `kernel`, `recurrent_kernel` and `bias` hold the gates side by side in Keras'
    order i, f, c, o; `peepholes` i, f, o. Dropout of x and h is Keras' own: masks drawn once
    per call, four of each if there is recurrent dropout.
    """

    def __init__(self, layer: LstmLayer):
        super().__init__(
            layer.units,
            activation=activation_of(layer.activation),
            recurrent_activation=activation_of(layer.recurrent_activation),
            use_bias=layer.use_bias,
            dropout=layer.dropout,
            recurrent_dropout=layer.recurrent_dropout,
            dtype="float32",
        )
        self._layer = layer
        self.state_size = [layer.width, layer.units]
        self.output_size = layer.width

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights for inputs [B, in]."""
        layer, gates = self._layer, 4 * self.units
        self.kernel = self._weight("kernel", input_shape[-1], gates)
        self.recurrent_kernel = self._weight("recurrent_kernel", layer.width, gates)
        self.bias = self._weight("bias", gates) if layer.use_bias else None
        if layer.peepholes:
            self.peepholes = self._weight("peepholes", 3 * self.units)
        if layer.layer_normalization:
            self.kernel_gamma = self._weight("kernel_gamma", gates)
            self.recurrent_gamma = self._weight("recurrent_gamma", gates)
            self.carry_gamma = self._weight("carry_gamma", self.units)
            self.carry_beta = self._weight("carry_beta", self.units)
        if layer.projection is not None:
            self.projection = self._weight("projection", self.units, layer.projection)
        self.built = True

    def call(
        self, inputs: Tensor, states: list[Tensor], training: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """x [B, in], (h [B, P or U], c [B, U]) -> h', (h', c')."""
        layer = self._layer
        hidden, carry = states
        masks: list[Any] = [None, None]
        if training and self.dropout > 0:
            masks[0] = self.get_dropout_mask(inputs)
        if training and self.recurrent_dropout > 0:
            masks[1] = self.get_recurrent_dropout_mask(hidden)
        x_part = _product(inputs, self.kernel, masks[0])
        h_part = _product(hidden, self.recurrent_kernel, masks[1])
        if layer.layer_normalization:
            x_part = _normalise(x_part) * self.kernel_gamma
            h_part = _normalise(h_part) * self.recurrent_gamma
        gates = x_part + h_part
        if layer.use_bias:
            gates += self.bias
        in_i, in_f, in_g, in_o = tf.split(gates, 4, axis=-1)
        if layer.peepholes:
            peep_i, peep_f, peep_o = tf.split(tf.convert_to_tensor(self.peepholes), 3)
            in_i += peep_i * carry
            in_f += peep_f * carry
        i, f = self.recurrent_activation(in_i), self.recurrent_activation(in_f)
        carry = f * carry + i * self.activation(in_g)
        if layer.peepholes:
            in_o += peep_o * carry
        exposed = carry
        if layer.layer_normalization:
            exposed = _normalise(carry) * self.carry_gamma + self.carry_beta
        hidden = self.recurrent_activation(in_o) * self.activation(exposed)
        if layer.projection is not None:
            hidden = tf.matmul(hidden, self.projection)
        return hidden, [hidden, carry]

    def _weight(self, name: str, *shape: int | None) -> Any:
        return self.add_weight(name=name, shape=shape, initializer="zeros")


def recurrent_layer(layer: Cell, name: str) -> keras.layers.RNN:
    """The Keras layer, not yet built; returns the sequence and the state parts in order."""
    options: dict[str, Any] = {
        "name": name,
        "dtype": "float32",
        "return_sequences": True,
        "return_state": True,
    }
    if isinstance(layer, LstmLayer) and not layer.is_standard:
        return keras.layers.RNN(LstmCell(layer), **options)
    common = {
        "activation": activation_of(layer.activation),
        "use_bias": layer.use_bias,
        "dropout": layer.dropout,
        "recurrent_dropout": layer.recurrent_dropout,
        **options,
    }
    if isinstance(layer, SimpleRnnLayer):
        return keras.layers.SimpleRNN(layer.units, **common)
    common["recurrent_activation"] = activation_of(layer.recurrent_activation)
    # XLA cannot compile cuDNN's kernel, which supports no mask either
    common["use_cudnn"] = False
    if isinstance(layer, GruLayer):
        return keras.layers.GRU(layer.units, reset_after=layer.reset_after, **common)
    return keras.layers.LSTM(layer.units, **common)


def _product(x: Tensor, kernel: Tensor, mask: Tensor | list[Tensor] | None) -> Tensor:
    """x W with dropout: under one mask, or under one of its own for each gate."""
    if isinstance(mask, list):
        blocks = tf.split(tf.convert_to_tensor(kernel), len(mask), axis=-1)
        pairs = zip(mask, blocks, strict=True)
        return tf.concat([tf.matmul(x * part, block) for part, block in pairs], axis=-1)
    return tf.matmul(x if mask is None else x * mask, kernel)


def _normalise(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + epsilon) over the last axis."""
    centred = x - tf.reduce_mean(x, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
    return centred / tf.sqrt(variance + NORMALISATION_EPSILON)
