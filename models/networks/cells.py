"""The recurrent layers of a network, as Keras layers.

A plain LSTM, the GRU and the simple RNN are Keras' own. An LSTM with peepholes, layer normalisation
or a projection is `LstmCell` in `keras.layers.RNN`, which takes the mask and the initial state and
returns the state as for Keras' own cells. The weights are created here and set by name from outside
(`models.networks.initial_weights`, an artifact); Keras saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from models.networks.layers import activation_of
from models.spec.layers import NORMALISATION_EPSILON, Cell, GruLayer, LstmLayer, SimpleRnnLayer

Tensor = Any
Function = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


def omit_peephole(gate: Tensor, carry: Tensor) -> Tensor:
    """Return the gate z, as without peepholes."""
    return gate


class LstmFunctions(NamedTuple):
    """Functions with which a step of an LSTM applies its weights and its optional parts.

    Attributes:
        transform_inputs, transform_hidden: N_x(x W) and N_h(h U), all four gates side by side.
        add_bias: z -> z + b.
        activation, recurrent_activation: a and s.
        peepholes: of i, f and o: z, c -> z + p c.
        normalise_carry: N_c, of the carry before its activation.
        project: h -> h V.
    """

    transform_inputs: Function
    transform_hidden: Function
    activation: Function
    recurrent_activation: Function
    add_bias: Function = identity
    peepholes: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (omit_peephole,) * 3
    normalise_carry: Function = identity
    project: Function = identity


def lstm_step(
    inputs: Tensor, state: tuple[Tensor, Tensor], functions: LstmFunctions
) -> tuple[Tensor, Tensor]:
    """Compute one step by the equations of `LstmCell`: x [B, in], (h [B, P or U], c [B, U]) ->
    (h', c')."""
    hidden, carry = state
    a, s = functions.activation, functions.recurrent_activation
    peephole_i, peephole_f, peephole_o = functions.peepholes
    gates = functions.add_bias(
        functions.transform_inputs(inputs) + functions.transform_hidden(hidden)
    )
    i, f, g, o = tf.split(gates, 4, axis=-1)
    kept = s(peephole_f(f, carry)) * carry
    carry = kept + s(peephole_i(i, carry)) * a(g)
    hidden = s(peephole_o(o, carry)) * a(functions.normalise_carry(carry))
    return functions.project(hidden), carry


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
        """x [B, in], [h [B, P or U], c [B, U]] -> h', [h', c']."""
        masks = (
            self.get_dropout_mask(inputs) if training and self.dropout > 0 else None,
            self.get_recurrent_dropout_mask(states[0])
            if training and self.recurrent_dropout > 0
            else None,
        )
        hidden, carry = lstm_step(inputs, (states[0], states[1]), self._build_functions(*masks))
        return hidden, [hidden, carry]

    def _build_functions(self, input_mask: Any, recurrent_mask: Any) -> LstmFunctions:
        layer = self._layer
        transform_inputs: Function = partial(_product, kernel=self.kernel, mask=input_mask)
        transform_hidden: Function = partial(
            _product, kernel=self.recurrent_kernel, mask=recurrent_mask
        )
        options: dict[str, Any] = {}
        if layer.use_bias:
            options["add_bias"] = lambda gates: gates + self.bias
        if layer.peepholes:
            vectors = tf.split(tf.convert_to_tensor(self.peepholes), 3)
            options["peepholes"] = tuple(partial(_add_peephole, vector) for vector in vectors)
        if layer.layer_normalization:
            transform_inputs = _with_normalisation(transform_inputs, self.kernel_gamma)
            transform_hidden = _with_normalisation(transform_hidden, self.recurrent_gamma)
            normalise = _with_normalisation(identity, self.carry_gamma)
            options["normalise_carry"] = lambda carry: normalise(carry) + self.carry_beta
        if layer.projection is not None:
            options["project"] = lambda hidden: tf.matmul(hidden, self.projection)
        return LstmFunctions(
            transform_inputs,
            transform_hidden,
            self.activation,
            self.recurrent_activation,
            **options,
        )

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


def _add_peephole(vector: Tensor, gate: Tensor, carry: Tensor) -> Tensor:
    return gate + vector * carry


def _with_normalisation(function: Function, gamma: Tensor) -> Function:
    """The function with a layer normalisation after it, over the last axis."""

    def normalised(x: Tensor) -> Tensor:
        z = function(x)
        centred = z - tf.reduce_mean(z, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
        return centred / tf.sqrt(variance + NORMALISATION_EPSILON) * gamma

    return normalised
